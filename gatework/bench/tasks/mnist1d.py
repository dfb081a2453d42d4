"""``mnist1d``: the one-dimensional analogue of MNIST (Greydanus and Kobak, 2020, arXiv 2011.14439), generated offline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from gatework.bench.tasks.base import SupervisedTask
from gatework.core.errors import GateworkError


class MNIST1D(SupervisedTask):
    """Ten classes of signals of 40 samples (1 channel): 3,200 train, 800 validate, 1,000 test.

    The package's generator with its published arguments makes the data (about three seconds); the last fifth of its
    training part validates.

    Raises:
        GateworkError: if the package ``mnist1d`` is not installed.
    """

    name = "mnist1d"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 200_000,
        "tune_tokens": 100_000,
        "batch_size": 64,
        "learning_rates": (5e-4, 2e-2),
        "baseline": "",
        "model": {"d_model": 128, "layers": 3},
        "match": "none",
    }

    def __init__(self) -> None:
        try:
            from mnist1d.data import get_dataset_args, make_dataset
        except ImportError:
            raise GateworkError('mnist1d needs the package of that name: pip install "gatework[bench]"') from None
        before = np.random.get_state()  # The generator seeds NumPy's global state.
        try:
            made = make_dataset(get_dataset_args())
        finally:
            np.random.set_state(before)
        x, y = torch.tensor(made["x"]).float()[:, None], torch.tensor(made["y"]).long()
        cut = len(x) * 4 // 5
        test = torch.tensor(made["x_test"]).float()[:, None], torch.tensor(made["y_test"]).long()
        super().__init__({"train": (x[:cut], y[:cut]), "validation": (x[cut:], y[cut:]), "test": test}, classes=10)
