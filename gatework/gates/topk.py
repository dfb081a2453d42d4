"""``TopK``: the plain top-k router of sparse mixtures, with its balance terms.

Score and choice: Shazeer et al., 2017, arXiv 1701.06538, without the noise, in the form of GShard (2006.16668) and
Switch Transformers (2101.03961). Balance: the Switch loss (2101.03961, eq. 4), the router z-loss (ST-MoE, 2202.08906,
eq. 5) and the loss-free bias (Wang et al., 2024, arXiv 2408.15664):

    s = score(x W^T)    chosen = top-k of s + b    w = normalize(s over the chosen)
    after each optimizer step: b_e += bias_rate * sign(mean(count) - count_e)

Differences: the Switch loss divides by k too, so that it is ``switch`` at uniform load for every k (the public
    Mixtral code does not divide). The bias is selected on, never weighed
with, as in the paper.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import in_backward
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import Router, counts, router_logits, switch_loss, top_k, z_loss


@register("topk", paper="sparse_moe")
class TopK(Router):
    """Softmax top-k routing with Switch loss, z-loss and loss-free bias.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts per token.
        score: ``softmax`` over the experts or an independent ``sigmoid`` each.
        normalize: weights of the chosen: ``renorm`` divides them by their sum (with softmax scores this is the
            softmax over the kept logits), ``topk_softmax`` is the softmax over the kept logits, ``none`` leaves the
            scores as they are. None is ``none`` for k = 1, where the others' weight is a constant 1 that gives the
            router no gradient, and ``renorm`` else.
        switch: weight of the Switch balance loss.
        z: weight of the router z-loss.
        bias_rate: step of the loss-free balance bias (0: none; the paper uses 1e-3). The bias is a float32 buffer, in
            the ``state_dict``, moved by ``core.advance`` from the counts of all micro-batches since, and of all ranks
            where ``torch.distributed`` runs.
        jitter: while training, tokens are multiplied by uniform noise in [1 - jitter, 1 + jitter] before the router.

    Initialisation: the router's weight is normal with standard deviation 0.02; the bias is 0.

    Side outputs: losses ``switch`` and ``z`` (training), metrics ``load``, ``max_violation``, ``dead``, ``entropy``.

    Raises:
        ValueError: k outside 1..E, negative weights, jitter outside [0, 1).
    """

    bias: Tensor
    chosen: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int = 2,
        score: Literal["softmax", "sigmoid"] = "softmax",
        normalize: Literal["renorm", "topk_softmax", "none"] | None = None,
        switch: float = 1e-2,
        z: float = 1e-3,
        bias_rate: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_experts, k)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score must be 'softmax' or 'sigmoid', got {score!r}")
        if normalize not in ("renorm", "topk_softmax", "none", None):
            raise ValueError(f"normalize must be 'renorm', 'topk_softmax' or 'none', got {normalize!r}")
        if min(switch, z, bias_rate) < 0 or not 0 <= jitter < 1:
            given = f"{switch}, {z}, {bias_rate}, {jitter}"
            raise ValueError(f"switch, z and bias_rate must be at least 0 and jitter in [0, 1), got {given}")
        self.score = score
        self.normalize = normalize or ("none" if k == 1 else "renorm")
        self.switch, self.z, self.bias_rate, self.jitter = switch, z, bias_rate, jitter
        nn.init.normal_(self.weight, std=0.02)
        if bias_rate:
            self.register_buffer("bias", torch.zeros(n_experts, dtype=torch.float32))
            self.register_buffer("chosen", torch.zeros(n_experts, dtype=torch.float32))

    def extra_repr(self) -> str:
        """The sizes and the balance terms."""
        shown = f"{super().extra_repr()}, score={self.score}, normalize={self.normalize}"
        return f"{shown}, switch={self.switch}, z={self.z}, bias_rate={self.bias_rate}, jitter={self.jitter}"

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = router_logits(x, self.weight)
        probs = logits.softmax(1)
        scores = probs if self.score == "softmax" else logits.sigmoid()
        experts = top_k(scores + self.bias if self.bias_rate else scores, self.k)
        if self.normalize == "topk_softmax":
            weights = logits.gather(1, experts).softmax(1)
        else:
            weights = scores.gather(1, experts)
            if self.normalize == "renorm":
                weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        if mask is not None:
            weights = weights * mask[:, None]
        if self.score == "sigmoid":
            probs = scores / scores.sum(1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        routing = Routing(weights, experts, self.n_experts, logits, probs)
        losses = {}
        if self.training:
            if self.switch:
                losses["switch"] = self.switch * switch_loss(probs, experts, mask)
            if self.z:
                losses["z"] = self.z * z_loss(logits, mask)
        if not in_backward():
            self.losses, self.metrics = losses, self.monitor(routing, mask)
            if self.training and self.bias_rate:
                self.chosen += counts(experts, self.n_experts, mask)
        return routing

    def _apply(self, fn: Any, recurse: bool = True) -> TopK:
        # A change of the model's dtype leaves the bias as it is, in float32: its steps of 1e-3 would vanish in bfloat16.
        exact = {name: getattr(self, name) for name in ("bias", "chosen")} if self.bias_rate else {}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != torch.float32:
                setattr(self, name, before.to(after.device, torch.float32))
        return self

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Move the balance bias by the counts since the last call."""
        if not self.bias_rate:
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.chosen)
        self.bias += self.bias_rate * torch.sign(self.chosen.mean() - self.chosen)
        self.chosen.zero_()
