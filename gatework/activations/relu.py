"""ReLU: ``y = max(x, 0)``."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from gatework.core.contracts import Activation
from gatework.core.registry import register


@register("relu")
class ReLU(Activation):
    """max(x, 0)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return F.relu(x)
