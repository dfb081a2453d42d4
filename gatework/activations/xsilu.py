"""xSiLU: SiLU with a trainable gating range. "Expanded Gating Ranges Improve Activation Functions" (arXiv 2405.20768).

    g(x) = sigmoid(x),      y = x ((1 + 2a) g(x) - a)
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatework.activations.base import ExpandedGate
from gatework.core.registry import register


@register("xsilu", paper="xgate")
class xSiLU(ExpandedGate):
    """SiLU with a trainable gating range (-alpha, 1 + alpha).

    The scalar ``alpha`` starts at 0, where this is exactly SiLU; one per instance, no weight decay on it.

    Source: arXiv 2405.20768; as the activation of an MLP, or of a GLU (``order=1`` for the paper's first-order form).
    """

    @staticmethod
    def curve(x: Tensor) -> Tensor:
        """The sigmoid."""
        return torch.sigmoid(x)

    @staticmethod
    def slope(x: Tensor) -> Tensor:
        """``g(x) (1 - g(x))``, written so that it does not cancel."""
        return torch.sigmoid(x) * torch.sigmoid(-x)
