"""``Switch``: the balance loss of Switch Transformers, on the shares of the choices and the mean probabilities.

Fedus et al., Switch Transformers, 2021, arXiv 2101.03961, equations 4 to 6, one loss in the place of the two of Shazeer et al.
(2017, 1701.06538):

    L = weight E sum_e f_e P_e    f_e = (used slots of e) / (all used slots)    P_e = mean_t probs_te

f_e has no gradient and is counted before any capacity drops a token. The loss is ``weight`` at uniform load, for every number of
experts and of choices: f_e is divided by the slots per token too, as the public Mixtral code does not do.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from gatework.core.contracts import Balance
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import loss_weight, share_loss


@register("switch", paper="sparse_moe")
class Switch(Balance):
    """Balance term on the experts' shares of the choices and probabilities.

    ``forward(routing, mask) -> loss``; ``weight`` at uniform load.

    Args:
        weight: factor of the loss; the paper's is 1e-2.

    Raises:
        ValueError: a negative weight.
        PartError: in ``forward``, a routing without probabilities.
    """

    def __init__(self, weight: float = 1e-2) -> None:
        super().__init__()
        self.weight = loss_weight(weight)

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={self.weight}"

    def forward(self, routing: Routing, mask: Bool[Tensor, "N"] | None = None) -> Float[Tensor, ""]:
        """The weighted loss over the real tokens."""
        if routing.probs is None:
            raise PartError("switch needs the probabilities of a routing, and this gate has none")
        return self.weight * share_loss(routing.probs, routing.counts(), mask)
