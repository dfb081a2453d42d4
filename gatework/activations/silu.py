"""SiLU (Swish with slope 1): ``y = x * sigmoid(x)``.

Elfwing et al. 2017 (arXiv 1702.03118), Ramachandran et al. 2017 (arXiv 1710.05941).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatework.activations.base import SelfGated
from gatework.core.registry import register


@register("silu")
class SiLU(SelfGated):
    """x * sigmoid(x)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return F.silu(x)

    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``sigmoid(x)``."""
        return torch.sigmoid(x)
