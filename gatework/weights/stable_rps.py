"""``SharedArray``: all weights are entries of one short array, chosen by a hash (STABLE-RPS).

Desai and Shrivastava, In Defense of Parameter Sharing for Model-Compression, 2023, arXiv 2310.11611, and the authors' library.
Weight l of numel n_l has the offset o_l (the sum of the numels before it), its entry i the position p = o_l + i:

    W_l[i] = lam_l * g(p) * psi[idx(p)]        psi (m,), m = int(ratio * sum n_l), g(p) in {-1, 1}

    cyclic   idx = (h(p div m) + p mod m) mod m                      the paper's mapping
    roast    idx = h2(tile row, tile column) mod (m - tile) + place in the tile
    hashed   idx = h(p) mod m                                        HashedNets (arXiv 1504.04788)

    h(x) = ((a x + b x^2 + d) mod P) mod m     h2(x, y) = ((a x + b y + d) mod P)     P = 2038074743

``lam_l`` is the standard deviation that the weight had before over that of psi, so every weight starts with its own spread. With
k_lj the uses of slot j by weight l, psi's gradient is divided by 1e-6 + G_j, G_j being one of

    v1  (sum_l k lam)^2 / (1e-3 + sum_l k)     v2  sum_l k lam     v3  sum_l k lam / (1e-3 + sum_l k)
    v4  sqrt(sum_l k lam^2)                    v5  sum_l k lam^2

v5 is the diagonal of J^T J for W = J psi: SGD then moves W by the projection of the dense step on what the array can express, so
the dense model's learning rate stays stable; v1, the library's default, is at most v5, and equal where all lam are.

Differences from the library: the signs come from a second hash of the position, not from a generator per layer, so that they need
not be stored; products in the hashes are reduced modulo P one by one (b x^2 overflows 64 bits there from x = 6e4 on); its "v5"
computes v4, here it is v5; psi is uniform, as in the paper, and by default of the weights' own spread instead of U(-0.04, 0.04)
(see ``init``); lam divides by the measured root mean square of psi (what the signs make of it is the spread); the gradient is
divided in the backward pass, so any training loop has it.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatework.core.contracts import Weight
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.weights.base import Packed, matrices

P = 2038074743
MAPS = ("cyclic", "roast", "hashed")


@register("stable_rps", paper="stable_rps")
class SharedArray(Weight):
    """All weights read from one short array at hashed places.

    One array psi serves all weights of one ``weights.apply``: ``W[i] = lam g(p) psi[idx(p)]`` with p the entry's position among all
    of them. Data-free and fixed: apply it before training; the weights start anew, each with the standard deviation it had. Norms
    and biases are not shared; leave small weights to the pattern.

    The ``cyclic`` map uses every slot floor(n/m) or ceil(n/m) times and is one to one from ratio 1 on, where training is dense
    training; ``roast`` keeps tiles together (locality) and ``hashed`` nothing, and both leave slots unused.

    Memory: the optimizer sees m numbers. While training, each weight keeps its int32 indexes (signs included); packed it keeps
    none, they are computed when the weight is read. Compute is not reduced: gather, then the dense product.

    Saving: the map's name, seed, tile and offsets are in the ``state_dict``; loading takes them over.

    The gradient scaling is made for SGD. Adam does not see it (but gradient clipping does), and moves W by lam times its step: keep
    ``init`` None there, so that lam is about 1. Weight decay on psi acts once for all uses of a slot.

    Args:
        ratio: numbers in the array over weights, above 0.
        map: the places, ``cyclic``, ``roast`` or ``hashed``.
        tile: rows and columns of a tile of ``roast``; the array must be longer than a tile.
        scaler: what the gradient of psi is divided by, ``v1`` to ``v5`` or ``none``.
        init: psi starts uniform in (-init, init); None takes the weights' own root mean square spread, so that lam is about 1.
        seed: of the hashes; the global random state draws psi alone.

    Raises:
        PartError: an array shorter than the map needs; weights of several dtypes or devices; a weight of equal entries, whose
            spread is 0.
    """

    example = {"tile": (2, 4)}

    def __init__(
        self,
        ratio: float = 0.125,
        map: Literal["cyclic", "roast", "hashed"] = "cyclic",
        tile: tuple[int, int] = (16, 16),
        scaler: Literal["v1", "v2", "v3", "v4", "v5", "none"] = "v1",
        init: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not ratio > 0 or (init is not None and not init > 0):
            raise ValueError(f"ratio and init must be above 0, got {ratio} and {init}")
        if map not in MAPS:
            raise ValueError(f"no map {map!r}; there are {', '.join(MAPS)}")
        if min(tile) < 1:
            raise ValueError(f"a tile has at least one row and column, got {tuple(tile)}")
        if scaler not in ("v1", "v2", "v3", "v4", "v5", "none"):
            raise ValueError(f"no scaler {scaler!r}; there are v1, v2, v3, v4, v5 and none")
        self.ratio, self.map, self.tile, self.scaler = ratio, map, (tile[0], tile[1]), scaler
        self.init, self.seed = init, seed
        self.place: Place | None = None
        self.scale: _Scale | None = None

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"ratio={self.ratio}, map={self.map!r}, tile={self.tile}, scaler={self.scaler!r}"
        return f"{shown}, init={self.init}, seed={self.seed}"

    def bind(self, weights: Sequence[Tensor], stacked: Sequence[int]) -> list[tuple[Weight, Tensor]]:
        """One array for these weights, and each one's place in it."""
        total = sum(weight.numel() for weight in weights)
        size = int(self.ratio * total)
        least = self.tile[0] * self.tile[1] + 1 if self.map == "roast" else 1
        if not least <= size < P or total >= P:
            raise PartError(
                f"the shared array of ratio {self.ratio} over {total:,} weights has {size:,} numbers; "
                f"map={self.map} takes {least:,} to {P - 1:,}, for fewer than {P:,} weights"
            )
        first = weights[0]
        if any((weight.dtype, weight.device) != (first.dtype, first.device) for weight in weights):
            raise PartError("the weights that share an array must be of one dtype and on one device; apply it to each kind alone")
        with torch.no_grad():
            spreads = torch.stack([_spread(weight) for weight in weights])
            wide = torch.empty(size, dtype=spreads.dtype, device=first.device).uniform_(-1, 1)
            numels = torch.tensor([weight.numel() for weight in weights], device=first.device)
            usual = 3**0.5 * ((spreads.square() * numels).sum() / total).sqrt()
            psi = nn.Parameter((wide * (usual if self.init is None else self.init)).to(first.dtype))
            # The signs are random, so the spread of a weight is the root mean square of what it reads.
            lams = (spreads / psi.to(spreads.dtype).square().mean().sqrt()).unbind()
            places: list[Place] = []
            offset = 0
            for weight, axes, lam in zip(weights, stacked, lams, strict=True):
                settings = (MAPS.index(self.map), self.seed, *self.tile, size, offset)
                places.append(Place(settings, weight.shape, matrices(weight.shape, axes)[2], lam.clone()))
                offset += weight.numel()
            scale = None if self.scaler == "none" else _Scale(self.scaler, places)
        psi.requires_grad_(any(weight.requires_grad for weight in weights))
        bound: list[tuple[Weight, Tensor]] = []
        for place in places:
            part = copy.deepcopy(self)
            part.place, part.scale = place, scale
            bound.append((part, psi))
        return bound

    def forward(self, stored: Tensor) -> Tensor:
        """The weight, gathered from the array ``stored``."""
        if self.place is None:
            raise PartError(f"{type(self).__name__} is bound to weights by weights.apply(model, pattern, part)")
        scale = None if self.scale is None else self.scale.scale
        return self.place.gather(stored, scale).view(self.place.shape)

    def pack(self, stored: Tensor) -> tuple[nn.Module, Tensor]:
        """The place alone; the array stays what it is."""
        place = copy.deepcopy(self.place)
        assert place is not None
        place.index = None
        return place, stored


class Place(Packed):
    """One weight's place in a shared array; without indexes of its own it is the packed form.

    Args:
        settings: numbers that fix the map: its place in :data:`MAPS`, seed, tile rows and columns, length of the array, offset.
        shape: of the weight.
        columns: entries of a row.
        lam: the weight's scale, 0-dimensional.
    """

    lam: Tensor
    settings: Tensor
    index: Tensor | None

    def __init__(self, settings: tuple[int, ...], shape: torch.Size, columns: int, lam: Tensor) -> None:
        super().__init__()
        self.shape, self.columns = shape, columns
        self.register_buffer("lam", lam)
        self.register_buffer("settings", torch.tensor(settings, device=lam.device))
        self._know(settings)
        self.register_buffer("index", self.signed(torch.arange(shape.numel(), device=lam.device)), persistent=False)

    def _know(self, settings: tuple[int, ...]) -> None:
        self.known = settings
        self.places, self.signs = _numbers(settings[1], "slots"), _numbers(settings[1], "signs")

    def extra_repr(self) -> str:
        """The settings."""
        kind, seed, rows, columns, size, offset = self.known
        return f"shape={tuple(self.shape)}, map={MAPS[kind]!r}, seed={seed}, tile={(rows, columns)}, size={size}, offset={offset}"

    def forward(self, stored: Tensor) -> Tensor:
        """The weight."""
        return self.gather(stored).view(self.shape)

    def gather(self, psi: Tensor, scale: Tensor | None = None) -> Tensor:
        """The weight's entries, flat; the gradient of ``psi`` divided by ``scale``, where one is given."""
        index = self.signed(torch.arange(self.shape.numel(), device=psi.device)) if self.index is None else self.index
        return self._entries(psi, index, scale)

    def rows(self, stored: Tensor, rows: Tensor) -> Tensor:
        """Some rows of a matrix."""
        columns = torch.arange(self.columns, device=rows.device)
        return self._entries(stored, self.signed(rows[:, None] * self.columns + columns).flatten()).view(-1, self.columns)

    def _entries(self, psi: Tensor, index: Tensor, scale: Tensor | None = None) -> Tensor:
        negative = index >> 31
        slots = index ^ negative
        entries = psi.index_select(0, slots)
        if scale is not None:
            entries = _Divided.apply(entries, scale, slots)
        return entries * ((negative | 1) * self.lam.to(psi.dtype))

    def signed(self, positions: Tensor) -> Tensor:
        """The slots of these entries (flat numbers within the weight) in int32; ``~slot`` where the sign is negative."""
        kind, _, tile_rows, tile_columns, size, offset = self.known
        p = positions + offset
        if MAPS[kind] == "cyclic":
            slots = (_hash(p.div(size, rounding_mode="floor"), self.places) % size + p % size) % size
        elif MAPS[kind] == "hashed":
            slots = _hash(p, self.places) % size
        else:
            row, column = positions.div(max(self.columns, 1), rounding_mode="floor"), positions % max(self.columns, 1)
            x = row.div(tile_rows, rounding_mode="floor") + offset
            y = column.div(tile_columns, rounding_mode="floor") + offset + self.shape.numel() // max(self.columns, 1)
            start = _hash_of_two(x, y, self.places) % (size - tile_rows * tile_columns)
            slots = start + row % tile_rows * tile_columns + column % tile_columns
        return torch.where(_hash(p, self.signs) % 2 == 0, slots, ~slots).to(torch.int32)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.settings.is_meta and (self.index is None or self.index.is_meta or tuple(self.settings.tolist()) != self.known):
            self._know(tuple(self.settings.tolist()))
            if self.index is not None:
                self.index = self.signed(torch.arange(self.shape.numel(), device=self.settings.device))


class _Scale(nn.Module):
    """What the gradient of a shared array is divided by; one for all its places."""

    scale: Tensor

    def __init__(self, kind: str, places: list[Place]) -> None:
        super().__init__()
        size = places[0].known[4]
        uses = used = squares = torch.zeros(size, dtype=places[0].lam.dtype, device=places[0].lam.device)
        for place in places:
            assert place.index is not None
            ones = torch.ones(place.index.numel(), dtype=uses.dtype, device=uses.device)
            count = torch.zeros_like(uses).index_add_(0, place.index ^ (place.index >> 31), ones)
            uses, used, squares = uses + count, used + count * place.lam, squares + count * place.lam.square()
        if kind == "v1":
            scale = used.square() / (1e-3 + uses)
        elif kind == "v2":
            scale = used
        elif kind == "v3":
            scale = used / (1e-3 + uses)
        else:
            scale = squares.sqrt() if kind == "v4" else squares
        self.register_buffer("scale", scale)


class _Divided(torch.autograd.Function):
    """The identity; the gradient is divided by ``1e-6 + scale`` at the entries' slots."""

    @staticmethod
    def forward(ctx: Any, entries: Tensor, scale: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(scale, slots)
        return entries.view_as(entries)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        scale, slots = ctx.saved_tensors
        return grad / (1e-6 + scale.index_select(0, slots)).to(grad.dtype), None, None


def _spread(weight: Tensor) -> Tensor:
    """Standard deviation in float32 or wider."""
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    spread = wide.std(correction=0) if wide.numel() else wide.new_ones(())
    if not spread.is_meta and not spread > 0:
        raise PartError(f"a weight of shape {tuple(weight.shape)} has equal entries, so that its spread is 0; leave it out")
    return spread


def _numbers(seed: int, purpose: str) -> list[int]:
    """Three odd numbers below P, the same everywhere and for ever."""
    digests = [hashlib.sha256(f"{seed} {purpose} {k}".encode()).digest() for k in range(3)]
    return [int.from_bytes(digest[:8]) % (P // 2 - 1) * 2 + 1 for digest in digests]


def _hash(x: Tensor, numbers: list[int]) -> Tensor:
    a, b, d = numbers
    return (x * a % P + x * x % P * b % P + d) % P


def _hash_of_two(x: Tensor, y: Tensor, numbers: list[int]) -> Tensor:
    a, b, d = numbers
    return (x * a % P + y * b % P + d) % P
