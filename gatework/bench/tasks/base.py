"""The contract of a task: data, what the model must fit, a loss and a score."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gatework.core.contracts import Part
from gatework.core.errors import GateworkError, PartError

#: The label of a place of a sequence that carries none.
IGNORE = -100
#: The lengths that ``extrapolate`` evaluates, in lengths of a training sequence.
MULTIPLES = (1, 2, 4)

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
    ``defaults`` is what a study of it takes where nothing is given: ``tokens`` and ``tune_tokens`` (in units of the budget),
    ``batch_size``, ``learning_rates``, ``baseline``, ``model`` and, where it is not ``params``, ``match``. ``data_hash`` identifies
    the data and its split. With ``extrapolate`` an evaluation also shows longer sequences than training does, and says its scores
    at a length of n as ``<score>_at_<n>``.
    """

    name: ClassVar[str]
    backbone: ClassVar[str]
    defaults: ClassVar[Mapping[str, Any]]
    unit: ClassVar[Literal["token", "example"]]
    score_name: ClassVar[str]
    score_unit: ClassVar[str]
    lower_is_better: ClassVar[bool]

    data_hash: str
    extrapolate: bool = False

    def check(self, model: nn.Module) -> None:
        """Refuse a model that cannot be evaluated.

        Raises:
            PartError: with ``extrapolate``, for a part that runs at the length it was built for only.
        """
        parts = [part for part in model.modules() if isinstance(part, Part)] if self.extrapolate else []
        for part in parts:
            if not (answer := part.capabilities.get("any_length", True)):
                name = type(part).__name__
                raise PartError(f"extrapolate=true evaluates sequences longer than in training, which {name} cannot run ({answer})")

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


class SequenceTask(Task):
    """A task of made-up token sequences, fresh ones in every batch, some of whose places carry a label; the score is the share of
    wrong answers at those.

    A task writes :meth:`rows`. With ``extrapolate`` an evaluation also makes sequences of 2 and 4 times the length that the model
    was trained on, and says the errors there as ``error_at_<length>``, ``last_error_at_<length>``, ``row_error_at_<length>``.

    Args:
        vocab_size: number of token ids, of the inputs and of the labels.
        length: tokens of a training sequence.
        extrapolate: whether to evaluate longer sequences too.
    """

    backbone = "decoder"
    unit = "token"
    score_name = "error"
    score_unit = "share wrong"
    lower_is_better = True

    EVALUATION_ROWS: ClassVar[int] = 512
    EVALUATION_BATCH: ClassVar[int] = 64

    def __init__(self, vocab_size: int, length: int, extrapolate: bool = False) -> None:
        self.vocab_size, self.length, self.extrapolate = vocab_size, length, extrapolate
        # Seeds that no training stream uses: PyTorch's CPU generator takes the lower 32 bits of a seed, `batches` the lower 31.
        self.fixed = {
            (split, times): self.rows(
                self.EVALUATION_ROWS, times * length, torch.Generator().manual_seed(2**31 + index + 2 * (times - 1))
            )
            for index, split in enumerate(("validation", "test")) for times in (MULTIPLES if extrapolate else (1,))
        }
        self.data_hash = digest(*(tensor for rows in self.fixed.values() for tensor in rows))

    @abstractmethod
    def rows(self, count: int, length: int, generator: torch.Generator) -> Batch:
        """``count`` sequences of ``length`` tokens and their labels, both (count, length); :data:`IGNORE` where there is none."""

    def model_arguments(self) -> dict[str, Any]:
        """The vocabulary."""
        return {"vocab_size": self.vocab_size}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Fresh sequences without end, (batch_size, length) each."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        while True:
            yield self.rows(batch_size, self.length, generator)

    def units_per_batch(self, batch_size: int) -> int:
        """Tokens shown."""
        return batch_size * self.length

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy over the labels."""
        return torch.nn.functional.cross_entropy(output.float().flatten(0, 1), y.flatten(), ignore_index=IGNORE)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (nats per label), ``accuracy`` and ``error`` (shares of the labels), ``last_error`` (share of the sequences
        whose last label is missed) and ``row_error`` (of those with any label missed); with ``extrapolate`` the errors at each
        length, that of training included."""
        said = self._evaluate(predict, self.fixed[split, 1], max_batches)
        if not self.extrapolate:
            return said
        every = [said, *(self._evaluate(predict, self.fixed[split, times], max_batches) for times in MULTIPLES[1:])]
        return said | {
            f"{name}_at_{times * self.length}": found[name]
            for times, found in zip(MULTIPLES, every, strict=True) for name in ("error", "last_error", "row_error")
        }

    def _evaluate(self, predict: Predict, rows: Batch, max_batches: int | None) -> dict[str, float]:
        total, labels, shown, right, last, whole = 0.0, 0, 0, 0, 0, 0
        for x, y in list(zip(*(tensor.split(self.EVALUATION_BATCH) for tensor in rows), strict=True))[:max_batches]:
            asked = y != IGNORE
            output = predict(x).float()
            total += float(torch.nn.functional.cross_entropy(output[asked], y[asked], reduction="sum"))
            hit = output.argmax(-1) == y  # Nowhere where there is no label.
            end = (asked * torch.arange(1, y.shape[1] + 1)).argmax(1, keepdim=True)
            labels, shown, right = labels + int(asked.sum()), shown + len(y), right + int(hit.sum())
            last, whole = last + int(hit.gather(1, end).sum()), whole + int((hit == asked).all(1).sum())
        shares = {"error": 1 - right / labels, "last_error": 1 - last / shown, "row_error": 1 - whole / shown}
        return {"loss": total / labels, "accuracy": right / labels} | shares


class ExampleTask(Task):
    """A task whose three splits are tensors in memory, a row per example."""

    unit = "example"
    lower_is_better = True

    EVALUATION_BATCH: ClassVar[int] = 256

    def __init__(self, splits: dict[str, Batch]) -> None:
        self.splits = splits
        self.data_hash = digest(*(tensor for name in ("train", "validation", "test") for tensor in splits[name]))

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

    def outputs(self, predict: Predict, split: Split, max_batches: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What ``predict`` says of a split's examples (of the first ``max_batches`` batches, where given), in float32: outputs,
        inputs, targets."""
        x, y = self.splits[split]
        pieces = x.split(self.EVALUATION_BATCH)[:max_batches]
        output = torch.cat([predict(piece).float() for piece in pieces])
        return output, x[: len(output)], y[: len(output)]


class SupervisedTask(ExampleTask):
    """A classification task; the score is the share of errors."""

    backbone = "classifier"
    score_name = "error"
    score_unit = "share wrong"

    def __init__(self, splits: dict[str, Batch], classes: int) -> None:
        super().__init__(splits)
        self.classes = classes

    def model_arguments(self) -> dict[str, Any]:
        """Shape of an input and the number of classes."""
        return {"input_shape": tuple(self.splits["train"][0].shape[1:]), "classes": self.classes}

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return torch.nn.functional.cross_entropy(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``accuracy`` and ``error`` (shares)."""
        output, _, y = self.outputs(predict, split, max_batches)
        right = int((output.argmax(-1) == y).sum()) / len(y)
        loss = float(torch.nn.functional.cross_entropy(output.double(), y))
        return {"loss": loss, "accuracy": right, "error": 1 - right}


class RegressionTask(ExampleTask):
    """A regression task; the score is the mean squared error over all outputs."""

    score_name = "mse"
    score_unit = "mean squared error"

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return torch.nn.functional.mse_loss(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``mse``, and the same as ``loss``."""
        output, _, y = self.outputs(predict, split, max_batches)
        mse = float((output - y).square().double().mean())
        return {"loss": mse, "mse": mse}


class ClickTask(ExampleTask):
    """A task of yes or no, whose score is 1 - AUC, the chance that a no is ranked above a yes.

    Raises:
        GateworkError: if scikit-learn, which computes the AUC, is not installed.
    """

    score_name = "auc_error"
    score_unit = "1 - AUC"

    EVALUATION_BATCH = 1024

    def __init__(self, splits: dict[str, Batch]) -> None:
        super().__init__(splits)
        _roc_auc_score()  # Missing now rather than at the first evaluation.

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean binary cross-entropy of logits."""
        return torch.nn.functional.binary_cross_entropy_with_logits(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``auc`` and ``auc_error`` (1 - AUC)."""
        output, _, y = self.outputs(predict, split, max_batches)
        found = auc(output, y)
        return {"loss": float(self.loss(output, y)), "auc": found, "auc_error": 1 - found}


def auc(output: Tensor, y: Tensor) -> float:
    """The area under the ROC curve; NaN for outputs that are not finite, and where all labels are equal."""
    if not output.isfinite().all() or not 0 < float(y.sum()) < len(y):
        return float("nan")
    return float(_roc_auc_score()(y.numpy(), output.numpy()))


def _roc_auc_score() -> Any:
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise GateworkError('tasks that are scored by AUC need scikit-learn: pip install "gatework[bench]"') from None
    return roc_auc_score


def digest(*tensors: Tensor) -> str:
    """A short hash of tensors' contents."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(str(tuple(tensor.shape)).encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]
