"""``MultiTask``: the multi-gate mixture of experts, for several tasks on the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import build, build_pattern
from gatework.core.routing import Routing
from gatework.ops.dispatch import dispatch


class MultiTask(nn.Module):
    """Experts that all tasks share, and for each task a gate and a linear head.

    Ma et al., Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts, KDD 2018:

        y_t = head_t( sum_e g_te(x) E_e(x) )    E(x) = W_out act(W_in x + b_in) + b_out

    An example runs each expert that some task's gate has chosen for it, once for all these tasks, and no other. A static gate
    such as ``dselect_k(static=true)`` is one choice per task; all others choose per task and example.

    Args:
        inputs: width of an example.
        outputs: for each task the number of its outputs (classes, or 1 for a regression).
        d_model: width of an expert's output.
        experts: E.
        d_ff: hidden width of an expert; None is 2 d_model.
        gate: part expression of the tasks' gates, or a pattern that is repeated along the tasks.
        activation: part expression of the experts' activation; each expert has its own.

    Initialisation: PyTorch's for all linear layers; the gates as their parts say.

    Raises:
        PartError: sizes below 1, no task, a gate that needs more than the example.

    Example:
        >>> MultiTask(inputs=6, outputs=(1, 10), gate="topk(k=1)")(torch.zeros(3, 6)).shape
        torch.Size([3, 11])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("inputs", "outputs")

    def __init__(
        self,
        inputs: int,
        outputs: Sequence[int],
        d_model: int = 32,
        experts: int = 8,
        d_ff: int | None = None,
        gate: Any = "topk(k=2)",
        activation: Any = "relu",
    ) -> None:
        super().__init__()
        d_ff = 2 * d_model if d_ff is None else d_ff
        if min(inputs, d_model, experts, d_ff, *outputs, len(outputs)) < 1:
            given = f"{inputs}, {tuple(outputs)}, {d_model}, {experts}, {d_ff}"
            raise PartError(f"inputs, outputs, d_model, experts and d_ff must be at least 1, and outputs name a task: {given}")
        self.inputs, self.outputs, self.d_model = inputs, tuple(outputs), d_model
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(inputs, d_ff), build(activation, "activation"), nn.Linear(d_ff, d_model))
            for _ in range(experts)
        )
        gates = build_pattern(gate, "gate", len(outputs), d_model=inputs, n_experts=experts)
        for made in gates:
            if made.conditions:
                raise PartError(f"{type(made).__name__} chooses by {', '.join(made.conditions)} too, which these tasks do not have")
        self.gates = nn.ModuleList(gates)
        self.heads = nn.ModuleList(nn.Linear(d_model, width) for width in outputs)

    def active_parameters(self) -> int:
        """Parameters that one example uses: all but the experts that no gate has a slot for, at most."""
        experts = sum(p.numel() for p in self.experts.parameters())
        slots = sum(int(getattr(gate, "k", len(self.experts))) for gate in self.gates)
        rest = sum(p.numel() for p in self.parameters()) - experts
        return rest + experts // len(self.experts) * min(slots, len(self.experts))

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        """The tasks' outputs side by side, in their order."""
        if x.shape[1] != self.inputs:
            raise PartError(f"this model was built for {self.inputs} inputs, not {x.shape[1]}")
        weights = torch.stack([gate(x).dense() for gate in self.gates])  # (tasks, N, E)
        chosen = Routing.from_dense((weights.detach() != 0).any(0).to(weights.dtype))
        plan = dispatch(chosen)
        segments = zip(self.experts, plan.gather(x).split(plan.counts), strict=True)
        y = torch.cat([*(expert(rows) for expert, rows in segments if len(rows)), x.new_zeros(1, self.d_model)])
        shared = y.index_select(0, plan.rows.flatten()).unflatten(0, plan.rows.shape)  # (N, k, D); an empty slot's row is 0.
        own = weights.gather(2, chosen.experts.expand(len(weights), -1, -1)).to(y.dtype)
        mixed = torch.einsum("tnk,nkd->tnd", own, shared)
        return torch.cat([head(task) for head, task in zip(self.heads, mixed, strict=True)], 1)
