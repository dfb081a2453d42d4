"""``NoisyTopK``: the gate of the first sparsely-gated mixture, with trainable noise.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, sections 2.1 and 4, appendix A:

    c = x W_g^T    s = softplus(x W_n^T) + 1e-2    h = c + s * eps, eps ~ N(0, 1)  (training; h = c else)
    G = softmax(h over its k largest entries)

Both matrices start at zero, so that the load starts uniform. The paper's two balance losses are the parts ``importance`` and
``load``; the latter needs the noise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import Router, check_tokens, router_logits

#: Least standard deviation of the noise.
NOISE_FLOOR = 1e-2


@register("noisy_topk", paper="sparse_moe")
class NoisyTopK(Router):
    """Noisy top-k gating with balance terms of choice.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts per token; the paper uses 4, or 2 in hierarchies.
        balance: balance terms, a list of parts or one; ``[]`` or None for none.

    Initialisation: both matrices are zero.

    Side outputs: the losses of the balance terms by their names (training), metrics ``load``, ``max_violation``, ``dead``,
    ``entropy``.

    Raises:
        ValueError: k outside 1..E, a balance term twice.
    """

    offers = ("clean", "scale")

    def __init__(
        self, d_model: int, n_experts: int, k: int = 2, balance: list[Any] | Any = ("importance(0.1)", "load(0.1)")
    ) -> None:
        super().__init__(d_model, n_experts, k, balance)
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens; draws noise from the global generator while training."""
        check_tokens(x, mask, self.d_model)
        clean = noisy = router_logits(x, self.weight)
        said = {}
        if self.training:
            scale = F.softplus(router_logits(x, self.noise_weight)) + NOISE_FLOOR
            noisy = clean + scale * torch.randn_like(clean)
            said = {"clean": clean, "scale": scale}
        experts = self.choose(noisy)
        weights = noisy.gather(1, experts).softmax(1)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None], 0)
        return self.finish(Routing(weights, experts, self.n_experts, noisy, noisy.softmax(1)), mask, said)
