"""``LossFree``: a bias per expert on the choice instead of a loss, moved against the load.

Wang et al., Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, 2024, arXiv 2408.15664, algorithm 1, in the place
of the losses of Shazeer et al. (2017, 1701.06538):

    chosen = top-k of s + b    weights from s alone
    after each optimizer step: b_e += rate * sign(mean(count) - count_e)

count_e is the number of used slots of expert e over all real tokens of the step: of all micro-batches since the last
``core.advance``, and of all ranks where ``torch.distributed`` runs (every rank has to call ``advance``).

Where the counts live. ``DistributedDataParallel`` copies rank 0's buffers to all ranks before forward passes. For the bias, which
is equal everywhere, that changes nothing; counts that a rank has gathered since the last step would be lost. So they are a plain
tensor (``counts``), which DDP does not see. The buffer ``saved_counts`` only carries them through ``state_dict`` and
``load_state_dict``; between the two it is stale. Thus a checkpoint written between two micro-batches of one step has their counts,
those of the rank that wrote it (it has none of their gradients). What fills buffers without ``load_state_dict``, as
``from_pretrained`` of ``transformers`` does, starts a new run, with counts of 0 and the stored bias.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatework.core.contracts import Balance, in_backward
from gatework.core.registry import register
from gatework.core.routing import Routing


@register("loss_free", paper="sparse_moe")
class LossFree(Balance):
    """Balance by a bias on the choice, without a loss and without a gradient.

    ``shift(scores) -> scores + bias``; ``forward(routing, mask)`` counts and returns None. What is recomputed by activation
    checkpointing is counted once.

    Args:
        n_experts: E; the router gives it.
        rate: step of the bias; the paper's is 1e-3, for scores in [0, 1].

    Initialisation: the bias is 0. It is a float32 buffer (float64 in a float64 model, never less), no parameter: no optimizer
    and no weight decay sees it.

    Raises:
        ValueError: n_experts below 1, a negative rate.
    """

    exact = ("bias",)

    bias: Tensor
    saved_counts: Tensor

    def __init__(self, n_experts: int, rate: float = 1e-3) -> None:
        super().__init__()
        if n_experts < 1:
            raise ValueError(f"n_experts must be at least 1, got {n_experts}")
        if not rate >= 0:
            raise ValueError(f"rate must be at least 0, got {rate}")
        self.n_experts, self.rate = n_experts, rate
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("bias", torch.zeros(n_experts, dtype=dtype))
        self.register_buffer("saved_counts", torch.zeros(n_experts, dtype=torch.long))
        #: Used slots by expert since the last ``advance``, of this process.
        self.counts: Int[Tensor, "E"] = torch.zeros(n_experts, dtype=torch.long, device="cpu")

    def extra_repr(self) -> str:
        """The rate."""
        return f"n_experts={self.n_experts}, rate={self.rate}"

    def shift(self, scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Scores plus bias."""
        return scores + self.bias

    def forward(self, routing: Routing, mask: Bool[Tensor, "N"] | None = None) -> None:
        """Count the used slots; padding uses none."""
        if not in_backward():
            self._follow(routing.experts.device)
            self.counts += routing.counts()

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Move the bias by the counts since the last call."""
        self._follow(self.bias.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)
        below = self.counts.sum() - self.n_experts * self.counts  # The sign of mean - count, in whole numbers.
        self.bias += self.rate * below.sign().to(self.bias.dtype)
        self.counts.zero_()

    def _follow(self, device: torch.device) -> None:
        if self.counts.device != device:  # Not a buffer: nothing else moves it.
            self.counts = self.counts.to(device)

    def _save_to_state_dict(self, *args: Any) -> None:
        if not self.saved_counts.is_meta:
            self.saved_counts.copy_(self.counts)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}saved_counts" in state_dict and not self.saved_counts.is_meta:
            self.counts = self.saved_counts.clone()
