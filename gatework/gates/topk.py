"""``TopK``: the plain top-k router of sparse mixtures.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, without the noise, in the form of GShard (2006.16668)
and Switch Transformers (2101.03961):

    s = score(x W^T)    chosen = top-k of s    w = normalize(s over the chosen)

The balance terms (``switch``, ``z_loss``, ``loss_free``, ``importance``) are parts of their own. A shift of the scores by
``loss_free`` decides who is chosen, never the weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import Router, check_tokens, normalized, router_logits


@register("topk", paper="sparse_moe")
class TopK(Router):
    """Softmax or sigmoid top-k routing with balance terms of choice.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts per token.
        score: ``softmax`` over the experts or an independent ``sigmoid`` each.
        normalize: weights of the chosen: ``renorm`` divides them by their sum (with softmax scores this is the
            softmax over the kept logits), ``topk_softmax`` is the softmax over the kept logits, ``none`` leaves the
            scores as they are. None is ``none`` for k = 1, where the others' weight is a constant 1 that gives the
            router no gradient, and ``renorm`` else.
        jitter: while training, tokens are multiplied by uniform noise in [1 - jitter, 1 + jitter] before the router.
        balance: balance terms, a list of parts or one; ``[]`` or None for none.

    Initialisation: the router's weight is normal with standard deviation 0.02.

    Side outputs: the losses of the balance terms by their names (training), metrics ``load``, ``max_violation``, ``dead``,
    ``entropy``.

    Raises:
        ValueError: k outside 1..E, jitter outside [0, 1), a balance term twice or one that needs noise.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int = 2,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: Literal["renorm", "topk_softmax", "none"] | None = None,
        jitter: float = 0.0,
        balance: list[Any] | Any = ("switch(0.01)", "z_loss(0.001)"),
    ) -> None:
        super().__init__(d_model, n_experts, k, balance)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score must be 'softmax' or 'sigmoid', got {score!r}")
        if normalize not in ("renorm", "topk_softmax", "none", None):
            raise ValueError(f"normalize must be 'renorm', 'topk_softmax' or 'none', got {normalize!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be in [0, 1), got {jitter}")
        self.score, self.jitter = score, jitter
        self.normalize = normalize or ("none" if k == 1 else "renorm")
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        """The sizes and settings."""
        return f"{super().extra_repr()}, score={self.score}, normalize={self.normalize}, jitter={self.jitter}"

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""
        check_tokens(x, mask, self.d_model)
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = router_logits(x, self.weight)
        probs = logits.softmax(1)
        scores = probs if self.score == "softmax" else logits.sigmoid()
        experts = self.choose(scores)
        if self.normalize == "topk_softmax":
            weights = logits.gather(1, experts).softmax(1)
        else:
            weights = scores.gather(1, experts)
            if self.normalize == "renorm":
                weights = normalized(weights)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None], 0)
        if self.score == "sigmoid":
            probs = normalized(scores)
        return self.finish(Routing(weights, experts, self.n_experts, logits, probs), mask)
