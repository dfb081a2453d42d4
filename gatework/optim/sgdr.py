"""``SGDR``: cosine annealing with warm restarts.

SGDR: Stochastic Gradient Descent with Warm Restarts (Loshchilov and Hutter, ICLR 2017, arXiv 1608.03983), equation 5. Cycle i
= 0, 1, ... lasts T_i = t_0 t_mult^i and starts at T_0 + ... + T_{i-1} = t_0 (t_mult^i - 1) / (t_mult - 1). With T_cur the
time since the last restart, moved at every optimizer step:

    lr = lr_min + (lr_max - lr_min) (1 + cos(pi T_cur / T_i)) / 2

and lr_max is each group's own learning rate. At T_cur = T_i the schedule restarts at lr_max; the optimizer's momentum is
kept. The paper's answer at any time is the iterate at the end of the last finished cycle, not the current one.

The lengths are real numbers. For integers the rates are those of PyTorch's ``CosineAnnealingWarmRestarts``, which takes
an integer ``t_mult`` only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from gatework.core.registry import register
from gatework.optim.base import Schedule

#: A restart less than this share of a cycle ahead is taken as reached: the sum of the lengths is rounded.
_ROUNDING = 1e-9


@register("sgdr", paper="sgdr")
class SGDR(Schedule):
    """Cosine annealing with warm restarts, cycles growing by a factor.

    Give the first cycle's length ``t_0``, or the length of the run, ``total_steps``, which is then split into ``cycles``
    whole cycles so that it ends where a cycle ends.

    Args:
        optimizer: whose learning rates are moved; their values are the highest rates.
        total_steps: length of the run in optimizer steps; only used without ``t_0``.
        t_0: length of the first cycle in epochs (optimizer steps, unless ``steps_per_epoch`` is given), any positive
            number.
        t_mult: each cycle is this many times as long as the one before, any number from 1.
        cycles: how many cycles ``total_steps`` is split into.
        lr_min: lowest rate, the same for all groups.
        steps_per_epoch: optimizer steps per unit of ``t_0``.
        keep_iterate: keep a copy of the parameters as they were at the end of the last finished cycle
            (:meth:`best_iterate`); it is part of the ``state_dict``.
        last_epoch: as in PyTorch's schedulers: optimizer steps taken so far, less one at the start.

    Raises:
        ValueError: for values outside their range, or with neither ``t_0`` nor ``total_steps``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int | None = None,
        t_0: float | None = None,
        t_mult: float = 2.0,
        cycles: int = 3,
        lr_min: float = 0.0,
        steps_per_epoch: float = 1.0,
        keep_iterate: bool = False,
        last_epoch: int = -1,
    ) -> None:
        if not (t_mult >= 1 and math.isfinite(t_mult)):
            raise ValueError(f"t_mult must be at least 1, got {t_mult}")
        if not (lr_min >= 0 and math.isfinite(lr_min)):
            raise ValueError(f"lr_min must be at least 0, got {lr_min}")
        if not (steps_per_epoch > 0 and math.isfinite(steps_per_epoch)):
            raise ValueError(f"steps_per_epoch must be positive, got {steps_per_epoch}")
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {cycles}")
        if t_0 is None:
            if total_steps is None:
                raise ValueError("give t_0, the first cycle's length, or total_steps, the run's")
            if total_steps < 1:
                raise ValueError(f"total_steps must be at least 1, got {total_steps}")
            first = total_steps / sum(t_mult**i for i in range(cycles))
        elif t_0 > 0 and math.isfinite(t_0):
            first = t_0 * steps_per_epoch
        else:
            raise ValueError(f"t_0 must be positive, got {t_0}")
        self.first_cycle, self.t_mult, self.lr_min = first, t_mult, lr_min
        self.keep_iterate = keep_iterate
        self._iterate: list[Tensor] | None = None
        super().__init__(optimizer, last_epoch)

    def position(self, step: int) -> tuple[int, float, float]:
        """Where a step is: its cycle i, the optimizer steps since that cycle started, and the cycle's length in steps."""
        start, length = 0.0, self.first_cycle
        cycle = 0
        if self.t_mult == 1:
            cycle = math.floor(step / length + _ROUNDING)
            return cycle, max(step - cycle * length, 0.0), length
        while step - start >= length * (1 - _ROUNDING):
            start, length, cycle = start + length, length * self.t_mult, cycle + 1
        return cycle, max(step - start, 0.0), length

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the groups at the present step."""
        _, since, length = self.position(self.last_epoch)
        return [self.lr_min + (base - self.lr_min) * (1 + math.cos(math.pi * since / length)) / 2 for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Move on by one optimizer step; where that ends a cycle, keep the iterate if asked to."""
        super().step(epoch)
        if self.keep_iterate and self.cycle_ended:
            self._iterate = [p.detach().clone() for p in self._parameters()]

    @property
    def cycle(self) -> int:
        """The number of finished cycles, which is the index of the running one."""
        return self.position(self.last_epoch)[0]

    @property
    def cycle_ended(self) -> bool:
        """Whether the last optimizer step was the last one of a cycle: the parameters are now an answer of the method."""
        return self.last_epoch > 0 and self.cycle > self.position(self.last_epoch - 1)[0]

    def best_iterate(self) -> list[Tensor] | None:
        """The parameters at the end of the last finished cycle, in the optimizer's order; None before the first ends.

        Raises:
            ValueError: without ``keep_iterate``.
        """
        if not self.keep_iterate:
            raise ValueError("SGDR keeps iterates with keep_iterate=True only")
        return self._iterate

    @torch.no_grad()
    def load_best_iterate(self) -> None:
        """Set the parameters to :meth:`best_iterate`.

        Raises:
            ValueError: without ``keep_iterate``, or before the first cycle has ended.
        """
        best = self.best_iterate()
        if best is None:
            raise ValueError("no cycle has ended yet")
        for p, value in zip(self._parameters(), best, strict=True):
            p.copy_(value)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
