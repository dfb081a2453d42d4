"""Sigmoid: ``y = 1 / (1 + exp(-x))``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from gatework.core.contracts import Activation
from gatework.core.registry import register


@register("sigmoid")
class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return torch.sigmoid(x)
