"""What the benchmarks share: interleaved timing in one process, and the rows they print."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Callable

import torch


def interleaved(*sides: Callable[[], object], repeats: int = 15, warmup: int = 3) -> list[float]:
    """Median seconds per call of each side. All run once in every round, so that a drift of the machine hits all alike, in an order
    drawn anew, so that none always finds the caches as the same other one has left them."""
    for _ in range(warmup):
        for side in sides:
            side()
    seconds: list[list[float]] = [[] for _ in sides]
    order = random.Random(0)
    for _ in range(repeats):
        for which in order.sample(range(len(sides)), len(sides)):
            times, side = seconds[which], sides[which]
            synchronize()
            start = time.perf_counter()
            side()
            synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(
    what: str, ours: float, theirs: float, ours_name: str, theirs_name: str, want: str = "", ok: bool | None = None
) -> None:
    """Print ``theirs / ours`` (above 1: ours is faster) with both sides in milliseconds, and whether it is ``want``."""
    ratio = theirs / ours
    verdict = "" if ok is None else ("  ok" if ok else "  NOT REACHED")
    wanted = f"  want {want}" if want else ""
    print(
        f"{what:<58} {ours_name} {ours * 1e3:9.3f} ms | {theirs_name} {theirs * 1e3:9.3f} ms | ratio {ratio:6.2f}{wanted}{verdict}",
        flush=True,
    )
    if path := os.environ.get("GATEWORK_BENCH_JSON"):
        record = {"what": what, "ours": ours, "theirs": theirs, "ours_name": ours_name, "theirs_name": theirs_name}
        with open(path, "a") as file:
            file.write(json.dumps(record | {"ratio": ratio, "want": want, "ok": ok}) + "\n")
