"""``distill``: a short training of a converted model towards the original."""

from __future__ import annotations

import collections
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from gatework.core.contracts import advance, losses
from gatework.core.errors import GateworkError
from gatework.depth.gateskip import GateSkip
from gatework.surgery.conversion import CONVERTERS

#: Batches from which skip gates learn their thresholds at the end.
CALIBRATION = 4


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Int[Tensor, "B T"]],
    steps: int,
    lr: float = 2e-4,
    parameters: Literal["all", "new"] = "all",
    kl: float = 0.5,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train ``student`` on token batches, towards the text and towards ``teacher``; minutes of a CPU bring much of a loss back.

    The objective is ``(1 - kl) cross-entropy + kl KL(teacher || student)``, both in nats per predicted token, and the losses of
    the student's parts (the gates' sparsity). AdamW; the learning rate rises linearly, then falls by a cosine to a tenth. After
    each step the schedules inside the parts move (:func:`gatework.core.advance`: skip gates go from full to their budget). At the
    end skip gates learn their thresholds anew from the last batches, because gates move fast in a short training.

    Args:
        student: the model to train, in place; it returns in the mode it came in.
        teacher: usually a deep copy of the model from before the conversion; None trains on the text alone.
        batches: token ids (B, T), T >= 2, no padding; taken again from the beginning when they end.
        steps: optimizer steps.
        lr: highest learning rate.
        parameters: ``all`` trains the whole model; ``new`` what the conversions have added (gates, low-rank updates), and leaves
            the model's own weights alone.
        kl: weight of the divergence, in [0, 1]; without a teacher it is 0.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: as AdamW's; decay would pull pretrained weights to 0, so there is none by default.
        clip: largest norm of the gradient.
        report: called with the step and its objective after each step.

    Returns:
        The objective of each step.

    Raises:
        GateworkError: for settings out of range, ``new`` where no conversion added parameters, no batches, a loss that is
            not finite.
    """
    if steps < 1 or not 0 <= kl <= 1 or not 0 <= warmup <= 1 or lr <= 0:
        raise GateworkError(f"distill needs steps >= 1, lr > 0, kl and warmup in [0, 1], got {steps}, {lr}, {kl} and {warmup}")
    if parameters not in ("all", "new"):
        raise GateworkError(f"parameters must be 'all' or 'new', got {parameters!r}")
    trained = _trained(student, parameters)
    frozen = [p for p in student.parameters() if p.requires_grad and not any(p is chosen for chosen in trained)]
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=weight_decay)
    rise = max(1, round(warmup * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, rise, steps))
    modes = student.training, None if teacher is None else teacher.training
    device = next(student.parameters()).device
    values = []
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        student.train()
        last: collections.deque[Tensor] = collections.deque(maxlen=CALIBRATION)
        if teacher is not None:
            teacher.eval()
        for step, tokens in enumerate(_take(batches, steps), 1):
            if tokens.dim() != 2 or tokens.shape[1] < 2:
                raise GateworkError(f"a batch is token ids (B, T) with T >= 2, not of the shape {tuple(tokens.shape)}")
            objective = _objective(student, teacher, tokens.to(device), kl)
            if not bool(objective.isfinite()):
                raise GateworkError(f"the loss of step {step} is not finite; a lower learning rate than {lr} may help")
            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            nn.utils.clip_grad_norm_(trained, clip)
            optimizer.step()
            schedule.step()
            advance(student, step, steps)
            values.append(float(objective.detach()))
            last.append(tokens)
            if report is not None:
                report(step, values[-1])
        _calibrate(student.eval(), last, device)
    finally:
        optimizer.zero_grad(set_to_none=True)
        for parameter in frozen:
            parameter.requires_grad_(True)
        student.train(modes[0])
        if teacher is not None:
            teacher.train(bool(modes[1]))
    return values


@torch.no_grad()
def _calibrate(student: nn.Module, batches: Iterable[Tensor], device: torch.device) -> None:
    policies = [module for module in student.modules() if isinstance(module, GateSkip)]
    if policies:
        with contextlib.ExitStack() as stack:
            for policy in policies:
                stack.enter_context(policy.calibrating())
            for tokens in batches:
                _logits(student, tokens.to(device))


def _trained(student: nn.Module, parameters: str) -> list[nn.Parameter]:
    if parameters == "all":
        return [p for p in student.parameters() if p.requires_grad]
    names = [record["name"] for record in student.__dict__.get("gatework_conversions", [])]
    patterns = [pattern for name in names for pattern in CONVERTERS[name].new]
    found = [p for name, p in student.named_parameters() if p.requires_grad and any(fnmatchcase(name, some) for some in patterns)]
    if not found:
        raise GateworkError("no conversion of this model has added parameters; train with parameters='all'")
    return found


def _rate(step: int, rise: int, steps: int) -> float:
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _take(batches: Iterable[Tensor], steps: int) -> Iterable[Tensor]:
    seen: list[Tensor] = []
    given = 0
    for tokens in itertools.islice(batches, steps):
        seen.append(tokens)
        given += 1
        yield tokens
    if not seen:
        raise GateworkError("distill got no batches")
    yield from itertools.islice(itertools.cycle(seen), steps - given)


def _objective(student: nn.Module, teacher: nn.Module | None, tokens: Tensor, kl: float) -> Tensor:
    logits = _logits(student, tokens)
    objective: Tensor = sum(losses(student).values(), logits.new_zeros(()))
    if teacher is None:
        kl = 0.0
    if kl < 1:
        objective = objective + (1 - kl) * F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    if kl > 0 and teacher is not None:
        with torch.no_grad():
            target = _logits(teacher, tokens).log_softmax(-1)
        divergence = F.kl_div(logits.log_softmax(-1).flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean")
        objective = objective + kl * divergence
    return objective


def _logits(model: Any, tokens: Tensor) -> Tensor:
    """Predictions (B, T - 1, V) of the tokens after the first, in float32 at least."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
