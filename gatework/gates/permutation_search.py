"""``PermutationSearch``: the local search of COMET: which expert stands where behind a gate.

Ibrahim et al., COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search, 2023, arXiv 2306.02824,
section 4. For a gate with selectors (trees) j, whose weights are g_j (N, E), and for each a matrix A_j (E, E):

    Pi_j = Sinkhorn((A_j + noise Gumbel) / tau): n times, subtract the rows' logsumexp, then the columns'; at last exp
    q = sum_j g_j Pi_j, times what makes its sum that of the gate's weights again
    loss = entropy * mean_j ( sum -Pi log(Pi + 1e-6) + sum -R log(R + 1e-6) ), R = Pi with rows divided by their sums

during the search, the first ``phase`` of the training; there tau falls from 1e-3 to 1e-7 (log-linearly) and n rises from 20 to
150 (linearly). Afterwards, and always in evaluation, Pi_j is the permutation that maximises the sum of the soft Pi_j's entries
(scipy's ``linear_sum_assignment``), and frozen: it relabels the experts, and an empty slot is still empty.

Difference: the released code takes the permutation from the last sample of the soft Pi; here it is taken from the Pi without noise,
which every rank of a distributed training finds alike.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Gate, No, capability, in_backward
from gatework.core.errors import GateworkError
from gatework.core.registry import build, register
from gatework.core.routing import Routing
from gatework.gates.base import check_tokens, normalized
from gatework.gates.smooth import SmoothGate, entropy, sparse_metrics, sparse_routing
from gatework.ops.estimators import gumbel_noise

#: Temperature and number of Sinkhorn steps at the start and at the end of the search.
TAU, STEPS = (1e-3, 1e-7), (20, 150)
#: Inside the logarithms of the entropy.
EPS = 1e-6


def sinkhorn(logits: Float[Tensor, "P E E"], steps: int) -> Float[Tensor, "P E E"]:
    """Nearly doubly stochastic matrices: columns sum to 1, rows ever more nearly."""
    for _ in range(steps):
        logits = logits - logits.logsumexp(2, keepdim=True)
        logits = logits - logits.logsumexp(1, keepdim=True)
    return logits.exp()


def assignment(scores: Float[Tensor, "P E E"]) -> Int[Tensor, "P E"]:
    """For each row the column of the permutation whose entries have the largest sum."""
    matrices = scores.nan_to_num().double().cpu().numpy()  # A training that diverged says so itself.
    solve = _solver()
    return torch.stack([torch.from_numpy(solve(matrix, maximize=True)[1]) for matrix in matrices]).to(scores.device)


def _solver() -> Any:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise GateworkError('permutation_search needs scipy: pip install "gatework[bench]"') from None
    return linear_sum_assignment


@register("permutation_search", paper="comet")
class PermutationSearch(Gate):
    """A sparse gate with a learnt order of its experts.

    A tree can only choose neighbouring leaves together; which experts are neighbours is an accident of the start. The search
    makes the order of the leaves trainable for a while. During the search a token may use all experts. At its temperatures the
    gradient of A is large where two orders are about as good, and 0 elsewhere: clipping over the whole model then shortens the
    others' steps too.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        gate: part expression, class or instance of the gate, over the same experts.
        phase: share of the training that the search takes, in (0, 1].
        noise: scale of the Gumbel noise on A while searching.
        entropy: weight of the loss that sharpens the soft permutations.
        each: one permutation for each selector of a gate that has several (``comet``, ``dselect_k``); otherwise, and for all other
            gates, one for the gate.

    Initialisation: A uniform in +-0.05; the gate as its own.

    Side outputs: the gate's losses, and ``permutation`` while searching in training; metrics ``load``, ``max_violation``,
        ``dead``, ``entropy``, ``chosen`` of the permuted weights.

    Raises:
        ValueError: phase outside (0, 1], negative noise or entropy, a gate made for another number of experts.
        GateworkError: if scipy is not installed.
    """

    capabilities = Gate.capabilities | {"compiles": No("the number of Sinkhorn steps grows with the training")}
    example = {"phase": 1.0}
    exact = ("progress",)
    fades = ("logits",)

    progress: Tensor
    order: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        gate: Any = "comet",
        phase: float = 0.1,
        noise: float = 0.01,
        entropy: float = 1e-3,
        each: bool = True,
    ) -> None:
        super().__init__()
        if not 0 < phase <= 1:
            raise ValueError(f"phase is a share of the training in (0, 1], got {phase}")
        if not (noise >= 0 and entropy >= 0):
            raise ValueError(f"noise and entropy must be at least 0, got {noise} and {entropy}")
        _solver()  # Missing now rather than in the first evaluation.
        self.d_model, self.n_experts = d_model, n_experts
        self.phase, self.noise, self.entropy, self.each = phase, noise, entropy, each
        self.gate = build(gate, "gate", d_model=d_model, n_experts=n_experts)
        if getattr(self.gate, "n_experts", n_experts) != n_experts:
            raise ValueError(f"the gate is made for {self.gate.n_experts} experts, their order for {n_experts}")
        answers = {name: capability(self.gate, name) for name, own in self.capabilities.items() if own}
        self.capabilities = self.capabilities | answers
        self.conditions = self.gate.conditions  # type: ignore[misc]
        count = self.gate.selectors if each and isinstance(self.gate, SmoothGate) else 1
        self.logits = nn.Parameter(torch.empty(count, n_experts, n_experts).uniform_(-0.05, 0.05))
        self.register_buffer("progress", torch.tensor(0.0))  # Of the search; above 1 it is over.
        self.register_buffer("order", torch.arange(n_experts).repeat(count, 1))

    def extra_repr(self) -> str:
        """The sizes and the settings of the search."""
        shown = f"d_model={self.d_model}, n_experts={self.n_experts}, phase={self.phase}, noise={self.noise}"
        return f"{shown}, entropy={self.entropy}, each={self.each}"

    @property
    def k(self) -> int:
        """The most experts that a token uses after the search."""
        return int(getattr(self.gate, "k", self.n_experts))

    @property
    def searching(self) -> bool:
        """Whether the permutations are still soft in training."""
        return bool(self.progress <= 1)

    def soft(self, noise: float = 0.0) -> Float[Tensor, "P E E"]:
        """The soft permutations at the present temperature, in float32 or wider."""
        progress = min(float(self.progress), 1.0)
        logits = self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))
        if noise:
            logits = logits + noise * gumbel_noise(logits)
        tau = TAU[0] * (TAU[1] / TAU[0]) ** progress
        return sinkhorn(logits / tau, int(STEPS[0] + (STEPS[1] - STEPS[0]) * progress))

    def hard(self) -> Int[Tensor, "P E"]:
        """For each selector and each of its experts the expert that stands there."""
        return assignment(self.soft().detach()) if self.searching else self.order

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None, **conditions: Tensor) -> Routing:
        """Route N tokens; ``conditions`` go to the gate."""
        selected, losses = self._selected(x, mask, conditions)
        if self.training and self.searching:
            soft = self.soft(self.noise)
            total = selected.sum((1, 2))
            weights = torch.einsum("nji,jie->ne", selected, soft.to(selected.dtype))
            weights = normalized(weights) * total[:, None]
            if self.entropy:
                rows = soft / soft.sum(2, keepdim=True)
                losses["permutation"] = self.entropy * (entropy(soft, EPS) + entropy(rows, EPS)).mean()
        else:
            inverse = self.hard().argsort(1)
            weights = selected.gather(2, inverse.expand(len(x), -1, -1)).sum(1)
            if self.training:
                weights = weights + 0 * self.logits.sum()  # In the graph, as distributed training wants it.
        routing = sparse_routing(weights, mask, probs=normalized(weights))
        if not in_backward():
            self.losses, self.metrics = losses, sparse_metrics(routing, mask, self.training)
        return routing

    def _selected(
        self, x: Tensor, mask: Tensor | None, conditions: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "N P E"], dict[str, Tensor]]:
        if isinstance(self.gate, SmoothGate):
            check_tokens(x, mask, self.d_model)
            selected, losses = self.gate.select(x, mask)
            return (selected if self.each else selected.sum(1, keepdim=True)), dict(losses)
        return self.gate(x, mask, **conditions).dense()[:, None], {}

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Go on with the search, or end it: the permutations are then fixed."""
        if self.searching:
            self.progress.fill_(step / (self.phase * total_steps))
            if not self.searching:
                self.order.copy_(assignment(self.soft()))
