"""``Importance``: the experts' total weights are to be equal.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, section 4, equations 6 and 7:

    I_e = sum_t G_te    L = weight CV^2(I)    CV^2(v) = Var(v) / (Mean(v)^2 + 1e-10), with the population variance

G is the routing's (N, E) matrix of weights. Equal importances do not mean equal numbers of tokens: one expert may get a few
large weights and another many small ones, which is what ``load`` looks at.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from gatework.core.contracts import Balance
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import cv_squared, loss_weight


@register("importance", paper="sparse_moe")
class Importance(Balance):
    """Balance term on the experts' summed weights.

    ``forward(routing, mask) -> loss``; 0 where all experts have the same importance.

    Args:
        weight: factor of the loss; the paper's is 0.1.

    Raises:
        ValueError: a negative weight.
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = loss_weight(weight)

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={self.weight}"

    def forward(self, routing: Routing, mask: Bool[Tensor, "N"] | None = None) -> Float[Tensor, ""]:
        """The weighted loss; padding has weights of 0 already."""
        return self.weight * cv_squared(routing.dense().sum(0))
