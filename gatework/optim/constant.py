"""``Constant``: the learning rate as it was given."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from gatework.core.registry import register
from gatework.optim.base import Schedule


@register("constant")
class Constant(Schedule):
    """The learning rate as it was given, at every step.

    Args:
        optimizer: whose learning rates stay.
        last_epoch: as in PyTorch's schedulers.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """The first learning rates."""
        return list(self.base_lrs)
