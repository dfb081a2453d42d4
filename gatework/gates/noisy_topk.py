"""``NoisyTopK``: the gate of the first sparsely-gated mixture, with trainable noise and its two balance losses.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, sections 2.1 and 4, appendix A:

    c = x W_g^T    s = softplus(x W_n^T) + 1e-2    h = c + s * eps, eps ~ N(0, 1)  (training; h = c else)
    G = softmax(h over its k largest entries)
    importance loss = w_importance CV^2(sum_t G_t)
    load loss = w_load CV^2(sum_t P_t)    P_te = Phi((c_te - threshold_te) / s_te)

threshold_te is the k-th largest of h_t without its entry e. Both matrices start at zero, so that the load starts
uniform. Where all k experts are chosen (k = E) there is no threshold and the load loss is left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import in_backward
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import Router, cv_squared, mean_over, router_logits, top_k

#: Least standard deviation of the noise.
NOISE_FLOOR = 1e-2


@register("noisy_topk", paper="sparse_moe")
class NoisyTopK(Router):
    """Noisy top-k gating with importance and load losses.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts per token; the paper uses 4, or 2 in hierarchies.
        importance: weight of the importance loss.
        load: weight of the load loss.

    Initialisation: both matrices are zero.

    Side outputs: losses ``importance`` and ``load_loss`` (training), metrics ``load``, ``max_violation``, ``dead``,
    ``entropy``.

    Raises:
        ValueError: k outside 1..E, negative weights.
    """

    def __init__(self, d_model: int, n_experts: int, k: int = 2, importance: float = 0.1, load: float = 0.1) -> None:
        super().__init__(d_model, n_experts, k)
        if min(importance, load) < 0:
            raise ValueError(f"importance and load must be at least 0, got {importance} and {load}")
        self.importance, self.load = importance, load
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))
        nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        """The sizes and the weights of the losses."""
        return f"{super().extra_repr()}, importance={self.importance}, load={self.load}"

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens; draws noise from the global generator while training."""
        clean = noisy = router_logits(x, self.weight)
        if self.training:
            scale = F.softplus(router_logits(x, self.noise_weight)) + NOISE_FLOOR
            noisy = clean + scale * torch.randn_like(clean)
        experts = top_k(noisy, self.k)
        weights = noisy.gather(1, experts).softmax(1)
        if mask is not None:
            weights = weights * mask[:, None]
        routing = Routing(weights, experts, self.n_experts, noisy, noisy.softmax(1))
        losses = {}
        if self.training:
            if self.importance:
                losses["importance"] = self.importance * cv_squared(routing.dense().sum(0))
            if self.load and self.k < self.n_experts:
                losses["load_loss"] = self.load * cv_squared(self.expected_load(clean, noisy, scale, mask))
        if not in_backward():
            self.losses, self.metrics = losses, self.monitor(routing, mask)
        return routing

    def expected_load(
        self,
        clean: Float[Tensor, "N E"],
        noisy: Float[Tensor, "N E"],
        scale: Float[Tensor, "N E"],
        mask: Bool[Tensor, "N"] | None = None,
    ) -> Float[Tensor, "E"]:
        """The smooth load: how many tokens each expert would expect if its own noise were drawn again (appendix A)."""
        highest = noisy.topk(self.k + 1, dim=1).values
        kth, next_one = highest[:, self.k - 1, None], highest[:, self.k, None]
        # Without its own entry, the k-th largest is the next one for an expert that is chosen.
        threshold = torch.where(noisy >= kth, next_one, kth)
        chance = torch.special.ndtr((clean - threshold) / scale)
        return mean_over(chance, mask) * (chance.shape[0] if mask is None else mask.sum())
