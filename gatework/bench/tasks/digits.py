"""``digits``: scikit-learn's 8x8 handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import SupervisedTask
from gatework.core.errors import GateworkError


class Digits(SupervisedTask):
    """Ten classes of 8x8 pictures (1 channel, values 0 to 1): 1,077 train, 360 validate, 360 test, stratified by class.

    Args:
        split_seed: seed of the split.

    Raises:
        GateworkError: if scikit-learn, which bundles the data, is not installed.
    """

    name = "digits"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 60_000,
        "tune_tokens": 30_000,
        "batch_size": 64,
        "learning_rates": (5e-4, 2e-2),
        "baseline": "",
        "model": {"d_model": 64, "layers": 3},
        "match": "none",
    }

    def __init__(self, split_seed: int = 0) -> None:
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError:
            raise GateworkError('the digits need scikit-learn: pip install "gatework[bench]"') from None
        x, y = load_digits(return_X_y=True)
        x = x.reshape(-1, 1, 8, 8) / 16.0
        rest_x, test_x, rest_y, test_y = train_test_split(x, y, test_size=0.2, stratify=y, random_state=split_seed)
        train_x, val_x, train_y, val_y = train_test_split(
            rest_x, rest_y, test_size=0.25, stratify=rest_y, random_state=split_seed
        )
        splits = {"train": (train_x, train_y), "validation": (val_x, val_y), "test": (test_x, test_y)}
        super().__init__(
            {name: (torch.tensor(a, dtype=torch.float32), torch.tensor(b).long()) for name, (a, b) in splits.items()}, classes=10
        )
