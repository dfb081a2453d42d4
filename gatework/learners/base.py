"""The contract of a learning rule, and what rules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import No, advance

#: ``loss_fn(output, target)`` -> scalar mean loss.
Loss = Callable[[Tensor, Tensor], Tensor]
#: Inputs and targets.
Batch = tuple[Tensor, Tensor]


class Learner(ABC):
    """A learning rule: owns the model, a loss and an optimizer.

    ``estimate(batch)`` fills ``p.grad`` and returns the losses, detached (``{"loss": ...}`` at least);
    ``step(batch)`` is estimate, optimizer step, schedule step, ``core.advance`` and whatever else the rule updates;
    ``predict(x)`` is the rule's own inference; ``state_dict()`` holds all that it keeps, the model's parameters, the
    optimizer, the schedule and the step count included.

    A rule that estimates gradients writes :meth:`estimate` and inherits the rest.

    Args:
        model: maps the batch's input to the output; rules that work block by block need ``model.blocks`` and
            ``model.head`` (``requires``).
        loss_fn: ``loss_fn(model(x), y)`` -> scalar.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run, for the schedules inside parts.
        clip_norm: clip the gradient norm to this; None does not clip.

    Raises:
        ValueError: if ``total_steps`` is below 1, ``clip_norm`` is not positive, or the model lacks what the rule
            requires.
    """

    slot: ClassVar[str] = "learner"
    family: ClassVar[str] = "learner"
    capabilities: ClassVar[Mapping[str, bool | No]] = {"float64": True}
    requires: ClassVar[frozenset[str]] = frozenset()

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
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, got {clip_norm}")
        for name in sorted(self.requires):
            if not hasattr(model, name):
                raise ValueError(f"{type(self).__name__} needs a model with {name!r}, which {type(model).__name__} has not")
        self.model, self.loss_fn, self.optimizer, self.schedule = model, loss_fn, optimizer, schedule
        self.total_steps, self.clip_norm = total_steps, clip_norm
        self.steps = 0

    @abstractmethod
    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` (after setting it to zero) and return the losses."""

    def clip(self) -> None:
        """Clip the gradient norm over all the optimizer's parameters to ``clip_norm``, where there is one."""
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], self.clip_norm)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Estimate, clip, optimizer step, schedule step, and the parts' own schedules (``core.advance``); returns the
        losses of ``estimate``."""
        values = self.estimate(batch)
        self.clip()
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.steps += 1
        advance(self.model, self.steps, self.total_steps)
        return values

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The rule's own inference in evaluation mode; every module's mode is put back afterwards."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            return self.output(x)
        finally:
            for module in training:
                module.training = True

    def output(self, x: Tensor) -> Tensor:
        """What :meth:`predict` says, in whatever mode the model is: the model's own output."""
        out: Tensor = self.model(x)
        return out

    def state_dict(self) -> dict[str, Any]:
        """All that the rule keeps: model, optimizer, schedule and step count (tensors by reference, as in PyTorch)."""
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


__all__ = ["Batch", "Learner", "Loss"]
