"""``KMeansLstsqGateUpdate``: the gate over environments is set by clustering their contexts, not by gradient.

Nzoyem et al., Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via Mixture of
Experts, 2025, arXiv 2502.05335, as in the official code (ddrous/MixER). A step takes some inner steps on the contexts, then
some on everything else, both with a proximal term beta/2 mean (p - p_0)^2 to where the parameters stood before, and every so
many of them sets the gate anew:

    1. L (environments, E): the loss of every expert on every environment, without gradient
    2. k-means on the contexts, E clusters: nearest by the mean absolute difference, centroids are means; from the last
       update's centroids (at first uniform in +-1e-3), at most 20 times, until they move by less than 1e-4
    3. cluster by expert: the median of L over the cluster's environments
    4. cluster after cluster takes, of the experts that are left, the one of lowest loss
    5. W = least squares of [c + 1e-4 noise; 1] W = one-hot(expert of the environment's cluster)

If a cluster is empty or k-means does not converge, W stays as it is and the centroids are forgotten.

Differences: one optimizer moves all (the code has one for the contexts); every environment of the batch enters the loss (the
code's experiments draw those nearest to a random one); update_gate_every counts through the run; an environment that the
batch lacks enters no median; k-means that converges at its last try counts as converged.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import advance, losses
from gatework.core.registry import register
from gatework.learners.base import Batch, Learner, Loss

ITERATIONS, TOLERANCE = 20, 1e-4
#: Of the first centroids and of the noise on the contexts.
START, NOISE = 1e-3, 1e-4


def cluster(
    points: Float[Tensor, "M d"], centroids: Float[Tensor, "K d"]
) -> tuple[Int[Tensor, "M"], Float[Tensor, "K d"]] | None:
    """k-means by the mean absolute difference, with means as centroids: each point's cluster and the centroids; None where a
    cluster becomes empty or the centroids do not come to rest. Of equally near centroids the first is taken."""
    for _ in range(ITERATIONS):
        distance = (points[:, None] - centroids).abs().mean(2)
        nearest = distance.argmin(1)
        members = nn.functional.one_hot(nearest, len(centroids)).to(points.dtype)
        counts = members.sum(0)
        if not counts.all():
            return None
        moved = members.t() @ points / counts[:, None]
        rest = (moved - centroids).abs().max() < TOLERANCE
        centroids = moved
        if rest:
            return nearest, centroids
    return None


def assign(table: Float[Tensor, "K K"], method: Literal["greedy", "hungarian"]) -> list[int]:
    """For each cluster (row) an expert (column) of its own: greedily by row, or with the least sum."""
    if method == "hungarian":
        from scipy.optimize import linear_sum_assignment

        return [int(e) for e in linear_sum_assignment(table.numpy())[1]]
    chosen: list[int] = []
    for row in table.tolist():
        chosen.append(min((e for e in range(len(row)) if e not in chosen), key=lambda e: row[e]))
    return chosen


@register("mixer_kmeans", paper="mixer_moe")
class KMeansLstsqGateUpdate(Learner):
    """Contexts and experts in turn, and a gate by k-means and least squares.

    ``step`` takes ``context_steps + expert_steps`` steps of the optimizer on its batch, and one of the schedule. An update of
    the gate costs E forward passes over the batch. The rule wants every environment in every batch, or nearly.

    Args:
        model: has a ``MixERLayer`` without a gate of its own as ``mixer`` and ``environment(x)``, the numbers of the rows'
            environments, as :class:`gatework.models.EnvironmentNetwork` has.
        loss_fn: ``loss_fn(model(x), y)`` -> scalar mean loss over rows.
        optimizer: over the model's parameters, the contexts among them.
        schedule: stepped once per ``step``.
        total_steps: length of the run, for the schedules inside parts.
        clip_norm: clip the gradient norm to this in every inner step; None does not clip.
        context_steps, expert_steps: inner steps of each kind (the paper's experiments: 12).
        proximal: beta, on the mean over all parameters of a kind; without effect in the first inner step of each kind.
        update_gate_every: inner steps, of both kinds together, from one update of the gate to the next; the run's first has one.
        assignment: how clusters get their experts: ``greedy`` as above, or ``hungarian``, the assignment of least total loss
            (ours; needs scipy).

    Raises:
        ValueError: if the model lacks what the rule needs, or has a gate that learns by gradient; counts below 1, a negative
            ``proximal``.
    """

    requires = frozenset({"mixer", "environment"})

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
        context_steps: int = 1,
        expert_steps: int = 1,
        proximal: float = 10.0,
        update_gate_every: int = 1,
        assignment: Literal["greedy", "hungarian"] = "greedy",
    ) -> None:
        super().__init__(model, loss_fn, optimizer, schedule, total_steps, clip_norm)
        if min(context_steps, expert_steps, update_gate_every) < 1 or proximal < 0:
            given = f"{context_steps}, {expert_steps}, {update_gate_every} and {proximal}"
            raise ValueError(f"context_steps, expert_steps and update_gate_every must be at least 1 and proximal 0, got {given}")
        if assignment not in ("greedy", "hungarian"):
            raise ValueError(f"assignment is greedy or hungarian, got {assignment!r}")
        mixer: Any = model.mixer
        if getattr(mixer, "gate", None) is not None:
            raise ValueError(f"this model's {type(mixer.gate).__name__} learns by gradient; build it without a gate")
        self.context_steps, self.expert_steps, self.proximal = context_steps, expert_steps, proximal
        self.update_gate_every, self.assignment = update_gate_every, assignment
        self.centroids: Tensor | None = None
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.mixer = mixer
        own: nn.Parameter = mixer.contexts
        rest = [p for p in model.parameters() if p is not own and p.requires_grad]
        self.groups: tuple[list[nn.Parameter], list[nn.Parameter]] = [own], rest

    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` with the gradient of the objective, contexts and all else.

        Returns:
            Detached: ``loss`` (the task's) and each part's losses by path.
        """
        return self._estimate(batch, [p for group in self.groups for p in group])

    def _estimate(self, batch: Batch, wanted: list[nn.Parameter]) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        x, y = batch
        parts = {"loss": self.loss_fn(self.model(x), y)} | losses(self.model)
        torch.stack(list(parts.values())).sum().backward(inputs=wanted)
        return {name: value.detach() for name, value in parts.items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Inner steps on the contexts, inner steps on all else, the gate after them; returns the losses before the first."""
        first: dict[str, Tensor] = {}
        done = self.steps * (self.context_steps + self.expert_steps)
        for group, count in zip(self.groups, (self.context_steps, self.expert_steps), strict=True):
            anchors = [p.detach().clone() for p in group] if count > 1 else []
            pull = self.proximal / sum(p.numel() for p in group)
            for inner in range(count):
                values = self._estimate(batch, group)
                first = first or values
                if inner:
                    for p, anchor in zip(group, anchors, strict=True):
                        if p.grad is not None:
                            p.grad.add_(p.detach() - anchor, alpha=pull)
                self.clip()
                self.optimizer.step()
                if done % self.update_gate_every == 0:
                    self.update_gate(batch)
                done += 1
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1
        advance(self.model, self.steps, self.total_steps)
        return first

    def loss_table(self, batch: Batch) -> Float[Tensor, "n E"]:
        """L: the loss of every expert on every environment; NaN for environments that the batch lacks."""
        x, y = batch
        numbers = self.model.environment(x)  # type: ignore[operator]
        table = torch.full((len(self.mixer.contexts), len(self.mixer.experts)), torch.nan, dtype=torch.float64)
        present, counts = numbers.unique(return_counts=True)
        order, pieces = numbers.argsort(stable=True), counts.tolist()
        targets = y[order].split(pieces)
        for e in range(table.shape[1]):
            with self.mixer.only(e):
                outputs = self.predict(x)[order].split(pieces)
            found = [self.loss_fn(output, target) for output, target in zip(outputs, targets, strict=True)]
            table[present.cpu(), e] = torch.stack(found).cpu().double()
        return table

    @torch.no_grad()
    def update_gate(self, batch: Batch) -> bool:
        """Set the gate by the losses on a batch; whether it was set."""
        contexts = self.mixer.contexts.detach().cpu().double()
        n_experts = len(self.mixer.experts)
        if self.centroids is None:
            drawn = torch.rand(n_experts, contexts.shape[1], dtype=torch.float64, generator=self.generator)
            self.centroids = START * (2 * drawn - 1)
        noise = NOISE * torch.randn(contexts.shape, dtype=torch.float64, generator=self.generator)
        found = cluster(contexts, self.centroids)
        if found is None:
            self.centroids = None
            return False
        clusters, self.centroids = found
        table = self.loss_table(batch)
        by_cluster = torch.stack([table[clusters == j].nanquantile(0.5, 0) for j in range(n_experts)])
        if by_cluster.isnan().any():  # All of a cluster's environments are missing.
            return False
        expert = torch.tensor(assign(by_cluster, self.assignment))[clusters]
        targets = nn.functional.one_hot(expert, n_experts).double()
        inputs = torch.cat([contexts + noise, contexts.new_ones(len(contexts), 1)], 1)
        # By singular values: with fewer environments than unknowns the solution of least norm.
        weight = torch.linalg.lstsq(inputs, targets, driver="gelsd").solution
        self.mixer.weight.copy_(weight)
        return True

    def state_dict(self) -> dict[str, Any]:
        """All that the rule keeps, the centroids and the random numbers' state with it."""
        return super().state_dict() | {"centroids": self.centroids, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: if it was taken with a schedule and this learner has none, or the other way round.
        """
        super().load_state_dict(state)
        self.centroids = state["centroids"]
        self.generator.set_state(state["generator"].cpu())


__all__ = ["KMeansLstsqGateUpdate", "assign", "cluster"]
