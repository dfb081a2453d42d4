"""``ZLoss``: keeps the router's logits small, so that their exponentials stay exact.

Zoph et al., ST-MoE: Designing Stable and Transferable Sparse Expert Models, 2022, arXiv 2202.08906, equation 5:

    L = weight mean_t (log sum_e exp(logits_te))^2

It says nothing about the balance of the experts; it stands among the balance terms because it is used with them, in routers of
Shazeer et al. (2017, 1701.06538). Adding a constant to all logits changes no softmax routing, and this loss alone.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from gatework.core.contracts import Balance
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import loss_weight, z_loss


@register("z_loss", paper="sparse_moe")
class ZLoss(Balance):
    """Squared log-partition of the router's logits.

    ``forward(routing, mask) -> loss``.

    Args:
        weight: factor of the loss; the paper's is 1e-3.

    Raises:
        ValueError: a negative weight.
        PartError: in ``forward``, a routing without logits.
    """

    def __init__(self, weight: float = 1e-3) -> None:
        super().__init__()
        self.weight = loss_weight(weight)

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={self.weight}"

    def forward(self, routing: Routing, mask: Bool[Tensor, "N"] | None = None) -> Float[Tensor, ""]:
        """The weighted loss over the real tokens."""
        if routing.logits is None:
            raise PartError("z_loss needs the logits of a routing, and this gate has none")
        return self.weight * z_loss(routing.logits, mask)
