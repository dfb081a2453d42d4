"""xATLU: ATLU with a trainable gating range. "Expanded Gating Ranges Improve Activation Functions" (arXiv 2405.20768).

    g(x) = (arctan(x) + pi/2) / pi,      y = x ((1 + 2a) g(x) - a)

Without expansion (alpha fixed at 0) the paper finds ATLU not competitive. As x falls, ``ATLU(x)`` tends to -1/pi, not to 0.
The gate is computed as the angle ``atan2(1, -x) / pi``, which is the same number but does not cancel for negative x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatework.activations.base import ExpandedGate
from gatework.core.registry import register


@register("xatlu", paper="xgate")
class xATLU(ExpandedGate):
    """x * arctan gate with a trainable gating range (-alpha, 1 + alpha).

    The scalar ``alpha`` starts at 0, where this is exactly ATLU; one per instance, no weight decay on it.

    Source: arXiv 2405.20768; as the activation of an MLP, or of a GLU (``order=1`` for the paper's first-order form).
    """

    @staticmethod
    def curve(x: Tensor) -> Tensor:
        """``(arctan(x) + pi/2) / pi``."""
        return torch.atan2(torch.ones_like(x), -x) * (1 / math.pi)

    @staticmethod
    def slope(x: Tensor) -> Tensor:
        """``1 / (pi (1 + x^2))``."""
        return (1 / math.pi) / (1 + x.square())
