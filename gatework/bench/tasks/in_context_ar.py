"""``in_context_ar``: sequences of vectors, each turned by a linear map of its own, which is to be found in context.

Zheng et al., On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability, 2024, arXiv 2405.16845,
section 3; the released generator was read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, Predict, Split, Task, digest
from gatework.core.errors import GateworkError
from gatework.models.mesa import Start


class InContextAR(Task):
    """A sequence x_{t+1} = W x_t with a W of its own; at every place the next vector is to be predicted.

    W is diagonal with d complex numbers of absolute value 1, whose phases are uniform: rotations of d planes. A complex number is
    a pair (Re, Im) of neighbouring channels, so that a vector has 2d real ones. The first vector is real: with start
    ``gaussian`` all its d numbers are N(0, scale^2); with ``sparse`` one of them, any, is +-scale and the others 0; with ``sign``
    all are +-scale.

    The input at place t is x_t with x_{t-1} behind it (x_0 = 0), as in the paper, and the target x_{t+1}; a row holds T - 1 places
    of a sequence of ``length`` T. The score is the mean squared error per number over the places 2 .. T - 1, divided by that of
    predicting 0, so that 1 is no better than that: at place 1 nothing can be known.

    Args:
        dimensions: d.
        length: T.
        start: law of the first vector.
        scale: of the first vector.
        pairs: whether x_{t-1} stands beside x_t; without it a model has to fetch it (:class:`gatework.models.MesaOptimizer` does).

    Raises:
        GateworkError: sizes that do not fit.
    """

    name = "in_context_ar"
    backbone = "sequence_regressor"
    unit = "token"
    score_name = "relative_mse"
    score_unit = "mean squared error, of that of 0"
    lower_is_better = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 4_000_000,
        "tune_tokens": 1_000_000,
        "batch_size": 64,
        "learning_rates": (3e-4, 1e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 2, "heads": 4},
    }

    EVALUATION_ROWS: ClassVar[int] = 512
    EVALUATION_BATCH: ClassVar[int] = 64
    #: Weight of the ridge regression that the context allows, to compare with.
    RIDGE: ClassVar[float] = 1e-3

    def __init__(
        self, dimensions: int = 5, length: int = 32, start: Start = "gaussian", scale: float = 1.0, pairs: bool = True
    ) -> None:
        if dimensions < 1 or length < 3 or not 0 < scale < math.inf:
            given = f"{dimensions}, {length} and {scale}"
            raise GateworkError(f"dimensions must be at least 1, length at least 3 and scale positive and finite, got {given}")
        self.dimensions, self.length, self.start, self.scale, self.pairs = dimensions, length, start, scale, pairs
        # Seeds that no training stream uses: PyTorch's CPU generator takes the lower 32 bits of a seed, `batches` the lower 31.
        self.splits = {
            split: self.rows(self.EVALUATION_ROWS, torch.Generator().manual_seed(2**31 + index))
            for index, split in enumerate(("validation", "test"))
        }
        self.data_hash = digest(*(tensor for rows in self.splits.values() for tensor in rows))
        self._ridge: dict[str, Tensor] = {}

    def rows(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` sequences: inputs (count, length - 1, 4 dimensions), without pairs (count, length - 1, 2 dimensions) as the
        targets."""
        d = self.dimensions
        phase = 2 * torch.pi * torch.rand(count, 1, d, dtype=torch.float64, generator=generator)
        first = self._first(count, generator)[:, None]
        angle = phase * torch.arange(self.length)[:, None]
        x = torch.stack([first * angle.cos(), first * angle.sin()], -1).flatten(2).float()
        now = x[:, :-1]
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-2]], 1)
        return torch.cat([now, before], -1) if self.pairs else now, x[:, 1:]

    def _first(self, count: int, generator: torch.Generator) -> Tensor:
        """x_1, (count, dimensions), real."""
        if self.start == "gaussian":
            return self.scale * torch.randn(count, self.dimensions, dtype=torch.float64, generator=generator)
        signs = 2.0 * torch.randint(2, (count, self.dimensions), generator=generator).double() - 1
        if self.start == "sparse":
            place = torch.randint(self.dimensions, (count,), generator=generator)
            signs = signs * torch.nn.functional.one_hot(place, self.dimensions)
        return self.scale * signs

    def model_arguments(self) -> dict[str, Any]:
        """Widths of an input and of a vector."""
        return {"inputs": (4 if self.pairs else 2) * self.dimensions, "outputs": 2 * self.dimensions}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Fresh sequences without end."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        while True:
            yield self.rows(batch_size, generator)

    def units_per_batch(self, batch_size: int) -> int:
        """Vectors shown."""
        return batch_size * (self.length - 1)

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean squared error per number over the places from the second on."""
        return torch.nn.functional.mse_loss(output.float()[:, 1:], y[:, 1:])

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss``, ``relative_mse``, the latter at the last place alone (``relative_mse_last``), and both again for a ridge
        regression on each place's own context (``ridge``, ``ridge_last``)."""
        error, reference, zero = self.by_place(predict, split, max_batches)
        return {
            "loss": float(error[1:].mean()),
            "relative_mse": float(error[1:].mean() / zero[1:].mean()),
            "relative_mse_last": float(error[-1] / zero[-1]),
            "ridge": float(reference[1:].mean() / zero[1:].mean()),
            "ridge_last": float(reference[-1] / zero[-1]),
        }

    def by_place(self, predict: Predict, split: Split, max_batches: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The mean squared errors at every place, (length - 1,) each: of ``predict``, of the ridge regression and of 0."""
        x, y = self.splits[split]
        pieces = x.split(self.EVALUATION_BATCH)[:max_batches]
        output = torch.cat([predict(piece).float() for piece in pieces])
        if split not in self._ridge:
            self._ridge[split] = ridge(x[..., : y.shape[-1]].double(), self.RIDGE)
        y = y[: len(output)].double()
        error, reference = ((said - y).square().mean((0, 2)) for said in (output.double(), self._ridge[split][: len(y)]))
        return error, reference, y.square().mean((0, 2))


def ridge(x: Tensor, weight: float) -> Tensor:
    """For every place t of (B, T, D) the prediction W_t x_t, where W_t is the minimum of ``sum over i < t of |x_{i+1} - W x_i|^2
    + weight |W|^2``; 0 at the first place."""
    width = x.shape[-1]
    gram = x.new_zeros(len(x), width, width) + weight * torch.eye(width, dtype=x.dtype)
    cross = x.new_zeros(len(x), width, width)
    predictions = [torch.zeros_like(x[:, 0])]
    for t in range(1, x.shape[1]):
        now, last = x[:, t, :, None], x[:, t - 1, :, None]
        gram, cross = gram + last @ last.mT, cross + now @ last.mT
        predictions.append((cross @ torch.linalg.solve(gram, now))[..., 0])
    return torch.stack(predictions, 1)
