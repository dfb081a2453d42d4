"""Gated linear units as feed-forwards: SwiGLU, GEGLU, ReGLU, GLU. Shazeer 2020 (arXiv 2002.05202), equations 5 and 6.

    y = down(act(gate(x)) * up(x))

Named by the activation: ``silu`` is SwiGLU, ``gelu`` GEGLU, ``relu`` ReGLU, ``sigmoid`` the GLU of Dauphin et al. 2016
(arXiv 1612.08083).

Huang 2024 (arXiv 2405.20768) tells two orders apart for a self-gated activation ``act(v) = v * g(v)``. Order 2 is the
form above, ``up * v * g(v)``. Order 1 leaves out the factor ``v``: ``up * g(v)``, so that ``glu(activation=xsilu, order=1)``
is a GLU with an expanded gate.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import FeedForward
from gatework.core.registry import build, register
from gatework.feedforward.base import hidden_width


@register("glu")
class GLU(FeedForward):
    """Gated linear unit: SwiGLU by default, GEGLU, ReGLU, GLU by activation.

    ``y = down(activation(gate(x)) * up(x))``; with ``order=1`` the activation's own gate alone multiplies ``up(x)``.

    Args:
        d_model: width D of the input and the output.
        d_ff: hidden width H; None is ``8/3 * d_model`` rounded up to a multiple of 8, which has about the parameters of
            an MLP with ``4 * d_model``.
        activation: any activation part: ``silu`` (SwiGLU), ``gelu`` (GEGLU), ``relu`` (ReGLU), ``sigmoid`` (GLU), ...
        bias: whether the three linear layers have a bias.
        order: 2 multiplies by ``activation(gate(x))``, 1 by ``activation.gate(gate(x))`` (self-gated activations only).

    Initialisation: that of ``nn.Linear`` (uniform within ``1 / sqrt(inputs)``).

    Raises:
        ValueError: if a width is below 1, or ``order=1`` with an activation that is not self-gated.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        activation: Any = "silu",
        bias: bool = False,
        order: Literal[1, 2] = 2,
    ) -> None:
        super().__init__()
        d_ff = hidden_width(d_model, d_ff, factor=8 / 3, multiple=8)
        self.activation = build(activation, "activation")
        if order == 1 and not hasattr(self.activation, "gate"):
            name = type(self.activation).__name__
            raise ValueError(f"order=1 needs a self-gated activation such as silu; {name} has no gate of its own")
        self.order = order
        self.gate = nn.Linear(d_model, d_ff, bias=bias)
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def extra_repr(self) -> str:
        """The settings."""
        return f"order={self.order}"

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Transform every token; ``mask`` changes nothing, tokens do not meet here."""
        act = self.activation.gate if self.order == 1 else self.activation
        y: Tensor = self.down(act(self.gate(x)) * self.up(x))
        return y
