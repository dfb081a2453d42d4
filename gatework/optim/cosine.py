"""``Cosine``: linear warm-up, then half a cosine down to a floor: the schedule of most language models."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer

from gatework.core.registry import register
from gatework.optim.base import Schedule


@register("cosine")
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to a floor.

    With W = ceil(warmup * total_steps): step t < W has factor (t + 1) / W; later
    floor + (1 - floor) (1 + cos(pi (t - W) / (total_steps - W))) / 2, and ``floor`` from ``total_steps`` on.

    Args:
        optimizer: whose learning rates are moved.
        total_steps: length of the run in optimizer steps.
        warmup: share of the run that warms up, in [0, 1).
        floor: last learning rate as a share of the highest.
        last_epoch: as in PyTorch's schedulers.

    Raises:
        ValueError: for shares outside their range or ``total_steps`` below 1.
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup: float = 0.05, floor: float = 0.1, last_epoch: int = -1
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {total_steps}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is a share of the run in [0, 1), got {warmup}")
        if not 0 <= floor <= 1:
            raise ValueError(f"floor is a share of the learning rate in [0, 1], got {floor}")
        self.total_steps, self.floor = total_steps, floor
        self.warmup_steps = math.ceil(warmup * total_steps)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the groups at the present step."""
        step = self.last_epoch
        if step < self.warmup_steps:
            factor = (step + 1) / self.warmup_steps
        else:
            done = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
            factor = self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2
        return [base * factor for base in self.base_lrs]
