"""The Transformer's two-layer feed-forward, ``y = W2 act(W1 x)``.

Vaswani et al. 2017 (arXiv 1706.03762), section 3.3.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import FeedForward
from gatework.core.registry import build, register
from gatework.feedforward.base import hidden_width


@register("mlp")
class MLP(FeedForward):
    """Two linear layers with an activation between them.

    ``y = down(activation(up(x)))``.

    Args:
        d_model: width D of the input and the output.
        d_ff: hidden width H; None is ``4 * d_model``.
        activation: any activation part.
        bias: whether the two linear layers have a bias.

    Initialisation: that of ``nn.Linear`` (uniform within ``1 / sqrt(inputs)``).

    Raises:
        ValueError: if a width is below 1.
    """

    def __init__(self, d_model: int, d_ff: int | None = None, activation: Any = "gelu", bias: bool = False) -> None:
        super().__init__()
        d_ff = hidden_width(d_model, d_ff, factor=4.0, multiple=1)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.activation = build(activation, "activation")
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Transform every token; ``mask`` changes nothing, tokens do not meet here."""
        y: Tensor = self.down(self.activation(self.up(x)))
        return y
