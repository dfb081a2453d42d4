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
        loss_fn: ``loss_fn(model(x), y)`` -> scalar mean loss.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run in optimizer steps, for the schedules inside parts.
        clip_norm: clip the gradient norm over all the optimizer's parameters to this; None does not clip.
        accumulate: split each batch along its first axis into this many pieces, run one after the other, so that
            one piece's activations are kept at a time; the gradient is that of the pieces' mean losses, weighted by
            their rows (for a loss that is a mean over rows: the whole batch's).

    Raises:
        ValueError: if ``total_steps`` or ``accumulate`` is below 1 or ``clip_norm`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        self.model, self.loss_fn, self.optimizer, self.schedule = model, loss_fn, optimizer, schedule
        self.total_steps, self.clip_norm, self.accumulate = total_steps, clip_norm, accumulate
        self.steps = 0

    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` with the gradient of the objective.

        Returns:
            Detached: ``loss`` (the task's) and each part's losses by path.
        """
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        x, y = batch
        if self.accumulate == 1:
            return self._backward(x, y, 1.0)
        total: dict[str, Tensor] = {}
        for piece_x, piece_y in zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True):
            for name, value in self._backward(piece_x, piece_y, len(piece_x) / len(x)).items():
                total[name] = total[name] + value if name in total else value
        return total

    def _backward(self, x: Tensor, y: Tensor, share: float) -> dict[str, Tensor]:
        parts = {"loss": self.loss_fn(self.model(x), y)} | losses(self.model)
        if share != 1.0:
            parts = {name: value * share for name, value in parts.items()}
        objective = parts["loss"]
        for name, value in parts.items():
            if name != "loss":
                objective = objective + value
        objective.backward()
        return {name: value.detach() for name, value in parts.items()}

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Estimate, clip, optimizer step, schedule step, and the parts' own schedules (``core.advance``)."""
        values = self.estimate(batch)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip_norm)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1
        advance(self.model, self.steps, self.total_steps)
        return values

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The model's output in evaluation mode; every module's mode is put back afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            out: Tensor = self.model(x)
            return out
        finally:
            for module in training:
                module.training = True

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer, schedule and step count (tensors by reference, as in PyTorch)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: if it was taken with a schedule and this learner has none, or the other way round.
        """
        if (self.schedule is None) != (state["schedule"] is None):
            raise ValueError("the state was taken " + ("with" if self.schedule is None else "without") + " a schedule")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        self.steps = state["steps"]
