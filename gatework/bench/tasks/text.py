"""``text``: a byte-level language model of any file; the bundled Shakespeare by default."""

from __future__ import annotations

import lzma
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from gatework.bench.tasks.base import MULTIPLES, Batch, Predict, Split, Task, digest
from gatework.core.errors import GateworkError


class Text(Task):
    """Next-byte prediction on one file, read as bytes whatever it holds; the score is the loss in nats per byte.

    The file is split contiguously: the first 90% train, the next 5% validate, the last 5% test, so that no window of
    one split overlaps another. Training batches are windows at random places; evaluation uses the same evenly spaced
    windows for every variant.

    Args:
        data: path of the file; None is the bundled Shakespeare (5 MB).
        length: bytes a window predicts.
        eval_tokens: about how many bytes an evaluation predicts.
        extrapolate: also evaluate windows of 2 and 4 times the length, about as many bytes each.

    Raises:
        GateworkError: a file that is missing, a folder, empty, unreadable or too short for a window in every split.
    """

    name = "text"
    backbone = "decoder"
    unit = "token"
    score_name = "loss"
    score_unit = "nats per byte"
    lower_is_better = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 600_000,
        "tune_tokens": 150_000,
        "batch_size": 8,
        "learning_rates": (1e-3, 2e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 3, "heads": 4},
    }

    VOCAB_SIZE = 256
    SHARES = (0.90, 0.95)
    EVALUATION_BATCH = 32

    def __init__(
        self, data: str | None = None, length: int = 128, eval_tokens: int = 32768, extrapolate: bool = False
    ) -> None:
        if length < 2:
            raise GateworkError(f"length must be at least 2 bytes, got {length}")
        longest = MULTIPLES[-1] * length if extrapolate else length
        if eval_tokens < longest:
            raise GateworkError(f"eval_tokens {eval_tokens} is less than one window of {longest}")
        raw = self._read(data)
        self.length, self.eval_tokens, self.extrapolate = length, eval_tokens, extrapolate
        tokens = torch.from_numpy(np.frombuffer(raw, dtype=np.uint8).copy())
        first, second = (int(len(tokens) * share) for share in self.SHARES)
        self.splits = {"train": tokens[:first], "validation": tokens[first:second], "test": tokens[second:]}
        shortest = min(map(len, self.splits.values()))
        if shortest < longest + 1:
            need = int((longest + 1) / (1 - self.SHARES[1])) + 20
            raise GateworkError(
                f"{data or 'the text'} has {len(tokens)} bytes, too short for windows of {longest}: at least {need} are needed"
            )
        self.data_hash = digest(tokens)

    @staticmethod
    def _read(data: str | None) -> bytes:
        if data is None:
            return lzma.decompress(resources.files("gatework").joinpath("data/shakespeare.txt.xz").read_bytes())
        path = Path(data)
        try:
            if not path.exists():
                raise GateworkError(f"there is no data file {data!r}")
            if not path.is_file():
                raise GateworkError(f"{data!r} is not a file; give the path of one file")
            raw = path.read_bytes()
        except OSError as error:
            raise GateworkError(f"the data file {data!r} cannot be read: {error.strerror}") from error
        if not raw:
            raise GateworkError(f"the data file {data!r} is empty")
        return raw

    def model_arguments(self) -> dict[str, Any]:
        """256 byte values."""
        return {"vocab_size": self.VOCAB_SIZE}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Windows that start anywhere in the training part: inputs and the bytes that follow them, (batch_size,
        length) each."""
        train = self.splits["train"]
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(self.length + 1)
        while True:
            starts = torch.randint(len(train) - self.length, (batch_size, 1), generator=generator)
            windows = train[starts + offsets].long()
            yield windows[:, :-1], windows[:, 1:]

    def units_per_batch(self, batch_size: int) -> int:
        """Predicted bytes."""
        return batch_size * self.length

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy in nats per byte."""
        return torch.nn.functional.cross_entropy(output.float().flatten(0, 1), y.flatten())

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` in nats per byte and ``bits_per_byte``, over windows that are evenly spaced in the whole split; with
        ``extrapolate`` the loss over windows of each length as ``loss_at_<length>``, that of training included."""
        loss = self._loss(predict, split, self.length, max_batches)
        said = {"loss": loss, "bits_per_byte": loss / float(np.log(2))}
        if self.extrapolate:
            said[f"loss_at_{self.length}"] = loss
            for length in (times * self.length for times in MULTIPLES[1:]):
                said[f"loss_at_{length}"] = self._loss(predict, split, length, max_batches)
        return said

    def _loss(self, predict: Predict, split: Split, length: int, max_batches: int | None) -> float:
        tokens = self.splits[split]
        count = min(self.eval_tokens // length, (len(tokens) - 1) // length)
        if max_batches is not None:
            count = min(count, max_batches * self.EVALUATION_BATCH)
        starts = torch.arange(count)[:, None] * (len(tokens) - length - 1) // max(count - 1, 1)
        windows = tokens[starts + torch.arange(length + 1)].long()
        total = 0.0
        for batch in windows.split(self.EVALUATION_BATCH):
            x, y = batch[:, :-1], batch[:, 1:]
            output = predict(x).float().flatten(0, 1)
            total += float(torch.nn.functional.cross_entropy(output, y.flatten(), reduction="sum"))
        return total / (len(windows) * length)
