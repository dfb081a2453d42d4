"""GoLU, the Gompertz linear unit. "Gompertz Linear Units: Leveraging Asymmetry for Enhanced Learning Dynamics" (arXiv 2502.03654).

    y = x G(x),      G(x) = exp(-exp(-x)),      dy/dx = G(x) + x exp(-x - exp(-x))

The gate is asymmetric: ``G(x) + G(-x) != 1``. ``y(0) = 0``, ``y'(0) = 1/e``; the only minimum is -0.097260 at x = -0.567143.

The derivative is written out. Differentiating the composition gives ``0 * inf = nan`` below -88 in float32 (and sooner in float16).
Below -8 the gate is 0 to the last bit even in float64 (``exp(-exp(8))`` underflows), so ``exp`` is taken of ``max(x, -8)``
and nothing overflows, however often it is differentiated.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatework.activations.base import SelfGated, gated, self_gated
from gatework.core.registry import register


@register("golu", paper="golu")
class GoLU(SelfGated):
    """x * exp(-exp(-x)), gated by the asymmetric Gompertz curve.

    No parameters; the same in training and evaluation. Keeps ``x`` alone for the backward pass, computes half precisions in
    float32, and can be differentiated any number of times.

    Source: arXiv 2502.03654, with alpha = beta = gamma = 1 as in the paper's experiments.
    """

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return self_gated(x, _gompertz, _slope)

    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The Gompertz curve ``exp(-exp(-x))``."""
        return gated(x, _gompertz, _slope)


def _gompertz(x: Tensor) -> Tensor:
    return torch.exp(-torch.exp(-x.clamp(min=-8)))


def _slope(x: Tensor) -> Tensor:
    negative = -x.clamp(min=-8)
    return torch.exp(negative - torch.exp(negative))
