"""The bench's training loop against a bare PyTorch loop: tokens per second on the same model, batches and steps.

Both train the default study's baseline on the bundled text with AdamW (decay on matrices), warm-up and cosine, gradients clipped
at norm 1. The bare loop slices its own windows and does nothing else; ours logs, validates nothing and writes no checkpoint (those
are costs that any loop would have). float32, 2 threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.bench.study import Variant, define
from gatework.bench.tasks import make_task
from gatework.bench.tasks.text import Text
from gatework.bench.trainer import build_learner, build_model, fit

STEPS, REPEATS = 60, 7
RATE = 3e-3
BATCH: int = Text.defaults["batch_size"]


def model(task: Text, variant: Variant) -> nn.Module:
    torch.manual_seed(0)
    return build_model(task, variant)


def ours(task: Text, variant: Variant) -> nn.Module:
    learner = build_learner(model(task, variant), task, variant, RATE, STEPS)
    fit(learner, islice(task.batches(1, BATCH), STEPS), STEPS, units=task.units_per_batch(BATCH))
    return learner.model


def bare(task: Text, variant: Variant) -> nn.Module:
    net = model(task, variant)
    groups = [
        {"params": [p for p in net.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), eps=1e-8, foreach=True)
    warmup = math.ceil(0.05 * STEPS)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.1 + 0.9 * (1 + math.cos(math.pi * min((step - warmup) / (STEPS - warmup), 1))) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for x, y in islice(windows(task.splits["train"], task.length), STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return net


def windows(text: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        starts = torch.randint(len(text) - length, (BATCH, 1), generator=generator)
        rows = text[starts + torch.arange(length + 1)].long()
        yield rows[:, :-1], rows[:, 1:]


def check(task: Text, variant: Variant) -> None:
    """Both loops end with the same weights before any speed is printed."""
    first, second = ours(task, variant), bare(task, variant)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    print(f"correct: after {STEPS} steps both loops have the same weights")


def main() -> None:
    torch.set_num_threads(2)
    begin = time.perf_counter()
    study = define({})
    task = make_task("text")
    assert isinstance(task, Text)
    baseline = study.resolved["baseline"]
    check(task, baseline)
    mine, theirs = interleaved(lambda: ours(task, baseline), lambda: bare(task, baseline), repeats=REPEATS, warmup=0)
    tokens = STEPS * task.units_per_batch(BATCH)
    print(f"tokens per second: ours {tokens / mine:,.0f}, bare loop {tokens / theirs:,.0f}")
    row("training loop: bench vs bare PyTorch", mine / STEPS, theirs / STEPS, "step", "bare step", ">= 0.95", theirs / mine >= 0.95)
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
