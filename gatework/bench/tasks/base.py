"""The contract of a task: data, what the model must fit, a loss and a score."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

#: Inputs and targets.
Batch = tuple[Tensor, Tensor]
#: From a batch's inputs to the model's output.
Predict = Callable[[Tensor], Tensor]
#: What a model is evaluated on: ``validation`` or ``test``.
Split = Literal["validation", "test"]


class Task(ABC):
    """Data with its three splits, a loss to train on and a score to report.

    ``backbone`` names the model that fits it (one of ``gatework.models.BACKBONES``), ``unit`` what a budget counts ("token" or
    "example"), ``score_name`` the entry of :meth:`evaluate` that is reported, with its ``score_unit`` and direction.
    ``data_hash`` identifies the data and its split.
    """

    name: ClassVar[str]
    backbone: ClassVar[str]
    unit: ClassVar[Literal["token", "example"]]
    score_name: ClassVar[str]
    score_unit: ClassVar[str]
    lower_is_better: ClassVar[bool]

    data_hash: str

    @abstractmethod
    def model_arguments(self) -> dict[str, Any]:
        """What the model must be built with to fit the data."""

    @abstractmethod
    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Training batches without end; the same seed gives the same batches."""

    @abstractmethod
    def units_per_batch(self, batch_size: int) -> int:
        """How many units of the budget a batch uses."""

    @abstractmethod
    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The mean training loss of a batch."""

    @abstractmethod
    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """Loss and score of ``predict`` (inputs to outputs) on the fixed examples of a split."""


class SupervisedTask(Task):
    """A classification task whose three splits are tensors in memory; the score is the share of errors."""

    backbone = "classifier"
    unit = "example"
    score_name = "error"
    score_unit = "share wrong"
    lower_is_better = True

    EVALUATION_BATCH: ClassVar[int] = 256

    def __init__(self, splits: dict[str, Batch], classes: int) -> None:
        self.splits, self.classes = splits, classes
        self.data_hash = digest(*(tensor for name in ("train", "validation", "test") for tensor in splits[name]))

    def model_arguments(self) -> dict[str, Any]:
        """Shape of an input and the number of classes."""
        return {"input_shape": tuple(self.splits["train"][0].shape[1:]), "classes": self.classes}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Passes over the training set, each in an order of its own; an incomplete last batch is left out."""
        x, y = self.splits["train"]
        size = min(batch_size, len(x))
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(x), generator=generator)
            for start in range(0, len(x) - size + 1, size):
                chosen = order[start : start + size]
                yield x[chosen], y[chosen]

    def units_per_batch(self, batch_size: int) -> int:
        """Examples."""
        return min(batch_size, len(self.splits["train"][0]))

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return torch.nn.functional.cross_entropy(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``accuracy`` and ``error`` (shares)."""
        x, y = self.splits[split]
        total, right, count = 0.0, 0, 0
        for index, start in enumerate(range(0, len(x), self.EVALUATION_BATCH)):
            if max_batches is not None and index >= max_batches:
                break
            inputs, targets = x[start : start + self.EVALUATION_BATCH], y[start : start + self.EVALUATION_BATCH]
            output = predict(inputs).float()
            total += float(torch.nn.functional.cross_entropy(output, targets, reduction="sum"))
            right += int((output.argmax(-1) == targets).sum())
            count += len(inputs)
        return {"loss": total / count, "accuracy": right / count, "error": 1 - right / count}


class RegressionTask(SupervisedTask):
    """A regression task whose three splits are tensors in memory; the score is the mean squared error over all outputs."""

    score_name = "mse"
    score_unit = "mean squared error"

    def __init__(self, splits: dict[str, Batch]) -> None:
        super().__init__(splits, classes=0)

    @abstractmethod
    def model_arguments(self) -> dict[str, Any]:
        """What the model must be built with to fit the data."""

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``mse``, and the same as ``loss``."""
        x, y = self.splits[split]
        rows = len(x) if max_batches is None else min(len(x), max_batches * self.EVALUATION_BATCH)
        total = 0.0
        for start in range(0, rows, self.EVALUATION_BATCH):
            chosen = slice(start, min(start + self.EVALUATION_BATCH, rows))
            total += float((predict(x[chosen]).float() - y[chosen]).square().double().sum())
        mse = total / (rows * y[0].numel())
        return {"loss": mse, "mse": mse}


def digest(*tensors: Tensor) -> str:
    """A short hash of tensors' contents."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
