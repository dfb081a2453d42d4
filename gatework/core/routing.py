"""``Routing``: the sparse token-by-expert matrix that every gate returns and every experts layer takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Routing:
    """A sparse N x E matrix in slot form: token n uses expert ``experts[n, j]`` with weight ``weights[n, j]``.

    A slot whose weight is exactly 0 is empty and costs nothing; its expert id is valid but without meaning. A token
    never names one expert in two non-empty slots.

    Attributes:
        weights: (N, k), differentiable.
        experts: (N, k) integers in [0, n_experts).
        n_experts: E.
        logits: (N, E) scores before normalisation, for losses and monitoring; None where the gate has none.
        probs: (N, E) full distribution over the experts, for losses and monitoring; None where the gate has none.
    """

    weights: Float[Tensor, "N k"]
    experts: Int[Tensor, "N k"]
    n_experts: int
    logits: Float[Tensor, "N E"] | None = None
    probs: Float[Tensor, "N E"] | None = None

    def dense(self) -> Float[Tensor, "N E"]:
        """The full (N, E) matrix of weights."""
        zeros = self.weights.new_zeros(self.weights.shape[0], self.n_experts)
        return zeros.scatter_add(1, self.experts, self.weights)

    @classmethod
    def from_dense(
        cls,
        weights: Float[Tensor, "N E"],
        logits: Float[Tensor, "N E"] | None = None,
        probs: Float[Tensor, "N E"] | None = None,
    ) -> Routing:
        """The slot form of a dense matrix with exact zeros: k is the largest number of non-zeros in a row (at least 1).

        Slots are ordered by falling weight, ties by the lower expert id. Gradients reach the non-zero entries.
        """
        used = (weights != 0).sum(1)
        k = max(int(used.max()), 1) if weights.shape[0] else 1
        # Non-zeros first, then by falling magnitude; a stable sort breaks ties by the lower id.
        order = weights.detach().abs().argsort(dim=1, descending=True, stable=True)[:, :k]
        return cls(weights.gather(1, order), order, weights.shape[1], logits, probs)

    def counts(self) -> Int[Tensor, "E"]:
        """How many tokens each expert serves (non-empty slots)."""
        used = (self.weights != 0).reshape(-1)
        zeros = torch.zeros(self.n_experts, dtype=torch.long, device=self.experts.device)
        return zeros.scatter_add(0, self.experts.reshape(-1), used.long())
