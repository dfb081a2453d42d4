"""Exact GELU: ``y = x * Phi(x)`` with the normal distribution function ``Phi``.

Hendrycks and Gimpel 2016 (arXiv 1606.08415).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatework.activations.base import SelfGated
from gatework.core.registry import register


@register("gelu")
class GELU(SelfGated):
    """x * Phi(x), Phi the standard normal distribution function (exact, by erf)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return F.gelu(x)

    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``Phi(x)``."""
        return torch.special.ndtr(x)
