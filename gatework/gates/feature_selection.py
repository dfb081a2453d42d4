"""``FeatureSelection``: one sigmoid gate per channel, independent of the input.

Roffo et al., Hard-Attention Gates with Gradient Routing for Endoscopic Image Computing, 2024 (MICCAI), arXiv 2407.04400:

    y = f(x) * sigmoid(w)    one w per channel of f, the same for all examples and positions

In a Transformer behind attention and feed-forward, on both branches (``x + branch(x) * sigmoid(w)``); in a convolutional network
behind each stage and on the features of the classifier. The channels are independent: nothing normalises the gates. The paper
trains them by gradient routing, the learner ``gradient_routing``.

Ours: ``scale``, and the hard mode ``threshold``: a sigmoid is never exactly 0, whatever the title says.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import ChannelGate, in_backward
from gatework.core.registry import register


@register("feature_selection", paper="fsg_gr")
class FeatureSelection(ChannelGate):
    """One learnt sigmoid gate per channel, for all inputs alike.

    ``forward(x (..., d_model)) -> x * scale * sigmoid(w)``.

    Args:
        d_model: number of channels.
        scale: factor of all gates; 2 lets a trained model start where it was, since the gates start at about a half.
        threshold: in evaluation, gates with ``sigmoid(w)`` below it are 0; :func:`gatework.gates.compact` removes those channels.

    Initialisation: w is Xavier-normal for a (1, d_model) matrix: standard deviation ``sqrt(2 / (1 + d_model))``.

    Side outputs: metric ``gate``, the mean gate.

    Raises:
        ValueError: d_model below 1, a scale that is not positive, a threshold outside [0, 1).
    """

    def __init__(self, d_model: int, scale: float = 1.0, threshold: float = 0.0) -> None:
        super().__init__()
        if d_model < 1 or scale <= 0 or not 0 <= threshold < 1:
            given = f"{d_model}, {scale}, {threshold}"
            raise ValueError(f"d_model must be at least 1, scale positive and threshold in [0, 1), got {given}")
        self.scale, self.threshold = scale, threshold
        self.weight = nn.Parameter(torch.empty(d_model))
        nn.init.normal_(self.weight, std=(2 / (1 + d_model)) ** 0.5)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={len(self.weight)}, scale={self.scale}, threshold={self.threshold}"

    def values(self) -> Float[Tensor, "D"]:
        """The gates that evaluation multiplies with."""
        gates = self.weight.sigmoid()
        return self.scale * torch.where(gates < self.threshold, 0, gates)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Scale every channel."""
        gates = self.scale * self.weight.sigmoid() if self.training else self.values()
        if not in_backward():
            self.metrics = {"gate": gates.detach().mean()}
        return x * gates.to(x.dtype)
