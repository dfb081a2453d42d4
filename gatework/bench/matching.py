"""The axis that is held equal: each variant's ``d_ff`` (parameters, executed FLOPs) or token budget (seconds) is
fitted to the baseline.

All three axes are measured and recorded for every variant, whichever is held equal.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from gatework.bench.study import Study, Variant
from gatework.bench.trainer import build_learner, build_model
from gatework.core.contracts import advance
from gatework.core.cost import active_parameters, count_flops, count_parameters
from gatework.core.errors import GateworkError, PartError
from gatework.core.expression import parse_settings

#: A fit within this share of the baseline is good; sizes that are multiples of a power of two are preferred among
#: good fits.
GOOD = 0.005
#: Beyond this share two variants are not called equal.
TOLERANCE = 0.02
#: Training steps that are timed per variant.
TIMED_STEPS = 5


def match(study: Study, task: Any, device: str = "cpu", say: Callable[[str], None] | None = None) -> dict[str, dict[str, Any]]:
    """Fit every variant to the baseline on the study's axis, and measure all axes.

    Returns:
        By variant: ``d_ff`` (None: the part's own default), ``parameters``, ``active_parameters``,
        ``flops_per_token`` (training, executed: mean over the schedules inside the parts), ``seconds_per_token``
        (training), ``tokens`` (budget of a final run).

    Raises:
        GateworkError: a model cannot be built, or cannot be made equal; the variant is named.
    """
    with torch.random.fork_rng():  # The caller's random state is left alone.
        bench = _Bench(study, task, device)
        sizes: dict[str, int | None] = {}
        for name, variant in study.resolved.items():
            if say:
                say(f"fitting {name}")
            sizes[name] = bench.size(variant)
        fitted = {name: bench.measure(study.resolved[name], size) for name, size in sizes.items()}
        seconds = bench.time(sizes)
        for name, entry in fitted.items():
            entry["seconds_per_token"] = seconds[name]
            entry["tokens"] = study.tokens
            if study.match == "seconds":
                entry["tokens"] = max(1, round(study.tokens * seconds["baseline"] / seconds[name]))
    return fitted


class _Bench:
    def __init__(self, study: Study, task: Any, device: str) -> None:
        self.study, self.task, self.device = study, task, device
        self.units = task.units_per_batch(study.batch_size)
        self.steps = max(1, math.ceil(study.tokens / self.units))
        x, y = next(task.batches(0, study.batch_size))
        self.batch = x.to(device), y.to(device)

    def size(self, variant: Variant) -> int | None:
        """The ``d_ff`` that makes a variant equal to the baseline."""
        own: int | None = variant.model.get("d_ff")
        axis = {"params": self.parameters, "flops": self.flops}.get(self.study.match)
        build_model(self.task, variant)  # An impossible model is told as what it is.
        if axis is None or variant.name == "baseline":
            return own
        target = axis(self.study.resolved["baseline"], self.study.resolved["baseline"].model.get("d_ff"))
        fixed = "d_ff" in parse_settings(self.study.variants[variant.name])
        close = abs(axis(variant, own) / target - 1)
        if fixed or close == 0:
            size, reason = own, "its d_ff is given"
        else:
            size = solve(lambda d_ff: self._try(axis, variant, d_ff), target, start=2 * variant.model.get("d_model", 128))
            reason = "no d_ff comes closer"
        reached = axis(variant, size)
        if abs(reached / target - 1) > TOLERANCE:
            raise GateworkError(
                f"variant {variant.name!r} cannot be made equal to the baseline in {self.study.match}: "
                f"{reached:,.0f} against {target:,.0f} ({reason}); change its settings or take --match none"
            )
        return size

    def _try(self, axis: Callable[..., float], variant: Variant, d_ff: int) -> float | None:
        try:
            return axis(variant, d_ff)
        except (PartError, ValueError):
            return None

    def parameters(self, variant: Variant, d_ff: int | None) -> float:
        """Number of parameters; nothing is initialised where the parts can be built without."""
        try:
            with torch.device("meta"):
                return float(count_parameters(build_model(self.task, variant, d_ff)))
        except (NotImplementedError, RuntimeError):
            return float(count_parameters(build_model(self.task, variant, d_ff)))

    def learner(self, variant: Variant, d_ff: int | None) -> Any:
        """A throw-away learner."""
        torch.manual_seed(0)
        model = build_model(self.task, variant, d_ff).to(self.device).train()
        return build_learner(model, self.task, variant, 1e-4, self.steps)

    def flops(self, variant: Variant, d_ff: int | None) -> float:
        """Executed training FLOPs per token: the mean of the start, the middle (four times) and the end of the parts'
        schedules."""
        learner = self.learner(variant, d_ff)
        counts = []
        for share in (0.0, 0.5, 1.0):
            if share:
                advance(learner.model, max(1, round(share * self.steps)), self.steps)
            with count_flops() as count:
                learner.estimate(self.batch)
            counts.append(count.total)
        return (counts[0] + 4 * counts[1] + counts[2]) / 6 / self.units

    def measure(self, variant: Variant, d_ff: int | None) -> dict[str, Any]:
        model = build_model(self.task, variant, d_ff)
        return {
            "d_ff": d_ff,
            "parameters": count_parameters(model),
            "active_parameters": active_parameters(model),
            "flops_per_token": self.flops(variant, d_ff),
        }

    def time(self, sizes: dict[str, int | None]) -> dict[str, float]:
        """Median seconds per token of a training step, all variants in turn."""
        learners = {name: self.learner(self.study.resolved[name], size) for name, size in sizes.items()}
        times: dict[str, list[float]] = {name: [] for name in learners}
        for repeat in range(TIMED_STEPS + 1):
            for name, learner in learners.items():
                start = time.perf_counter()
                float(learner.step(self.batch)["loss"])
                if repeat:
                    times[name].append(time.perf_counter() - start)
        return {name: statistics.median(values) / self.units for name, values in times.items()}


def solve(cost: Callable[[int], float | None], target: float, start: int) -> int:
    """The whole number n >= 1 whose ``cost(n)`` is nearest to ``target``; ``cost`` grows with n, and is None where n
    does not fit the part.

    Among numbers within ``GOOD`` of the target the one divisible by the highest power of two (up to 32) is taken.
    """
    known: dict[int, float | None] = {}

    def value(n: int) -> float | None:
        if n not in known:
            known[n] = cost(n)
        return known[n]

    def fitting(n: int) -> int | None:
        """The nearest number that fits the part."""
        near = (n + sign * away for away in range(65) for sign in (1, -1))
        return next((m for m in near if m >= 1 and value(m) is not None), None)

    def miss(n: int) -> float:
        found = value(n)
        return math.inf if found is None else abs(found / target - 1)

    a, b = fitting(max(start, 1)), fitting(max(2 * start, 2))
    if a is None or b is None:
        return start
    for _ in range(8):  # Costs are close to linear in n, so the secant arrives at once.
        ca, cb = value(a), value(b)
        assert ca is not None
        assert cb is not None
        if a == b or ca == cb:
            break
        guess = fitting(max(1, round(b + (target - cb) * (b - a) / (cb - ca))))
        if guess is None or guess in (a, b):
            break
        a, b = b, guess
    best = min((n for n in known if known[n] is not None), key=miss)
    step = 1
    while step < 64 and not any(value(m) is not None for m in (best - step, best + step) if m >= 1):
        step += 1
    best = min((n for n in (best - step, best, best + step) if n >= 1), key=miss)
    for grain in (32, 16, 8, 4, 2):
        rounded = round(best / grain) * grain
        if rounded >= 1 and miss(rounded) <= GOOD:
            return rounded
    return best
