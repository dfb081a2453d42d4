"""What smooth gates share: weights that start dense, get exact zeros as they train, and are a sum over k selectors.

Gradients reach every expert's weight at the start, and what ``Routing.from_dense`` leaves out later costs nothing.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatework.core.contracts import Gate, in_backward
from gatework.core.routing import Routing
from gatework.gates.base import check_sizes, check_tokens, mean_over, monitor, normalized


def sparse_routing(
    weights: Float[Tensor, "N E"],
    mask: Bool[Tensor, "N"] | None,
    logits: Float[Tensor, "N E"] | None = None,
    probs: Float[Tensor, "N E"] | None = None,
) -> Routing:
    """The routing of dense weights with exact zeros; padding gets none.

    The number of slots is the largest number of experts that a token uses, which is data. A compiled graph cannot have it, and
    gets one slot for each expert: the same matrix.
    """
    if mask is not None:
        weights = weights.masked_fill(~mask[:, None], 0)
    if torch.compiler.is_compiling():
        experts = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
        return Routing(weights, experts, weights.shape[1], logits, probs)
    return Routing.from_dense(weights, logits, probs)


def sparse_metrics(routing: Routing, mask: Bool[Tensor, "N"] | None, training: bool) -> dict[str, Tensor]:
    """:func:`gatework.gates.base.monitor`, and ``chosen``: the mean number of experts that a real token uses."""
    found = monitor(routing, mask, training)
    if found:
        found["chosen"] = mean_over((routing.weights.detach() != 0).sum(1).to(routing.weights.dtype), mask)
    return found


def entropy(probs: Float[Tensor, "*B k E"], eps: float) -> Float[Tensor, "*B"]:
    """``sum_j sum_e -p log(p + eps)`` over selectors and experts."""
    return -(probs * (probs + eps).log()).sum((-2, -1))


class SmoothGate(Gate):
    """A gate whose weights are the sum of k selectors' weights, each of which comes to choose one expert."""

    def __init__(self, d_model: int, n_experts: int, k: int, gamma: float, entropy: float) -> None:
        super().__init__()
        if n_experts < 2:
            raise ValueError(f"a smooth gate chooses among at least 2 experts, got {n_experts}")
        check_sizes(d_model, n_experts, k)
        if not gamma > 0 or not entropy >= 0:
            raise ValueError(f"gamma must be positive and entropy at least 0, got {gamma} and {entropy}")
        # Not called k: a token uses up to E experts until the selectors have decided.
        self.d_model, self.n_experts, self.selectors, self.gamma, self.entropy = d_model, n_experts, k, gamma, entropy

    def extra_repr(self) -> str:
        """The sizes and the settings of the selectors."""
        shown = f"d_model={self.d_model}, n_experts={self.n_experts}, k={self.selectors}"
        return f"{shown}, gamma={self.gamma}, entropy={self.entropy}"

    @abstractmethod
    def select(
        self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None
    ) -> tuple[Float[Tensor, "N k E"], dict[str, Tensor]]:
        """Each selector's weights, whose sum over the selectors is the gate's, and the losses (none outside training)."""

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""
        check_tokens(x, mask, self.d_model)
        selected, losses = self.select(x, mask)
        weights = selected.sum(1)
        routing = sparse_routing(weights, mask, probs=normalized(weights))
        if not in_backward():
            self.losses, self.metrics = losses, sparse_metrics(routing, mask, self.training)
        return routing
