"""``pvr``: pointer value retrieval with a bit held out (Abbe, Bengio, Cornacchia, Kleinberg, Lotfi, Raghu and Zhang, Learning to
Reason with Neural Networks: Generalization, Unseen Data and Boolean Measures, 2022, arXiv 2205.13647; the function is that of
Zhang, Raghu, Kleinberg and Bengio, Pointer Value Retrieval, 2021, arXiv 2107.12580).

The paper's conjecture: gradient descent on data in which a bit never varies learns the function with this bit frozen, so that the
generalisation error on all data is the bit's Boolean influence. Its generalisation error is half of the mean squared error, which
is what its code prints without the half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gatework.bench.tasks.base import Predict, RegressionTask, Split
from gatework.core.errors import GateworkError

#: How many points of {-1, +1}^d are evaluated at once, and the most dimensions that are enumerated.
CHUNK, LARGEST = 2**16, 20


class PVR(RegressionTask):
    """Pointer bits say where to look among data bits, and one bit never varies in training; the score is the generalisation error.

    An input is a point of {-1, +1}^d: ``pointer`` bits, then 2^pointer data bits. The pointer bits are a binary number, the first
    the most significant, -1 for 0; the value is an aggregation of the ``window`` data bits that begin at this number. In training
    bit ``held_out`` is always +1; the other bits are uniform.

    ``test`` is all points, with four pointer bits 8192 random ones. ``validation``, which chooses, is those of all points (or of
    as many other random ones) whose held-out bit is +1, the distribution of the training data. The score is half of the mean
    squared error. On the test points an evaluation also says the same error by the held-out bit, ``seen_error`` (+1) and
    ``unseen_error`` (-1), and the bit's ``influence``. A model that has learned the function with the bit frozen at +1 has exactly
    that score, one that guesses right how the bit matters a lower one. Compare the two where the validation error is small (below
    0.001, say).

    Args:
        pointer: p, pointer bits, 1 to 4; d is p + 2^p.
        window: data bits that are aggregated, 1 to 2^pointer.
        aggregation: ``majority`` (the sign of the sum), ``parity`` (the product), ``min``, ``max``.
        cyclic: windows go on at the first data bit; otherwise they end with the last one, and an even rest of a majority may be
            a tie, which is 0.
        held_out: the bit that training never shows at -1, 0 to d - 1; the pointer bits come first.
        examples: training points; None is 1900 for three pointer bits and fewer, 100,000 for four.
        seed: of the points.

    Raises:
        GateworkError: for sizes that do not fit.
    """

    name = "pvr"
    backbone = "classifier"
    score_name = "generalisation_error"
    score_unit = "half mean squared error"
    EVALUATION_BATCH = 2048
    POINTS: ClassVar[int] = 8192
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 200_000,
        "tune_tokens": 100_000,
        "batch_size": 64,
        "learning_rates": (1e-4, 1e-2),
        "baseline": "",
        "model": {"d_model": 128, "layers": 4, "patch": 1},
        "match": "none",
    }

    def __init__(
        self,
        pointer: int = 3,
        window: int = 3,
        aggregation: Literal["majority", "parity", "min", "max"] = "majority",
        cyclic: bool = False,
        held_out: int = 0,
        examples: int | None = None,
        seed: int = 0,
    ) -> None:
        if not 1 <= pointer <= 4:
            raise GateworkError(f"pointer must be 1 to 4 bits, got {pointer}")
        if not 1 <= window <= 2**pointer:
            raise GateworkError(f"window must be 1 to {2**pointer} data bits, got {window}")
        if aggregation == "majority" and window % 2 == 0:
            raise GateworkError(f"a majority needs an odd window, got {window}")
        d = pointer + 2**pointer
        if not 0 <= held_out < d:
            raise GateworkError(f"held_out must be one of the bits 0 to {d - 1}, got {held_out}")
        if examples is None:
            examples = 1900 if pointer <= 3 else 100_000
        if examples < 1:
            raise GateworkError(f"examples must be at least 1, got {examples}")
        self.pointer, self.window, self.aggregation, self.cyclic, self.held_out = pointer, window, aggregation, cyclic, held_out
        self.influence = float(boolean_influence(self.value, d)[held_out])
        generator = torch.Generator().manual_seed(seed)

        def points(count: int) -> Tensor:
            return 2.0 * torch.randint(2, (count, d), generator=generator) - 1

        def all_points() -> Tensor:
            # In a random order, so that the first of them stand for all.
            return cube(d)[torch.randperm(2**d, generator=generator)] if 2**d <= self.POINTS else points(self.POINTS)

        train, validation, test = points(examples), all_points(), all_points()
        train[:, held_out] = 1
        splits = {"train": train, "validation": validation[validation[:, held_out] > 0], "test": test}
        super().__init__({name: (x[:, None], self.value(x)[:, None]) for name, x in splits.items()})

    def value(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """The function at points of {-1, +1}^d."""
        data = x[:, self.pointer :]
        digits = 2 ** torch.arange(self.pointer - 1, -1, -1)
        start = ((x[:, : self.pointer] > 0) * digits).sum(1, keepdim=True)
        places = start + torch.arange(self.window)
        inside = torch.ones_like(places, dtype=torch.bool) if self.cyclic else places < data.shape[1]
        chosen = data.gather(1, places % data.shape[1])
        if self.aggregation == "majority":
            return (chosen * inside).sum(1).sign()
        if self.aggregation == "parity":
            return torch.where(inside, chosen, 1).prod(1)
        if self.aggregation == "min":
            return torch.where(inside, chosen, 1).amin(1)
        return torch.where(inside, chosen, -1).amax(1)

    def model_arguments(self) -> dict[str, Any]:
        """One channel of d bits, one output."""
        return {"input_shape": tuple(self.splits["train"][0].shape[1:]), "classes": 1}

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``generalisation_error``, ``mse`` (twice that, also as ``loss``); on the test points ``seen_error``, ``unseen_error`` and
        ``influence``."""
        output, x, y = self.outputs(predict, split, max_batches)
        squares = (output - y).square().double()[:, 0]
        mse = float(squares.mean())
        said = {"loss": mse, "mse": mse, "generalisation_error": mse / 2}
        if split == "test":
            seen = x[:, 0, self.held_out] > 0
            said |= {"seen_error": float(squares[seen].mean()) / 2, "unseen_error": float(squares[~seen].mean()) / 2}
            said["influence"] = self.influence
        return said


def cube(d: int) -> Float[Tensor, "N d"]:
    """All points of {-1, +1}^d in lexicographic order."""
    return _points(torch.arange(2**d), d)


def _points(index: Tensor, d: int) -> Tensor:
    return 2.0 * ((index[:, None] >> torch.arange(d - 1, -1, -1)) & 1) - 1


def boolean_influence(function: Callable[[Tensor], Tensor], d: int) -> Float[Tensor, "d"]:
    """The influence of each bit on a function of d bits, exactly, by enumeration.

    ``Inf_k(f)`` is the weight of all Fourier coefficients with bit k, the sum of ``fhat(S)^2`` over S that contain k; equal to
    ``E[((f(x with x_k = 1) - f(x with x_k = -1)) / 2)^2]`` for uniform x. For functions to {-1, +1} it is the probability that
    flipping the bit flips the value. Half of the mean squared error of ``f(x with x_k = 1)`` as a guess of ``f(x)`` is the same.

    Args:
        function: from points (N, d) of -1 and +1 to values (N).
        d: bits, at most 20.

    Raises:
        GateworkError: for more bits.

    Example:
        >>> boolean_influence(lambda x: x[:, 0] * x[:, 1], 3)
        tensor([1., 1., 0.], dtype=torch.float64)
    """
    values = _values(function, d)
    halves = (values.reshape(2**k, 2, -1) for k in range(d))
    return torch.stack([((half[:, 1] - half[:, 0]) / 2).square().mean() for half in halves])


def noise_stability(function: Callable[[Tensor], Tensor], d: int, delta: float) -> float:
    """``E[f(x) f(y)]`` for uniform x and a y that is x with each bit flipped with probability ``delta``, exactly, by enumeration.

    It is the sum of ``(1 - 2 delta)^|S| fhat(S)^2``: functions of high degree have little. The paper bounds what gradient descent
    can learn in a given time by it: the less stable a function, the harder.

    Args:
        function: from points (N, d) of -1 and +1 to values (N).
        d: bits, at most 20.
        delta: probability of a flip, 0 to 1.

    Raises:
        GateworkError: for more bits, or a ``delta`` that is no probability.

    Example:
        >>> noise_stability(lambda x: x[:, 0] * x[:, 1], 2, delta=0.25)
        0.25
    """
    if not 0 <= delta <= 1:
        raise GateworkError(f"delta is a probability, got {delta}")
    values = _values(function, d)
    noisy = values
    for k in range(d):
        half = noisy.reshape(2**k, 2, -1)
        noisy = ((1 - delta) * half + delta * half.flip(1)).flatten()
    return float(values @ noisy / len(values))


def _values(function: Callable[[Tensor], Tensor], d: int) -> Float[Tensor, "N"]:
    """The function at all points, in their lexicographic order."""
    if not 1 <= d <= LARGEST:
        raise GateworkError(f"functions of 1 to {LARGEST} bits are enumerated, got {d}")
    return torch.cat([function(_points(index, d)).double() for index in torch.arange(2**d).split(CHUNK)])
