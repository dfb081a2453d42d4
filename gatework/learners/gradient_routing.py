"""``GradientRouting``: channel gates learn from a pass of their own, before the other weights.

Roffo et al., Hard-Attention Gates with Gradient Routing for Endoscopic Image Computing, 2024 (MICCAI), arXiv 2407.04400. For each
batch:

    pass 1: forward, gate loss, backward; one step of the gates alone, by an Adam of their own without weight decay
    pass 2: forward with the moved gates, loss, backward; one step of all other parameters, by the model's optimizer

Differences: gradients are set to zero before each pass, as in the paper's text; the released code does so once per batch, so that
the second step also contains the gradient of the first pass (``accumulate``). The code clips the two steps at norms 32 and 10;
here ``clip_norm`` clips each. Two passes cost about twice the compute of one: compare at equal FLOPs too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import ChannelGate, advance, losses
from gatework.core.registry import register
from gatework.learners.base import Batch, Learner, Loss


@register("gradient_routing", paper="fsg_gr")
class GradientRouting(Learner):
    """Two passes per batch: one moves the channel gates, one the rest.

    The objective of each pass is its loss plus all losses that parts leave behind (``core.losses``). The gates are the parameters
    of the model's channel gates (:func:`gatework.gates.attach` puts them in); they are taken out of the given optimizer. The first
    pass computes no other gradient than theirs, unless ``accumulate`` asks for it. Dropout draws anew in each pass, and statistics
    that parts keep over calls see each batch twice.

    Args:
        model: maps the batch's input to the output; has channel gates.
        loss_fn: ``loss_fn(model(x), y)`` -> scalar mean loss.
        optimizer: over the model's parameters; the gates leave it.
        schedule: of the optimizer, stepped once per batch; the gates' rate is constant.
        total_steps: length of the run in batches, for the schedules inside parts.
        clip_norm: clip the gradient norm of the gates in the first pass, and of the others in the second, to this; None does not
            clip.
        gate_lr: rate of the gates' Adam (in the paper twice that of the rest).
        gate_loss: the first pass's loss, where it is another one (with other class weights, say); None is ``loss_fn``.
        accumulate: keep the first pass's gradients for the second step too, as the released code does.

    Raises:
        ValueError: the model has no channel gate; ``gate_lr`` is not positive; as in :class:`gatework.learners.base.Learner`.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
        gate_lr: float = 1e-4,
        gate_loss: Loss | None = None,
        accumulate: bool = False,
    ) -> None:
        super().__init__(model, loss_fn, optimizer, schedule, total_steps, clip_norm)
        if not gate_lr > 0:
            raise ValueError(f"gate_lr must be positive, got {gate_lr}")
        found = [p for module in model.modules() if isinstance(module, ChannelGate) for p in module.parameters() if p.requires_grad]
        self.gates = list(dict.fromkeys(found))
        if not self.gates:
            raise ValueError(f"GradientRouting needs channel gates, and this {type(model).__name__} has none; attach some")
        own = set(self.gates)
        self.rest = [p for p in model.parameters() if p not in own and p.requires_grad]
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p not in own]
        self.gate_optimizer = torch.optim.Adam(self.gates, lr=gate_lr)
        self.gate_loss, self.accumulate = gate_loss, accumulate

    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` at the present weights: of the gates from the gate loss, of the others from the loss.

        Returns:
            Detached: ``loss`` (the task's), ``gate_loss`` where it is another one, and each part's losses by path.
        """
        self._zero()
        said = self._forward(batch)
        if self.gate_loss is None:
            _objective(said, "loss").backward(inputs=[*self.gates, *self.rest])
        else:
            _objective(said, "gate_loss").backward(inputs=self.gates, retain_graph=True)
            _objective(said, "loss").backward(inputs=self.rest)
        return {name: value.detach() for name, value in said.items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """The two passes with their steps, schedule step and ``core.advance``; returns the losses of the first pass."""
        self._zero()
        said = self._forward(batch)
        every = [*self.gates, *self.rest] if self.accumulate else self.gates
        _objective(said, "loss" if self.gate_loss is None else "gate_loss").backward(inputs=every)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.gates, self.clip_norm)
        self.gate_optimizer.step()
        if not self.accumulate:
            self._zero()
        _objective(self._forward(batch), "loss").backward(inputs=self.rest)
        self.clip()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1
        advance(self.model, self.steps, self.total_steps)
        return {name: value.detach() for name, value in said.items()}

    def _zero(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        x, y = batch
        output = self.model(x)
        said = {"loss": self.loss_fn(output, y)}
        if self.gate_loss is not None:
            said["gate_loss"] = self.gate_loss(output, y)
        return said | losses(self.model)

    def state_dict(self) -> dict[str, Any]:
        """All that the rule keeps, the gates' optimizer too."""
        return super().state_dict() | {"gate_optimizer": self.gate_optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: if it was taken with a schedule and this learner has none, or the other way round.
        """
        super().load_state_dict(state)
        self.gate_optimizer.load_state_dict(state["gate_optimizer"])


def _objective(said: dict[str, Tensor], loss: str) -> Tensor:
    """One of the two losses plus those of the parts."""
    total = said[loss]
    for name, value in said.items():
        if name not in ("loss", "gate_loss"):
            total = total + value
    return total
