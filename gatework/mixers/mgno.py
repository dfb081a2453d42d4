"""``MgNO``: a multigrid V-cycle with learnt convolutions, a linear map of grid functions that reaches everywhere.

He, Liu and Xu, MgNO: Efficient Parameterization of Linear Operators via Multigrid, 2023 (ICLR 2024), arXiv 2310.19809; the official
code was read. From f, the input on the finest grid, with L levels, each half as fine as the one above:

    down, level l = 1 .. L:     u_l <- u_l + S (f_l - A u_l)            ``pre`` times; the very first is u_1 = S f_1
                                u_{l+1} = Pi u_l,  f_{l+1} = R f_l      where l < L
    up, level l = L - 1 .. 1:   u_l <- u_l + P u_{l+1}
                                u_l <- u_l + S (f_l - A u_l)            ``post`` times

The output is u_1. S and A are convolutions with 3 taps (3 x 3), Pi and R the same with stride 2, P a transposed one with 4 taps and
stride 2. Each stands alone: nothing is shared, and none has a bias, so that the map is linear in f. The paper's layer is
act(MgNO(f) + W f + b); here residual, norm and feed-forward of a block stand in their place.

What goes down is chosen by ``coarse``: ``restricted``, as above and in the paper's experiments; ``residual``, where
f_{l+1} = R (f_l - A u_l); ``correction``, the classical cycle, where moreover u_{l+1} starts from 0.

Each convolution's border continues the grid: by zeros (``dirichlet``), around (``periodic``), or mirrored in its end points
(``neumann``).

Differences: in the official code the transposed convolution has zeros around it whatever the border; here it has the same border as
the others, without which a periodic layer does not commute with shifts. Grids that do not halve evenly are rounded up, and what
then comes up is cut off. The layer norms of its Navier-Stokes variant are left out: they are not linear and bound to one grid.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, State
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.mixers.base import TwoSided, check_call


@register("mgno", paper="mgno")
class MgNO(TwoSided):
    """A multigrid V-cycle over a line or a grid, linear in its input.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; channels are mixed too. Parameters do not depend on T, time is linear in it.

    Args:
        d_model: width of the stream.
        grid: (rows, columns) of the tokens, row by row; None is a line of any length.
        levels: L; the coarsest is ``2**(levels - 1)`` times as coarse as the finest.
        pre: smoothing steps of every level on the way down.
        post: and on the way up, of every level but the coarsest.
        padding: the border.
        coarse: what a coarser level is given.

    A periodic layer commutes with shifts by ``2**(levels - 1)`` tokens where that divides the grid.

    Padding of a line takes no place: a row's real tokens lie side by side, and rows of one length are run together. On a grid
    padding is read as 0 and keeps its place.

    Initialisation: PyTorch's for all convolutions.

    There is no decoding, and packed documents would be one grid. Outputs that are not to be kept are set to 0, and computed all the
    same.

    Source: arXiv 2310.19809.

    Raises:
        ValueError: sizes below 1, ``post`` below 0.
        PartError: on a grid another number of tokens, a state, ``segments``.
    """

    capabilities = TwoSided.capabilities | {
        "packs": No("its levels are those of one grid"),
        "keeps": No("every place of every level goes into every output"),
    }

    def __init__(
        self,
        d_model: int,
        grid: tuple[int, int] | None = None,
        levels: int = 3,
        pre: int = 1,
        post: int = 1,
        padding: Literal["dirichlet", "periodic", "neumann"] = "dirichlet",
        coarse: Literal["restricted", "residual", "correction"] = "restricted",
    ) -> None:
        super().__init__()
        if min(d_model, levels, pre) < 1 or post < 0:
            given = f"{d_model}, {levels}, {pre} and {post}"
            raise ValueError(f"d_model, levels and pre must be at least 1 and post at least 0, got {given}")
        if padding not in ("dirichlet", "periodic", "neumann") or coarse not in ("restricted", "residual", "correction"):
            raise ValueError(f"no padding {padding!r} or no coarse {coarse!r}")
        if grid is not None and (len(grid) != 2 or min(grid) < 1):
            raise ValueError(f"grid is (rows, columns), both at least 1, not {tuple(grid)}")
        if grid is not None:
            self.capabilities = self.capabilities | {"any_length": No("it was built for a grid")}
        self.d_model, self.grid, self.levels = d_model, None if grid is None else (grid[0], grid[1]), levels
        self.pre, self.post, self.padding, self.coarse = pre, post, padding, coarse
        self.down = nn.ModuleList(self._smoothings(pre, level == 0 or coarse == "correction") for level in range(levels))
        self.up = nn.ModuleList(self._smoothings(post, False) for _ in range(levels - 1))
        between = range(levels - 1)
        self.pi = nn.ModuleList(self._convolution(2) for _ in between if coarse != "correction")
        self.a = nn.ModuleList(self._convolution() for _ in between if coarse != "restricted")
        self.r = nn.ModuleList(self._convolution(2) for _ in between)
        transposed = nn.ConvTranspose1d if grid is None else nn.ConvTranspose2d
        # The border is one coarse place, two fine ones, wide.
        self.p = nn.ModuleList(transposed(d_model, d_model, 4, stride=2, padding=3, bias=False) for _ in between)

    def _convolution(self, stride: int = 1) -> nn.Module:
        made = nn.Conv1d if self.grid is None else nn.Conv2d
        return made(self.d_model, self.d_model, 3, stride=stride, bias=False)

    def _smoothings(self, steps: int, from_zero: bool) -> nn.ModuleList:
        """Pairs of S and A; where u is 0 the first needs no A."""
        pairs = []
        for step in range(steps):
            names = ("s",) if from_zero and step == 0 else ("s", "a")
            pairs.append(nn.ModuleDict({name: self._convolution() for name in names}))
        return nn.ModuleList(pairs)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, grid={self.grid}, levels={self.levels}, pre={self.pre}, post={self.post}"
        return shown + f", padding={self.padding}, coarse={self.coarse}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the grid; see :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, None, mask, segments, keep)
        if self.grid is not None and x.shape[1] != self.grid[0] * self.grid[1]:
            rows, columns = self.grid
            raise PartError(f"mgno was built for a grid of {rows} x {columns} = {rows * columns} tokens, not {x.shape[1]}")
        if mask is None:
            y = self._run(x)
        elif self.grid is None:
            y = self._ragged(x, mask)
        else:
            y = self._run(x.masked_fill(~mask[..., None], 0))
        return y if keep is None else y.masked_fill(~keep[..., None], 0)

    def _run(self, x: Tensor) -> Tensor:
        f = x.transpose(1, 2)
        if self.grid is not None:
            return self.cycle(f.unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        return self.cycle(f).transpose(1, 2)

    def _ragged(self, x: Tensor, mask: Tensor) -> Tensor:
        """Rows of equally many real tokens together."""
        order, counts = (~mask).to(torch.uint8).argsort(dim=1, stable=True), mask.sum(1)
        y = torch.zeros_like(x)
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            places = order[rows, :count]
            found = self._run(x[rows[:, None], places])
            y = y.to(found.dtype).index_put((rows[:, None], places), found)
        return y

    def cycle(self, f: Float[Tensor, "B C *sides"]) -> Float[Tensor, "B C *sides"]:
        """The V-cycle of functions with channels first."""
        if not f.numel():
            return f.clone()
        u: Tensor | None = None
        kept = []
        for level in range(self.levels):
            u = self._smooth(self.down[level], u, f)
            if level + 1 < self.levels:
                kept.append((u, f))
                rest = f if self.coarse == "restricted" else f - self._apply_to(self.a[level], u)
                f = self._apply_to(self.r[level], rest)
                u = None if self.coarse == "correction" else self._apply_to(self.pi[level], u)
        assert u is not None
        for level in reversed(range(self.levels - 1)):
            fine, f = kept[level]
            risen = self._apply_to(self.p[level], u)
            for axis, side in enumerate(fine.shape[2:], 2):
                risen = risen.narrow(axis, 0, side)
            u = fine + risen
            u = self._smooth(self.up[level], u, f)
        return u

    def _smooth(self, pairs: Any, u: Tensor | None, f: Tensor) -> Tensor:
        for pair in pairs:
            if u is None:
                u = self._apply_to(pair["s"], f)
            else:
                u = u + self._apply_to(pair["s"], f - self._apply_to(pair["a"], u))
        assert u is not None
        return u

    def _apply_to(self, convolution: nn.Module, u: Tensor) -> Tensor:
        """A convolution of what the border makes of u."""
        for axis in range(2, u.dim()):
            if self.padding == "dirichlet":
                continue
            last = u.shape[axis] - 1
            ends = (last, 0) if self.padding == "periodic" else (min(1, last), max(last - 1, 0))
            u = torch.cat([u.narrow(axis, ends[0], 1), u, u.narrow(axis, ends[1], 1)], axis)
        if self.padding == "dirichlet":
            u = F.pad(u, [1] * (2 * (u.dim() - 2)))
        y: Tensor = convolution(u)
        return y
