"""``AdaBelief``: step sizes by the belief in the observed gradient.

AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed Gradients (Zhuang et al., NeurIPS 2020, arXiv
2010.07468), algorithm 2, with the rectification of RAdam (Liu et al., 2019, arXiv 1908.03265) that the authors' package
uses. With t the parameter's own step count from 1, c1 = 1 - beta1^t and c2 = 1 - beta2^t:

    m = beta1 m + (1 - beta1) g
    s = beta2 s + (1 - beta2) (g - m)^2 + eps            (the new m; eps is stored and adds up to eps / (1 - beta2))
    plain:      x = x - lr / c1 * m / (sqrt(s / c2) + eps)
    rectified:  n_inf = 2 / (1 - beta2) - 1,  n = n_inf - 2 t beta2^t / c2
        n >= 5: x = x - lr r / c1 * m / (sqrt(s) + eps),  r^2 = c2 (n - 4)(n - 2) n_inf / ((n_inf - 4)(n_inf - 2) n)
        else:   x = x - lr / c1 * m                      (``degenerated_to_sgd``), or no step

``amsgrad`` puts the running maximum of s in the place of s. Decay comes first: x = (1 - lr wd) x (decoupled), x =
(1 - wd) x (fixed), or g = g + wd x (l2).

Differences to the authors' code (adabelief_pytorch 0.2.0): every option is per group and in the ``state_dict`` (there
``rectify`` and the kind of decay are attributes); ``amsgrad`` also works when rectified (there the maximum is kept but
not used); l2 decay leaves ``p.grad`` as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gatework.core.registry import register
from gatework.optim.base import Optimizer, check_numbers

DECAYS = ("decoupled", "fixed", "l2")


@register("adabelief", paper="adabelief")
class AdaBelief(Optimizer):
    """Adam with the variance of the gradient around its mean in the denominator.

    The first plain step is ``lr / beta1 * sign(g)``. Under a constant gradient s decays and the steps grow up to
    ``eps``. Rectified, the first steps (five at ``beta2`` = 0.999) are those of SGD with momentum at rate ``lr``, until
    the variance can be estimated. The defaults are the authors' package's; the paper's experiments have ``eps=1e-8,
    rectify=False, decay="l2"``.

    Memory: two numbers per parameter, three with ``amsgrad``.

    Args:
        params: parameters or groups; each group may have its own hyper-parameters.
        lr: learning rate.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to s at each step and to its root.
        weight_decay: strength of the decay.
        decay: "decoupled" multiplies by ``1 - lr weight_decay``, "fixed" by ``1 - weight_decay`` whatever ``lr`` is,
            "l2" adds ``weight_decay x`` to the gradient.
        rectify: rectified step size.
        degenerated_to_sgd: while a rectified step size cannot be had, step as SGD with momentum; False does not step.
        amsgrad: divide by the root of the largest s so far.
        foreach: multi-tensor step; False is the plain loop, with the same numbers.

    Raises:
        ValueError: for hyper-parameters outside their range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        decay: Literal["decoupled", "fixed", "l2"] = "decoupled",
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        amsgrad: bool = False,
        foreach: bool = True,
    ) -> None:
        options = {"decay": decay, "rectify": rectify, "degenerated_to_sgd": degenerated_to_sgd, "amsgrad": amsgrad}
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, numbers | options | {"foreach": foreach})

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse hyper-parameters outside their range."""
        check_numbers(group, lr=(0.0, math.inf), betas=(0.0, 1.0), eps=(0.0, math.inf), weight_decay=(0.0, math.inf))
        if len(group["betas"]) != 2:
            raise ValueError(f"betas are two numbers, got {group['betas']}")
        if group["decay"] not in DECAYS:
            raise ValueError(f"decay is one of {', '.join(DECAYS)}, got {group['decay']!r}")

    def init_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Mean ``exp_avg``, variance ``exp_avg_var`` and, with ``amsgrad``, its maximum: all 0."""
        names = ("exp_avg", "exp_avg_var") + (("max_exp_avg_var",) if group["amsgrad"] else ())
        return {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Mapping[str, Any]
    ) -> None:
        """The equations at the head of this module."""
        lr, (beta1, beta2), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        m, s = state["exp_avg"], state["exp_avg_var"]
        c1, c2 = 1 - beta1**step, 1 - beta2**step

        if decay and group["decay"] == "l2":
            grads = list(torch._foreach_add(grads, params, alpha=decay))
        elif decay:
            torch._foreach_mul_(params, 1 - (decay if group["decay"] == "fixed" else lr * decay))

        torch._foreach_lerp_(m, grads, 1 - beta1)
        residual = torch._foreach_sub(grads, m)
        torch._foreach_mul_(s, beta2)
        torch._foreach_addcmul_(s, residual, residual, 1 - beta2)
        torch._foreach_add_(s, eps)
        if group["amsgrad"]:
            torch._foreach_maximum_(state["max_exp_avg_var"], s)
            s = state["max_exp_avg_var"]

        if not group["rectify"]:
            # m / (sqrt(s / c2) + eps), with sqrt(c2) multiplied out.
            rate, floor = lr / c1 * math.sqrt(c2), eps * math.sqrt(c2)
        else:
            r = rectification(beta2, step)
            if r is None:
                if group["degenerated_to_sgd"]:
                    torch._foreach_add_(params, m, alpha=-lr / c1)
                return
            rate, floor = lr / c1 * r, eps
        root = torch._foreach_sqrt(s)
        torch._foreach_add_(root, floor)
        torch._foreach_addcdiv_(params, m, root, -rate)


def rectification(beta2: float, step: int) -> float | None:
    """The factor r of the rectified step, which holds the root of the bias correction; None while n < 5."""
    c2 = 1 - beta2**step
    n_inf = 2 / (1 - beta2) - 1
    n = n_inf - 2 * step * beta2**step / c2
    if n < 5:
        return None
    return math.sqrt(c2 * (n - 4) / (n_inf - 4) * (n - 2) / (n_inf - 2) * n_inf / n)
