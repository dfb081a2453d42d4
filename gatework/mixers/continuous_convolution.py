"""``ContinuousConvolution``: a convolution whose kernel is a function of the distance, over points that lie anywhere.

Berner et al., Principled Approaches for Extending Neural Architectures to Function Spaces for Operator Learning, 2025, arXiv
2506.10973: a convolution with k taps shrinks to a point as a grid gets finer; with a kernel of a fixed radius and quadrature
weights it converges to an integral,

    y(x_t) = sum over s of w_s kappa(x_t - x_s) u(x_s) + b        kappa(z) = sum over k of phi_k(z) W_k

phi_k are the hat functions on ``taps`` knots along each axis (products of one for each axis), the middle knot at 0 and neighbours
``radius / ((taps + 1) / 2)`` apart, so that kappa is piecewise linear, continuous, and 0 from ``radius`` on. Where the points lie
as far apart as the knots and w is their distance h, this is h times the ordinary convolution with the taps W_k (PyTorch's with the
order of its taps reversed).

Outputs are asked for at the points themselves, or at any others. A point split in two of half its weight changes nothing.

The paper's text was not at hand when this was written; hat functions as the kernel's basis are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.errors import PartError
from gatework.core.registry import register


@register("continuous_convolution", paper="neural_operator_recipe")
class ContinuousConvolution(Component):
    """A convolution of functions sampled at points of any places.

    ``forward(u (B, S, d_in), points (B, S, axes), quadrature (B, S), at (B, T, axes) or None) -> (B, T, d_out)``: values, places
    and weights of the samples, and where to say the outputs (None: at the points). All pairs are computed: time and memory are
    those of ``B T S taps**axes`` numbers.

    Args:
        d_in: channels of u.
        d_out: channels of the outputs.
        radius: from which distance, along an axis, the kernel is 0.
        taps: knots along an axis, odd.
        axes: of space.
        period: length of the space along every axis where it is a circle, at least twice the radius; None is open space.

    Initialisation: W_k uniform up to ``(d_in taps**axes)**-0.5`` over the volume between knots, with which a convolution over
    points as dense as the knots starts as PyTorch's do; the bias 0.

    Source: arXiv 2506.10973.

    Raises:
        ValueError: sizes below 1, even ``taps``, a radius that is not positive or more than half the period.
        PartError: inputs that do not fit each other.
    """

    family = "mixer"

    def __init__(
        self, d_in: int, d_out: int, radius: float, taps: int = 5, axes: int = 1, period: float | None = None
    ) -> None:
        super().__init__()
        if min(d_in, d_out, axes) < 1 or taps < 1 or taps % 2 == 0:
            raise ValueError(f"d_in, d_out and axes are at least 1 and taps odd, got {d_in}, {d_out}, {axes} and {taps}")
        if not radius > 0 or (period is not None and 2 * radius > period):
            raise ValueError(f"radius must be positive and at most half the period, got {radius} and {period}")
        self.d_in, self.radius, self.taps, self.axes, self.period = d_in, radius, taps, axes, period
        #: Between two knots.
        self.distance = radius / ((taps + 1) / 2)
        bound = (d_in * taps**axes) ** -0.5 / self.distance**axes
        #: W_k, the knots in the order of reading.
        self.weight = nn.Parameter(torch.empty(taps**axes, d_in, d_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_in={self.d_in}, d_out={len(self.bias)}, radius={self.radius}, taps={self.taps}"
        return shown + f", axes={self.axes}, period={self.period}"

    def basis(self, offsets: Float[Tensor, "*B axes"]) -> Float[Tensor, "*B knots"]:
        """phi_k of the offsets."""
        if self.period is not None:
            offsets = offsets - self.period * (offsets / self.period).round()
        middle = (self.taps - 1) / 2
        knots = torch.arange(self.taps, device=offsets.device, dtype=offsets.dtype) - middle
        hats = (1 - (offsets[..., None] / self.distance - knots).abs()).clamp(min=0)
        found = hats[..., 0, :]
        for axis in range(1, self.axes):
            found = (found[..., :, None] * hats[..., axis, None, :]).flatten(-2)
        return found

    def forward(
        self,
        u: Float[Tensor, "B S I"],
        points: Float[Tensor, "B S axes"],
        quadrature: Float[Tensor, "B S"],
        at: Float[Tensor, "B T axes"] | None = None,
    ) -> Float[Tensor, "B T O"]:
        """The convolution at the points, or at the places ``at``."""
        at = points if at is None else at
        rows = u.shape[:2]
        if u.dim() != 3 or u.shape[2] != self.d_in or points.shape != (*rows, self.axes) or quadrature.shape != rows:
            wanted = f"(B, S, {self.d_in}), (B, S, {self.axes}) and (B, S)"
            given = f"{tuple(u.shape)}, {tuple(points.shape)} and {tuple(quadrature.shape)}"
            raise PartError(f"u, points and quadrature have the shapes {wanted}, not {given}")
        if at.dim() != 3 or at.shape[0] != rows[0] or at.shape[2] != self.axes:
            raise PartError(f"outputs are asked for at places ({rows[0]}, T, {self.axes}), not {tuple(at.shape)}")
        phi = self.basis(at[:, :, None] - points[:, None])  # (B, T, S, knots)
        weighted = quadrature.to(u.dtype)[..., None] * u
        seen = torch.einsum("btsk,bsi->btki", phi.to(u.dtype), weighted)
        return torch.einsum("btki,kio->bto", seen, self.weight.to(seen.dtype)) + self.bias.to(seen.dtype)
