"""``multitask_digits``: several questions about scikit-learn's 8x8 handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import Predict, Split
from gatework.bench.tasks.digits import Digits


class MultitaskDigits(Digits):
    """Four questions about each digit: which it is, whether it is odd, above four, drawn with a loop.

    The splits are those of ``digits``. The score is the mean over the questions of the share of wrong answers.

    Args:
        split_seed: seed of the split.

    Raises:
        GateworkError: if scikit-learn, which bundles the data, is not installed.
    """

    name = "multitask_digits"
    backbone = "multitask"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 60_000,
        "tune_tokens": 30_000,
        "batch_size": 64,
        "learning_rates": (5e-4, 2e-2),
        "baseline": "gate=topk(k=2)",
        "model": {"d_model": 16, "experts": 8, "d_ff": 32},
        "match": "none",
    }

    #: Question by question the answer for each digit from 0 to 9.
    ANSWERS: ClassVar[dict[str, list[int]]] = {
        "digit": list(range(10)),
        "odd": [digit % 2 for digit in range(10)],
        "above four": [int(digit > 4) for digit in range(10)],
        "loop": [int(digit in (0, 6, 8, 9)) for digit in range(10)],
    }

    def __init__(self, split_seed: int = 0) -> None:
        super().__init__(split_seed)
        answers = torch.tensor(list(self.ANSWERS.values())).T
        self.splits = {name: (x.flatten(1), answers[y]) for name, (x, y) in self.splits.items()}
        self.widths = [len(set(column)) for column in self.ANSWERS.values()]
        self.data_hash += "-multitask"

    def model_arguments(self) -> dict[str, Any]:
        """64 pixels; ten classes and three times two."""
        return {"inputs": self.splits["train"][0].shape[1], "outputs": tuple(self.widths)}

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, the mean over examples and questions."""
        own = output.float().split(self.widths, 1)
        return torch.stack([torch.nn.functional.cross_entropy(o, y[:, t]) for t, o in enumerate(own)]).mean()

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``accuracy`` and ``error`` (shares), means over the questions."""
        output, _, y = self.outputs(predict, split, max_batches)
        answers = torch.stack([own.argmax(1) for own in output.split(self.widths, 1)], 1)
        right = float((answers == y).double().mean())
        return {"loss": float(self.loss(output, y)), "accuracy": right, "error": 1 - right}
