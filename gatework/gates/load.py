"""``Load``: the experts' expected numbers of tokens are to be equal, a smooth estimate through the router's noise.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, appendix A. With the clean logits c, the standard
deviations s of the noise and the noisy logits h = c + s * eps of :class:`~gatework.gates.NoisyTopK`, which chooses the k largest
of h:

    P_te = Phi((c_te - threshold_te) / s_te)    Load_e = sum_t P_te    L = weight CV^2(Load)

threshold_te is the k-th largest of h_t without its entry e, and Phi the normal distribution function: P_te is the chance that
token t chooses expert e if the noise of this entry alone is drawn again. So, in expectation over the noise, the loads sum to N k.
CV^2 is that of :mod:`gatework.gates.importance`. Where all experts are chosen (k = E) there is no threshold and no loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatework.core.contracts import Balance
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import cv_squared, loss_weight, mean_over


@register("load", paper="sparse_moe")
class Load(Balance):
    """Balance term on the experts' expected tokens, for routers with noise.

    ``forward(routing, mask, clean, scale) -> loss``; 0 where all experts expect the same load. ``routing.logits`` are the noisy
    logits, ``clean`` (N, E) those without noise, ``scale`` (N, E) the noise's standard deviations.

    Args:
        weight: factor of the loss; the paper's is 0.1.

    Raises:
        ValueError: a negative weight; at the router: one that offers no ``clean`` and ``scale``.
        PartError: in ``forward``, no ``clean`` or ``scale``.
    """

    conditions = ("clean", "scale")

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = loss_weight(weight)

    def extra_repr(self) -> str:
        """The weight."""
        return f"weight={self.weight}"

    def forward(
        self,
        routing: Routing,
        mask: Bool[Tensor, "N"] | None = None,
        clean: Float[Tensor, "N E"] | None = None,
        scale: Float[Tensor, "N E"] | None = None,
    ) -> Float[Tensor, ""] | None:
        """The weighted loss; None where all experts are chosen."""
        if clean is None or scale is None or routing.logits is None:
            raise PartError("load needs the noisy logits of a routing, clean and scale: what noisy_topk gives")
        k = routing.experts.shape[1]
        if k == routing.n_experts:
            return None
        return self.weight * cv_squared(expected_load(clean, routing.logits, scale, k, mask))


def expected_load(
    clean: Float[Tensor, "N E"],
    noisy: Float[Tensor, "N E"],
    scale: Float[Tensor, "N E"],
    k: int,
    mask: Bool[Tensor, "N"] | None = None,
) -> Float[Tensor, "E"]:
    """How many of the N tokens each expert would expect if its own noise were drawn again; k < E are chosen."""
    highest = noisy.topk(k + 1, dim=1).values
    kth, next_one = highest[:, k - 1, None], highest[:, k, None]
    # Without its own entry, the k-th largest is the next one for an expert that is chosen.
    threshold = torch.where(noisy >= kth, next_one, kth)
    chance = torch.special.ndtr((clean - threshold) / scale)
    return mean_over(chance, mask) * (chance.shape[0] if mask is None else mask.sum())
