"""The multi-resolution hash encoding of coordinates.

Müller et al., Instant Neural Graphics Primitives with a Multiresolution Hash Encoding, 2022, arXiv 2201.05989, equations 2
to 4. L grids lie over the cube [0, 1]^d, grid l with N_l cells a side; each corner of a cell owns a row of F features, and a
point's encoding is the d-linear interpolation of its cell's 2^d corners, grid after grid:

    N_l = floor(N_min b^l)    b = exp((ln N_max - ln N_min) / (L - 1))
    row(i) = sum_j i_j (N_l + 1)^(d-1-j)                      where (N_l + 1)^d <= 2^t, row-major, without collisions
             (XOR_j i_j pi_j) mod 2^t                         else, pi = (1, 2654435761, 805459861)

Two corners that share a row through the hash share its features; training decides for the one that matters more.
"""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

#: Of the hash, one per dimension. Products stay below 2^63, so that signed integers of 64 bits give what unsigned ones do.
PRIMES = (1, 2654435761, 805459861)


def resolutions(levels: int, n_min: int, n_max: int) -> list[int]:
    """Cells a side of each grid, from coarse to fine; the first is ``n_min`` and the last ``n_max`` (one grid: ``n_max``)."""
    if levels == 1:
        return [n_max]
    growth = math.log(n_max / n_min) / (levels - 1)
    # What should be a whole number may come out a rounding error below it.
    return [math.floor(n_min * math.exp(growth * level) * (1 + 1e-12)) for level in range(levels)]


class HashGridEncoding(nn.Module):
    """Features of points in [0, 1]^d: ``forward(x (N, d)) -> (N, levels * features)``, coarse grids first.

    The encoding is continuous and d-linear within a cell; at a corner of a grid's cell that grid's part is the corner's row of
    the table. Coordinates outside [0, 1] are clamped (their gradient is 0).

    Args:
        d: number of coordinates, 1 to 3.
        levels: L, number of grids.
        features: F, features per corner.
        log2_size: t; a grid has at most 2^t rows, a coarse one only as many as it has corners.
        n_min, n_max: cells a side of the coarsest and the finest grid.

    Weights: ``table`` (rows of all grids, F), grid after grid; ``offsets`` says where each starts.

    Initialisation: uniform in +-1e-4.

    Raises:
        ValueError: d outside 1 to 3, sizes below 1, n_min above n_max, a table or a grid too large to number its rows.
    """

    cells: Tensor
    offsets: Tensor
    strides: Tensor
    hashed: Tensor
    corners: Tensor
    no_weight_decay = ("table",)

    def __init__(
        self, d: int, levels: int = 8, features: int = 2, log2_size: int = 12, n_min: int = 4, n_max: int = 256
    ) -> None:
        super().__init__()
        if not 1 <= d <= 3:
            raise ValueError(f"a hash grid takes 1, 2 or 3 coordinates, got {d}")
        if min(levels, features, n_min) < 1:
            raise ValueError(f"levels, features and n_min must be at least 1, got {levels}, {features} and {n_min}")
        if n_max < n_min:
            raise ValueError(f"n_max {n_max} is below n_min {n_min}")
        if not 0 <= log2_size <= 30 or n_max > 1 << 20:
            raise ValueError(f"log2_size must be in 0..30 and n_max at most 2^20, got {log2_size} and {n_max}")
        self.d, self.levels, self.features, self.log2_size, self.n_min, self.n_max = d, levels, features, log2_size, n_min, n_max
        cells = resolutions(levels, n_min, n_max)
        rows = [min((n + 1) ** d, 1 << log2_size) for n in cells]
        derived = {
            "cells": cells,
            "offsets": list(itertools.accumulate(rows[:-1], initial=0)),
            "strides": [[min((n + 1) ** (d - 1 - j), 1 << 62) for j in range(d)] for n in cells],
            "hashed": [(n + 1) ** d > 1 << log2_size for n in cells],
            "corners": list(itertools.product((0, 1), repeat=d)),
        }
        for name, values in derived.items():
            self.register_buffer(name, torch.tensor(values), persistent=False)
        self.table = nn.Parameter(torch.empty(sum(rows), features).uniform_(-1e-4, 1e-4))

    @property
    def width(self) -> int:
        """Length of an encoding."""
        return self.levels * self.features

    def extra_repr(self) -> str:
        """The sizes."""
        shown = f"d={self.d}, levels={self.levels}, features={self.features}, log2_size={self.log2_size}"
        return f"{shown}, n_min={self.n_min}, n_max={self.n_max}"

    def locate(self, x: Float[Tensor, "N d"]) -> tuple[Int[Tensor, "N L C"], Float[Tensor, "N L C"]]:
        """The rows of the table that each point's encoding is made of, C = 2^d by grid, and their weights (of sum 1)."""
        x = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(0, 1)
        place = x[:, None] * self.cells[:, None]  # (N, L, d), in cells
        # At 1 a point lies in the last cell, not in one beyond it.
        cell = torch.minimum(place.detach().floor().long(), self.cells[:, None] - 1)
        inside = (place - cell)[:, :, None]  # (N, L, 1, d), in [0, 1]
        weights = torch.where(self.corners.bool(), inside, 1 - inside).prod(-1)
        corner = cell[:, :, None] + self.corners  # (N, L, C, d)
        dense = (corner * self.strides[:, None]).sum(-1)
        hashed = corner[..., 0] * PRIMES[0]
        for j in range(1, self.d):
            hashed = hashed ^ (corner[..., j] * PRIMES[j])
        rows = torch.where(self.hashed[:, None], hashed & ((1 << self.log2_size) - 1), dense)
        return rows + self.offsets[:, None], weights

    def forward(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N LF"]:
        """Encode N points; the result has the dtype of the table or, where that is wider, of the points."""
        if x.shape[1] != self.d:
            raise ValueError(f"this hash grid was built for points of {self.d} coordinates, not {x.shape[1]}")
        rows, weights = self.locate(x)
        found = nn.functional.embedding(rows, self.table)  # (N, L, C, F)
        mixed = (found * weights[..., None]).sum(2)
        return mixed.flatten(1).to(torch.promote_types(x.dtype, self.table.dtype))
