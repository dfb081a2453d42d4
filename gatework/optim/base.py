"""What optimizers and schedules share: their slots, and the multi-tensor step with its plain loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import No


class Optimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` in the ``optim`` slot: ``Optimizer(params, lr=..., ..., foreach=True)``.

    Everything it keeps is in ``param_groups`` or ``state`` (nothing in Python attributes), so that ``state_dict``
    resumes bit for bit. States of bf16 and fp16 parameters are float32.
    """

    slot: ClassVar[str] = "optim"
    family: ClassVar[str] = "optim"
    capabilities: ClassVar[Mapping[str, bool | No]] = {"float64": True}


class Schedule(LRScheduler):
    """A ``torch.optim.lr_scheduler.LRScheduler`` in the ``schedule`` slot, stepped once per optimizer step."""

    slot: ClassVar[str] = "schedule"
    family: ClassVar[str] = "schedule"
    capabilities: ClassVar[Mapping[str, bool | No]] = {}
