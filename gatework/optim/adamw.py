"""``AdamW``: PyTorch's own AdamW (Loshchilov and Hutter, 2017, arXiv 1711.05101), the baseline optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gatework.core.registry import register
from gatework.optim.base import Optimizer, check_numbers


@register("adamw")
class AdamW(torch.optim.AdamW, Optimizer):
    """Adam with decoupled weight decay: PyTorch's, multi-tensor.

    m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2, x = (1 - lr wd) x - lr m_hat / (sqrt(v_hat) + eps).

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, times ``lr``.
        foreach: multi-tensor step; False is the plain loop, with the same numbers.

    Raises:
        ValueError: for hyper-parameters outside their range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        foreach: bool = True,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach)

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse hyper-parameters outside their range."""
        check_numbers(group, lr=(0.0, math.inf), betas=(0.0, 1.0), eps=(0.0, math.inf), weight_decay=(0.0, math.inf))
