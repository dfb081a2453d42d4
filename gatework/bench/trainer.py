"""The training loop: a learner takes steps on batches; losses, validation and cost are written down on the way.

The loop adds little to ``learner.step``: losses are read every few steps only, and a few steps of each run are
counted (executed FLOPs, peak memory) instead of timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gatework.bench.study import Variant
from gatework.core.contracts import decay_groups, metrics
from gatework.core.cost import count_flops, peak_bytes
from gatework.core.errors import GateworkError
from gatework.core.registry import build
from gatework.learners.base import Learner
from gatework.models import BACKBONES

#: How many points a run's curve has at most.
POINTS = 60
#: Seconds between two checkpoints of a running trial.
CHECKPOINT_SECONDS = 60.0
#: Metrics with more elements than this are not recorded, and not over time.
LARGEST_METRIC, LARGEST_OVER_TIME = 256, 64
#: Every how many points of the curve holds the metrics.
METRICS_EVERY = 3

Progress = Callable[[dict[str, Any]], None]


class Diverged(Exception):
    """The loss is not a finite number any more."""


def build_model(task: Any, variant: Variant, d_ff: int | None = None) -> nn.Module:
    """The variant's model for the task; ``d_ff``, where given, replaces the variant's own.

    Raises:
        GateworkError: the parts do not exist, do not fit each other or the task; the variant is named.
    """
    arguments = task.model_arguments() | variant.model | ({} if d_ff is None else {"d_ff": d_ff})
    try:
        model: nn.Module = BACKBONES[task.backbone](**arguments)
        task.check(model)
        return model
    except GateworkError as error:
        raise type(error)(f"{_label(variant.name)}: {error}") from error


def _label(name: str) -> str:
    return "the baseline" if name == "baseline" else f"variant {name!r}"


def build_learner(model: nn.Module, task: Any, variant: Variant, learning_rate: float, steps: int) -> Learner:
    """The variant's learner: its optimizer (weight decay by :func:`~gatework.core.decay_groups`), schedule and gradient clipping
    at norm 1."""
    decayed, others = decay_groups(model)
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    try:
        optimizer = build(variant.optim, "optim", params=[group for group in groups if group["params"]], lr=learning_rate)
        schedule = build(variant.schedule, "schedule", optimizer=optimizer, total_steps=steps)
        learner: Learner = build(
            variant.learner,
            "learner",
            model=model,
            loss_fn=task.loss,
            optimizer=optimizer,
            schedule=schedule,
            total_steps=steps,
            clip_norm=1.0,
        )
    except GateworkError as error:
        raise type(error)(f"{_label(variant.name)}: {error}") from error
    return learner


@dataclass
class Log:
    """What a run has written down so far."""

    step: int = 0
    seconds: float = 0.0
    timed_steps: int = 0
    flops: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)


def fit(
    learner: Learner,
    batches: Iterator[Any],
    steps: int,
    *,
    units: int,
    evaluate: Callable[[], dict[str, float]] | None = None,
    evaluations: int = 0,
    probes: Iterable[int] = (),
    progress: Progress | None = None,
    keep: Callable[[Log], None] | None = None,
    log: Log | None = None,
) -> Log:
    """Train for ``steps`` steps, or for what is left of them after ``log``.

    Args:
        learner: takes the steps.
        batches: at least as many as there are steps.
        steps: length of the run.
        units: tokens (or examples) per batch.
        evaluate: called ``evaluations`` times at equal distances, the last time at the end.
        evaluations: see there.
        probes: the steps (from 1) that are counted, FLOPs and peak memory, and not timed.
        progress: called at each point of the curve.
        keep: called from time to time with the log, to write a checkpoint.
        log: continue this one.

    Raises:
        Diverged: the training or the validation loss is not finite; what was logged is in ``log``.
    """
    log = log or Log()
    every = max(1, steps // POINTS)
    validated = {math.ceil(steps * (i + 1) / evaluations) for i in range(evaluations)} if evaluate else set()
    counted = set(probes)
    running: Tensor | None = None
    pending, saved = 0, time.monotonic()
    batches = islice(batches, steps - log.step)
    start = time.perf_counter()
    for step, batch in enumerate(batches, log.step + 1):
        if step in counted:
            log.seconds += _since(start)
            losses = _counted(learner, batch, log, with_memory=step == max(counted))
            start = time.perf_counter()
        else:
            losses = learner.step(batch)
            log.timed_steps += 1
        running = losses["loss"] if running is None else running + losses["loss"]
        pending += 1
        if step % every and step != steps and step not in validated:
            continue
        loss = float(running) / pending
        log.seconds += _since(start)
        log.step, running, pending = step, None, 0
        point: dict[str, Any] = {"step": step, "tokens": step * units, "train_loss": loss, "validation_loss": None}
        point["seconds"] = log.seconds
        if not math.isfinite(loss):
            raise Diverged(f"the training loss was {loss} at step {step}")
        found = _metrics(learner.model)  # Before the validation leaves its own.
        if step in validated:
            assert evaluate is not None
            log.validation = evaluate()
            point["validation_loss"] = log.validation["loss"]
            if not math.isfinite(log.validation["loss"]):
                raise Diverged(f"the validation loss was {log.validation['loss']} at step {step}")
        if len(log.curve) % METRICS_EVERY == 0 or step == steps:
            point["metrics"] = {k: v for k, v in found.items() if isinstance(v, float) or len(v) <= LARGEST_OVER_TIME}
        log.curve.append(point)
        if 2 * step >= steps:
            for name, value in found.items():
                log.metrics.setdefault(name, []).append(value)
        if progress:
            progress(point | {"steps": steps, "tokens_per_second": units * log.timed_steps / max(log.seconds, 1e-9)})
        if keep and step < steps and time.monotonic() - saved > CHECKPOINT_SECONDS:
            keep(log)
            saved = time.monotonic()
        start = time.perf_counter()
    return log


def _since(start: float) -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _counted(learner: Learner, batch: Any, log: Log, with_memory: bool) -> dict[str, Tensor]:
    """One real training step under the counters."""
    if not with_memory:
        with count_flops() as count:
            losses = learner.step(batch)
    else:
        known = [value for value in tree_leaves((learner.state_dict(), batch)) if isinstance(value, Tensor)]
        with peak_bytes(learner.model, *known) as peak, count_flops() as count:
            losses = learner.step(batch)
        log.peak_bytes = peak.total
    log.flops.append(count.total)
    return losses


def _metrics(model: nn.Module) -> dict[str, float | list[float]]:
    """What the parts said of themselves in the last step."""
    found: dict[str, float | list[float]] = {}
    for name, value in metrics(model).items():
        if isinstance(value, Tensor) and value.numel() <= LARGEST_METRIC and not value.is_complex():
            numbers = value.double()
            found[name] = numbers.item() if value.dim() == 0 else numbers.flatten().tolist()
    return found
