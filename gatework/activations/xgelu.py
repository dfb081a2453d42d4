"""xGELU: GELU with a trainable gating range. "Expanded Gating Ranges Improve Activation Functions" (arXiv 2405.20768).

    g(x) = Phi(x), the standard normal distribution function,      y = x ((1 + 2a) g(x) - a)

The tail of ``Phi`` is taken from ``erfc``, which does not cancel for negative x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatework.activations.base import ExpandedGate
from gatework.core.registry import register


@register("xgelu", paper="xgate")
class xGELU(ExpandedGate):
    """GELU with a trainable gating range (-alpha, 1 + alpha).

    The scalar ``alpha`` starts at 0, where this is exactly GELU; one per instance, no weight decay on it.

    Source: arXiv 2405.20768; as the activation of an MLP, or of a GLU (``order=1`` for the paper's first-order form).
    """

    @staticmethod
    def curve(x: Tensor) -> Tensor:
        """The normal distribution function."""
        return torch.erfc(x * -math.sqrt(0.5)) * 0.5

    @staticmethod
    def slope(x: Tensor) -> Tensor:
        """The normal density."""
        return torch.exp(x.square() * -0.5) * (1 / math.sqrt(2 * math.pi))
