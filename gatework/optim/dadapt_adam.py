"""``DAdaptAdam``: Adam that finds its own step size.

Learning-Rate-Free Learning by D-Adaptation (Defazio and Mishchenko, ICML 2023, arXiv 2301.07733), the Adam form of the
authors' package, version 3. d is a growing lower bound of the distance from the start to the solution; all parameters
share it. With q = sqrt(beta2), e = d lr (times sqrt(1 - beta2^t) / (1 - beta1^t) with ``bias_correction``, t the
optimizer's steps from 1), and the old s, v and d on the right:

    n = q n + (1 - q) e sum <g, s / (sqrt(v) + eps)>                   (a number, over all parameters)
    m = beta1 m + e (1 - beta1) g
    v = beta2 v + (1 - beta2) g^2
    s = q s + e (1 - q) g
    d = max(d, min(n / ((1 - q) sum |s|_1), growth_rate d))            (a number, acts from the next step on)
    x = x - m / (sqrt(v) + eps)

The sums are over the groups that move: a group with lr 0 stays out of all of it. Where groups have different rates,
lr is the largest, and a group at a share r of it has r in front of its <g, .>, of its |s|_1 and of the g in its m.

Decay comes first: g = g + wd x (l2), or x = (1 - r e wd) x (decoupled).

Differences to the package (dadaptation 3.2): r is what ``layer_scale`` is there, read off the rates (there different
rates are refused); decoupled decay goes with r, and so spares groups with lr 0; l2 decay leaves ``p.grad`` as it is;
sums over tensors are exact; groups cannot have different ``betas`` (there the first group's act on all).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from gatework.core.contracts import No
from gatework.core.registry import register
from gatework.optim.base import Optimizer, check_numbers, evaluated, widened

DECAYS = ("l2", "decoupled")
#: What all groups have in common, as they share one d: settings, and the state that ``step`` moves.
SHARED, STATE = ("betas", "bias_correction", "growth_rate"), ("d", "numerator", "steps")


@register("dadapt_adam", paper="dadapt_adam")
class DAdaptAdam(Optimizer):
    """Adam that finds its own step size.

    Leave ``lr`` at 1 unless training is unstable. The first steps are about ``d0``: a run of some hundred steps spends
    a visible share of them on finding d. Give it the schedule that Adam would get; a rate of 0 pauses everything.
    ``param_groups[0]["d"]`` is the estimate, and d times ``lr`` the rate that Adam would be given. Every step waits for
    the device once.

    Memory: three numbers per parameter.

    Args:
        params: parameters or groups; each group may have its own ``lr``, ``eps``, ``weight_decay`` and ``decay``.
        lr: multiplier of the step size; in a group, relative to the largest.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the root of the second moment, positive.
        weight_decay: strength of the decay.
        decay: "l2" adds ``weight_decay x`` to the gradient, "decoupled" multiplies by ``1 - d lr weight_decay``.
        bias_correction: Adam's, as a factor of the step size.
        d0: first estimate of d, positive and below the true distance.
        growth_rate: d grows by at most this factor per step; 1.02 is a kind of warm-up.
        foreach: multi-tensor step; False is the plain loop, with the same numbers.

    Raises:
        ValueError: for hyper-parameters outside their range, and for groups that differ in what they share.
    """

    capabilities = {**Optimizer.capabilities, "separable": No("all parameters share one estimate of the step size")}
    learning_rates = (0.5, 2.0)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay: Literal["l2", "decoupled"] = "l2",
        bias_correction: bool = False,
        d0: float = 1e-6,
        growth_rate: float = math.inf,
        foreach: bool = True,
    ) -> None:
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "growth_rate": growth_rate}
        options = {"decay": decay, "bias_correction": bias_correction, "foreach": foreach}
        super().__init__(params, numbers | options | {"d": d0, "numerator": 0.0, "steps": 0})

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse hyper-parameters outside their range."""
        check_numbers(group, lr=(0.0, math.inf), betas=(0.0, 1.0), weight_decay=(0.0, math.inf))
        for name, label in (("eps", "eps"), ("d", "d0")):
            if not 0.0 < group[name] < math.inf:
                raise ValueError(f"{label} must be positive, got {group[name]}")
        if not group["growth_rate"] >= 1.0:
            raise ValueError(f"growth_rate must be at least 1, got {group['growth_rate']}")
        if len(group["betas"]) != 2:
            raise ValueError(f"betas are two numbers, got {group['betas']}")
        if group["decay"] not in DECAYS:
            raise ValueError(f"decay is one of {', '.join(DECAYS)}, got {group['decay']!r}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its hyper-parameters checked; it joins in at the present d.

        Raises:
            ValueError: from :meth:`check`, or where the groups would differ in what they share.
        """
        if self.param_groups:
            first = self.param_groups[0]
            for name in SHARED:
                if name in param_group and param_group[name] != first[name]:
                    raise ValueError(f"all groups share {name}: {first[name]}, not {param_group[name]}")
            param_group = param_group | {name: first[name] for name in (*SHARED, *STATE)}
        super().add_param_group(param_group)

    def init_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """Moments ``exp_avg`` and ``exp_avg_sq`` and the sum ``s``: all 0."""
        names = ("exp_avg", "exp_avg_sq", "s")
        return {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in names}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for a sparse gradient; no parameter has moved then.
        """
        loss = evaluated(closure)
        work = [(group, params) for group, params in self.work() if group["lr"] > 0]
        if not work:
            return loss
        first = self.param_groups[0]
        d, numerator, steps = (first[name] for name in STATE)
        (beta1, beta2), q = first["betas"], math.sqrt(first["betas"][1])
        lr = max(group["lr"] for group in self.param_groups)
        rate = d * lr
        if first["bias_correction"]:
            rate *= math.sqrt(1 - beta2 ** (steps + 1)) / (1 - beta1 ** (steps + 1))

        products, sums = [], []
        for group, params in work:
            found = self._gather(params, group, rate, group["lr"] / lr)
            products += found[0]
            sums += found[1]
        length = _total(sums)
        if length == 0:  # No gradient so far.
            return loss
        for group, params in work:
            with widened(params) as (moved, _):
                if group["weight_decay"] and group["decay"] == "decoupled":
                    torch._foreach_mul_(moved, 1 - rate * group["lr"] / lr * group["weight_decay"])
                root = self._root(params, group)
                torch._foreach_addcdiv_(moved, [self.state[p]["exp_avg"] for p in params], root, -1.0)

        numerator = q * numerator + (1 - q) * _total(products)
        d = max(d, min(numerator / ((1 - q) * length), d * first["growth_rate"]))
        for group in self.param_groups:
            group.update(zip(STATE, (d, numerator, steps + 1), strict=True))
        return loss

    def _gather(
        self, params: list[Tensor], group: Mapping[str, Any], rate: float, share: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Move the moments; returns each parameter's part of the numerator and of the length of s."""
        (beta1, beta2), q = group["betas"], math.sqrt(group["betas"][1])
        with widened(params) as (moved, grads):
            for p, wide in zip(params, moved, strict=True):
                if not self.state[p]:
                    self.state[p].update(self.init_state(wide, group))
            if group["weight_decay"] and group["decay"] == "l2":
                grads = list(torch._foreach_add(grads, moved, alpha=group["weight_decay"]))
            m, v, s = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq", "s"))
            scaled = torch._foreach_div(s, self._root(params, group))
            torch._foreach_mul_(scaled, grads)
            products = [share * rate * part.sum() for part in scaled]
            torch._foreach_mul_(m, beta1)
            torch._foreach_add_(m, grads, alpha=share * rate * (1 - beta1))
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
            torch._foreach_mul_(s, q)
            torch._foreach_add_(s, grads, alpha=rate * (1 - q))
            return products, [share * part.abs().sum() for part in s]

    def _root(self, params: list[Tensor], group: Mapping[str, Any]) -> list[Tensor]:
        root = list(torch._foreach_sqrt([self.state[p]["exp_avg_sq"] for p in params]))
        torch._foreach_add_(root, group["eps"])
        return root


def _total(parts: list[Tensor]) -> float:
    """The sum of scalars, read in one go per device and added without rounding."""
    places: dict[Any, list[Tensor]] = {}
    for part in parts:
        places.setdefault((part.device, part.dtype), []).append(part)
    return math.fsum(value for alike in places.values() for value in torch.stack(alike).tolist())
