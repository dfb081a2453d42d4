"""``ExpertPlacement``: which rank holds which expert, chosen from how much work the experts had.

Huang et al., Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference, 2023, arXiv 2303.06182,
section on load balancing. Every rank holds E / W experts. ``greedy`` hands out the experts from the busiest to the idlest, each
to the rank with the least load that has a free place. ``anti_correlated`` also keeps apart what is busy in the same batches:
it takes the rank r with the smallest

    load_r + sum_{j on r} max(0, corr(A_e, A_j)) sqrt(load_e load_j)

where A_e is the expert's number of rows in each batch, load_e their mean, corr Pearson's (0 for an expert whose load never
changes). The paper gives the idea of the second; the formula is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatework.core.errors import PartError


@dataclass(frozen=True)
class ExpertPlacement:
    """The rank of each expert; every rank holds equally many.

    Counts are what :func:`gatework.experts.expert_trace.record` gives: rows of each expert, batch by batch. Ties go to the lower
    expert and the lower rank.

    Attributes:
        ranks: the rank of expert 0, 1, ...
        n_ranks: W.

    Raises:
        PartError: a number of experts that W does not divide, or ranks that hold unequally many.
    """

    ranks: tuple[int, ...]
    n_ranks: int

    def __post_init__(self) -> None:
        each = _each(len(self.ranks), self.n_ranks)
        if any(self.ranks.count(rank) != each for rank in range(self.n_ranks)):
            raise PartError(f"each of the {self.n_ranks} ranks holds {each} of the {len(self.ranks)} experts, not {self.ranks}")

    @classmethod
    def contiguous(cls, n_experts: int, n_ranks: int) -> ExpertPlacement:
        """The first E / W experts on rank 0, the next on rank 1, and so on."""
        each = _each(n_experts, n_ranks)
        return cls(tuple(expert // each for expert in range(n_experts)), n_ranks)

    @classmethod
    def greedy(cls, counts: Int[Tensor, "batches E"] | Float[Tensor, "batches E"], n_ranks: int) -> ExpertPlacement:
        """Each expert, the busiest first, to the rank with the least load that has a free place."""
        return cls._place(counts, n_ranks, torch.zeros(counts.shape[1], counts.shape[1]))

    @classmethod
    def anti_correlated(cls, counts: Int[Tensor, "batches E"] | Float[Tensor, "batches E"], n_ranks: int) -> ExpertPlacement:
        """The same, with a penalty for experts that are busy in the same batches."""
        _check(counts)
        varying = counts.double() - counts.double().mean(0)
        lengths = varying.norm(dim=0)
        correlation = (varying.T @ varying) / (lengths[:, None] * lengths).clamp(min=torch.finfo(torch.float64).tiny)
        return cls._place(counts, n_ranks, correlation.clamp(0, 1))

    @classmethod
    def _place(cls, counts: Tensor, n_ranks: int, together: Tensor) -> ExpertPlacement:
        _check(counts)
        n_experts = counts.shape[1]
        each = _each(n_experts, n_ranks)
        load = counts.double().mean(0)
        penalty = together * (load[:, None] * load).sqrt()
        held: list[list[int]] = [[] for _ in range(n_ranks)]
        for expert in load.argsort(descending=True, stable=True).tolist():
            free = [rank for rank in range(n_ranks) if len(held[rank]) < each]
            scores = [float(load[held[rank]].sum() + penalty[expert, held[rank]].sum()) for rank in free]
            held[free[scores.index(min(scores))]].append(expert)
        ranks = {expert: rank for rank, experts in enumerate(held) for expert in experts}
        return cls(tuple(ranks[expert] for expert in range(n_experts)), n_ranks)

    def experts_of(self, rank: int) -> list[int]:
        """The experts that a rank holds, in ascending order."""
        return [expert for expert, place in enumerate(self.ranks) if place == rank]

    def imbalance(self, counts: Int[Tensor, "batches E"] | Float[Tensor, "batches E"]) -> float:
        """Mean over the batches of the busiest rank's load over the mean rank's: 1 is even, W is all on one rank.

        Batches without any load do not count.

        Raises:
            PartError: counts of another number of experts.
        """
        if counts.shape[1:] != (len(self.ranks),):
            raise PartError(f"the placement is for counts (batches, {len(self.ranks)}), not {tuple(counts.shape)}")
        loads = counts.double().new_zeros(len(counts), self.n_ranks)
        loads.index_add_(1, torch.tensor(self.ranks, device=counts.device), counts.double())
        loads = loads[loads.sum(1) > 0]
        return float((loads.amax(1) / loads.mean(1)).mean()) if len(loads) else 1.0


def _check(counts: Tensor) -> None:
    if counts.dim() != 2 or not len(counts):
        raise PartError(f"experts are placed by their counts (batches, E) in at least 1 batch, not {tuple(counts.shape)}")


def _each(n_experts: int, n_ranks: int) -> int:
    if n_ranks < 1 or n_experts < 1 or n_experts % n_ranks:
        raise PartError(f"{n_experts} experts cannot be shared out evenly among {n_ranks} ranks: take a number that they divide")
    return n_experts // n_ranks


__all__ = ["ExpertPlacement"]
