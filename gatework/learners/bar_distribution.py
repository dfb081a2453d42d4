"""``BarDistribution``: a density on the real line made of bars, as the output of a regression that knows its doubts.

Müller et al., Transformers Can Do Bayesian Inference, 2021 (ICLR 2022), arXiv 2112.10510, section 4 and appendix E ("Riemann
distribution"), in the form of the released code. With borders b_0 < ... < b_n and p = softmax(logits), one per bar:

    density(y) = p_i / (b_{i+1} - b_i)                 in the bars between the first and the last
    density(y) = p_0 2 N(b_1 - y; 0, s_0^2)            for y <= b_1, s_0 = (b_1 - b_0) / 0.6745
    density(y) = p_{n-1} 2 N(y - b_{n-1}; 0, s_n^2)    for y > b_{n-1}, s_n = (b_n - b_{n-1}) / 0.6745

The outer bars are half-normals that point outwards, half of whose mass lies within the bar and half beyond the last border, so that
every y has a density.

Difference: the released code's mean sets the two outer bars to their half-normals' means, and so does this; its mode and
quantiles treat them as plain bars, and are not offered here.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from gatework.core.contracts import Component
from gatework.core.errors import PartError
from gatework.core.registry import register

#: The median of a standard half-normal distribution.
MEDIAN = math.sqrt(2) * 0.4769362762044699


@register("bar_distribution", paper="pfn")
class BarDistribution(Component):
    """A density of bars with half-normal tails, given by one logit per bar.

    ``forward(logits (*B, bars), y (*B)) -> (*B)``, the log-densities of ``y`` in nats; its mean, negated, is the loss to train
    with. In float32 or better.

    Args:
        borders: b_0 .. b_n, strictly rising, n at least 2; ``equal_mass`` of this module finds some for samples.

    Buffers: ``borders``.

    Raises:
        ValueError: borders that are fewer than 3, not finite, or do not rise.
        PartError: another number of logits than bars, or y that are not one for each row of logits.
    """

    family = "learner"
    exact = ("borders",)
    borders: Tensor

    def __init__(self, borders: Float[Tensor, "n"]) -> None:
        super().__init__()
        if borders.dim() != 1 or len(borders) < 3 or not (borders.isfinite().all() and (borders.diff() > 0).all()):
            raise ValueError("borders are at least 3 finite numbers that rise strictly")
        self.register_buffer("borders", borders.clone())

    @property
    def bars(self) -> int:
        """Number of bars."""
        return len(self.borders) - 1

    def extra_repr(self) -> str:
        """How many bars, and their range."""
        return f"bars={self.bars}, from {float(self.borders[0]):.4g} to {float(self.borders[-1]):.4g}"

    def forward(self, logits: Float[Tensor, "*B n"], y: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Log-densities."""
        logits, borders = self._checked(logits)
        if y.shape != logits.shape[:-1]:
            raise PartError(f"each y has its own logits: for logits of {tuple(logits.shape)} not y of {tuple(y.shape)}")
        y = y.to(logits.dtype)
        widths = borders.diff()
        bar = torch.searchsorted(borders[1:-1].contiguous(), y.contiguous())
        # What lies behind a tail's inner border; 0 for the other bars, so that nothing large is squared in vain.
        left, right = (borders[1] - y).clamp(min=0), (y - borders[-2]).clamp(min=0)
        bars = -widths.log()[bar]
        bars = torch.where(bar == 0, _half_normal(left, widths[0] / MEDIAN), bars)
        bars = torch.where(bar == self.bars - 1, _half_normal(right, widths[-1] / MEDIAN), bars)
        return logits.log_softmax(-1).gather(-1, bar[..., None])[..., 0] + bars

    def mean(self, logits: Float[Tensor, "*B n"]) -> Float[Tensor, "*B"]:
        """The mean of the density: ``sum_i p_i m_i`` with the bars' middles and the half-normals' means."""
        logits, borders = self._checked(logits)
        widths = borders.diff()
        middles = borders[:-1] + widths / 2
        beyond = math.sqrt(2 / math.pi) / MEDIAN
        ends = torch.stack([borders[1] - widths[0] * beyond, borders[-2] + widths[-1] * beyond])
        return logits.softmax(-1) @ torch.cat([ends[:1], middles[1:-1], ends[1:]])

    def _checked(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        if logits.shape[-1:] != (self.bars,):
            raise PartError(f"there are {self.bars} bars, and each takes one logit, not {tuple(logits.shape)}")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, self.borders.to(logits)


def _half_normal(distance: Tensor, scale: Tensor) -> Tensor:
    """Log-density of a half-normal distribution."""
    return -0.5 * (distance / scale).square() - scale.log() + 0.5 * math.log(2 / math.pi)


def equal_mass(samples: Float[Tensor, "*N"], bars: int) -> Float[Tensor, "n"]:
    """Borders of bars that hold equally many samples each: midpoints between the sorted samples where one bar ends and the next
    begins, the outermost at the smallest and the largest. The samples that are left over after an equal division do not count.

    Raises:
        ValueError: samples that are not finite, fewer than 2 bars, fewer samples than bars, or so many equal
            samples that a bar would have no width.
    """
    if not samples.isfinite().all():
        raise ValueError("bars of equal mass take finite samples")
    count = samples.numel() // max(bars, 1)
    if bars < 2 or count < 1:
        raise ValueError(f"{samples.numel()} samples cannot be divided among {bars} bars: it takes 2 bars, and a sample for each")
    ranked = samples.flatten()[: count * bars].sort().values
    ends, starts = ranked[count - 1 :: count][:-1], ranked[count::count]
    borders = torch.cat([ranked[:1], (ends + starts) / 2, ranked[-1:]])
    if not (borders.diff() > 0).all():
        raise ValueError(f"too many samples are equal for {bars} bars of equal mass; take fewer bars")
    return borders


__all__ = ["BarDistribution", "equal_mass"]
