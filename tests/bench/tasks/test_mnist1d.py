"""The task ``mnist1d``."""

from __future__ import annotations

import numpy as np

from gatework.bench.tasks import make_task

from .made import task


def test_mnist1d_is_always_the_same_and_leaves_numpy_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    made = make_task("mnist1d")
    assert (np.random.get_state()[1] == before).all()
    assert made.data_hash == task("mnist1d").data_hash
