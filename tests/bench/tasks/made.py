"""Tasks made once, and their first batches."""

from __future__ import annotations

from itertools import islice

from gatework.bench.tasks import make_task

_made = {}


def task(name):
    if name not in _made:
        _made[name] = make_task(name)
    return _made[name]


def take(made, seed, batch_size, count):
    return list(islice(made.batches(seed, batch_size), count))
