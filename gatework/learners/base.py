"""The contract of a learning rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from gatework.core.contracts import No

#: ``loss_fn(output, target)`` -> scalar mean loss.
Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


class Learner(ABC):
    """A learning rule: owns the model, a loss and an optimizer.

    ``estimate(batch)`` fills ``p.grad`` and returns the losses, detached (``{"loss": ...}`` at least);
    ``step(batch)`` is estimate, optimizer step, schedule step, ``core.advance`` and whatever else the rule updates;
    ``predict(x)`` is the rule's own inference; ``state_dict()`` holds all that it keeps, the model's parameters, the
    optimizer, the schedule and the step count included.

    Args:
        model: maps the batch's input to the output; rules that work block by block need ``model.blocks`` and
            ``model.head`` (``requires``).
        loss_fn: ``loss_fn(model(x), y)`` -> scalar.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run, for the schedules inside parts.
        clip_norm: clip the global gradient norm to this; None does not clip.
    """

    slot: ClassVar[str] = "learner"
    family: ClassVar[str] = "learner"
    capabilities: ClassVar[Mapping[str, bool | No]] = {"float64": True}
    requires: ClassVar[frozenset[str]] = frozenset()

    model: nn.Module

    @abstractmethod
    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` (after setting it to zero) and return the losses."""

    @abstractmethod
    def step(self, batch: Batch) -> dict[str, Tensor]:
        """One update of everything the rule owns; returns the losses of ``estimate``."""

    @abstractmethod
    def predict(self, x: Tensor) -> Tensor:
        """The rule's own inference."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that the rule keeps."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit."""


__all__ = ["Batch", "Learner", "Loss"]
