"""``Backprop``: plain back-propagation of the model's loss, the baseline of every other learning rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import advance, losses
from gatework.core.registry import register
from gatework.learners.base import Batch, Learner, Loss


@register("backprop")
class Backprop(Learner):
    """Plain back-propagation: the loss's gradient, clipped, one optimizer step.

    The objective is ``loss_fn(model(x), y)`` plus all losses that parts leave behind (``core.losses``). ``step``
    never waits for the device: the returned losses are detached tensors.

    Args:
        model: maps the batch's input to the output.
        loss_fn: ``loss_fn(model(x), y)`` -> scalar.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run in optimizer steps, for the schedules inside parts.
        clip_norm: clip the global gradient norm to this; None does not clip.

    Raises:
        ValueError: if ``total_steps`` is below 1 or ``clip_norm`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        self.model, self.loss_fn, self.optimizer, self.schedule = model, loss_fn, optimizer, schedule
        self.total_steps, self.clip_norm = total_steps, clip_norm
        self.steps = 0

    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` with the gradient of the objective; returns ``loss`` (the task's) and each part's loss by
        path."""
        x, y = batch
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_fn(self.model(x), y)
        parts = losses(self.model)
        objective = loss
        for value in parts.values():
            objective = objective + value
        objective.backward()
        return {"loss": loss.detach()} | {name: value.detach() for name, value in parts.items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Estimate, clip, optimizer step, schedule step, and the parts' own schedules."""
        values = self.estimate(batch)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1
        advance(self.model, self.steps, self.total_steps)
        return values

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The model's output in evaluation mode; the mode is put back afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            out: Tensor = self.model(x)
            return out
        finally:
            self.model.train(training)

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, schedule and step count."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
