"""``pfn_gp``: data sets drawn from a Gaussian process, whose exact posterior is known.

Müller et al., Transformers Can Do Bayesian Inference, 2021 (ICLR 2022), arXiv 2112.10510, sections 4 and 5; the released generator
was read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, Predict, Split, Task, digest
from gatework.core.errors import GateworkError
from gatework.learners.bar_distribution import BarDistribution, equal_mass


class GPPrior(Task):
    """Regression on data sets that a Gaussian process has drawn: the density of y at new points, given some points with theirs.

    A data set has ``points`` points, x uniform in [0, 1]^inputs or equidistant in [0, 1] in a random order, and y = f(x) + noise
    with f from a process of mean 0 and covariance ``outputscale exp(-|x - x'|^2 / (2 lengthscale^2))``, the noise of variance
    ``noise``. Its first m points are the context, the others are asked for; m is drawn for each batch, from 0 .. points - 1 with
    probability proportional to 1 / (points - m).

    A row of the input holds, for each point, x, y (0 where it is asked for) and 1 for the context, 0 for the others. Targets are
    the y that were asked for. A model says logits of :class:`gatework.learners.BarDistribution`, between whose borders lie
    equally many of 100,000 y of the prior.

    The score is what the model loses against the exact posterior: its mean negative log-density minus the posterior's, in nats per
    point, which is an estimate of their Kullback-Leibler divergence, averaged over several sizes of the context.

    Args:
        inputs: width of x.
        points: n, of a data set.
        lengthscale, outputscale, noise: of the process; the last two are variances, noise at least 1e-10 of the other.
        equidistant: whether x are equidistant; for 1 input.
        bars: number of bars.

    Raises:
        GateworkError: sizes that do not fit.
    """

    name = "pfn_gp"
    backbone = "pfn"
    unit = "example"
    score_name = "gap"
    score_unit = "nats above the posterior"
    lower_is_better = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 200_000,
        "tune_tokens": 60_000,
        "batch_size": 64,
        "learning_rates": (3e-4, 1e-2),
        "baseline": "feedforward=mlp",
        "model": {"d_model": 64, "layers": 3, "heads": 4},
    }

    EVALUATION_ROWS: ClassVar[int] = 256
    EVALUATION_BATCH: ClassVar[int] = 64
    #: Below these the Cholesky factors of the covariances lose all digits.
    LEAST_NOISE: ClassVar[float] = 1e-10
    LEAST_LENGTHSCALE: ClassVar[float] = 1e-100

    def __init__(
        self,
        inputs: int = 1,
        points: int = 30,
        lengthscale: float = 0.1,
        outputscale: float = 0.1,
        noise: float = 0.1,
        equidistant: bool = False,
        bars: int = 100,
    ) -> None:
        if inputs < 1 or points < 2 or not all(0 < scale < math.inf for scale in (lengthscale, outputscale, noise)):
            given = f"{inputs}, {points}, {lengthscale}, {outputscale} and {noise}"
            raise GateworkError(f"inputs is at least 1, points at least 2, the three scales are positive and finite, not {given}")
        if not noise >= self.LEAST_NOISE * outputscale or lengthscale < self.LEAST_LENGTHSCALE:
            wanted = f"noise of at least {self.LEAST_NOISE} outputscale and a lengthscale of at least {self.LEAST_LENGTHSCALE}"
            raise GateworkError(f"the covariances can be factored for {wanted}, not {noise}, {outputscale} and {lengthscale}")
        if equidistant and inputs != 1:
            raise GateworkError(f"points are equidistant on a line: that takes 1 input, not {inputs}")
        self.inputs, self.points, self.equidistant = inputs, points, equidistant
        self.lengthscale, self.outputscale, self.noise = lengthscale, outputscale, noise
        prior = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        try:
            # The distribution of a single y, whatever its x.
            self.distribution = BarDistribution(equal_mass(math.sqrt(outputscale + noise) * prior, bars))
        except ValueError as error:
            raise GateworkError(str(error)) from error
        #: Sizes of the context that an evaluation goes through.
        self.contexts = sorted({0, 1, points // 8, points // 4, points // 2, points - 1})
        # Seeds that no training stream uses: PyTorch's CPU generator takes the lower 32 bits of a seed, `batches` the lower 31.
        self.splits = {
            split: self.sample(self.EVALUATION_ROWS, torch.Generator().manual_seed(2**31 + index))
            for index, split in enumerate(("validation", "test"))
        }
        self.data_hash = digest(*(tensor for split in self.splits.values() for tensor in split))
        self._posteriors: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def sample(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``count`` data sets, in float64: x (count, points, inputs) and y (count, points)."""
        if self.equidistant:
            order = torch.rand(count, self.points, generator=generator).argsort(1)
            x = torch.linspace(0, 1, self.points, dtype=torch.float64)[order][..., None]
        else:
            x = torch.rand(count, self.points, self.inputs, dtype=torch.float64, generator=generator)
        root = torch.linalg.cholesky(self._noisy(x))
        draw = torch.randn(count, self.points, 1, dtype=torch.float64, generator=generator)
        return x, (root @ draw)[..., 0]

    def covariance(self, x: Tensor, other: Tensor) -> Tensor:
        """Of the process at points (B, n, inputs) with those at points (B, m, inputs), without noise: (B, n, m)."""
        square = (x[:, :, None] - other[:, None]).square().sum(-1)
        return self.outputscale * (square / (-2 * self.lengthscale**2)).exp()

    def _noisy(self, x: Tensor) -> Tensor:
        return self.covariance(x, x) + self.noise * torch.eye(x.shape[1], dtype=x.dtype)

    def posterior(self, x: Tensor, y: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance (of y, with its noise) at ``queries`` (B, q, inputs), given points x (B, m, inputs) with their y."""
        root = torch.linalg.cholesky(self._noisy(x))
        across = torch.linalg.solve_triangular(root, self.covariance(x, queries), upper=False)
        white = torch.linalg.solve_triangular(root, y[..., None], upper=False)
        return (across.mT @ white)[..., 0], self.outputscale + self.noise - across.square().sum(1)

    def rows(self, x: Tensor, y: Tensor, context: int) -> Batch:
        """Data sets as a model is given them, their first ``context`` points known, and the other points' y."""
        known = (torch.arange(self.points) < context).expand(len(x), -1)
        channels = [x, (y * known)[..., None], known[..., None].to(x.dtype)]
        return torch.cat(channels, -1).float(), y[:, context:].float()

    def model_arguments(self) -> dict[str, Any]:
        """Width of x and number of bars."""
        return {"inputs": self.inputs, "bars": self.distribution.bars}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Fresh data sets without end; each batch has a context of its own size."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        weights = 1 / (self.points - torch.arange(self.points, dtype=torch.float64))
        while True:
            context = int(torch.multinomial(weights, 1, generator=generator))
            yield self.rows(*self.sample(batch_size, generator), context)

    def units_per_batch(self, batch_size: int) -> int:
        """Data sets."""
        return batch_size

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean negative log-density of the points that are asked for, in nats."""
        return -self.distribution(output.float(), y).mean()

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """Means over the sizes of the context of ``loss``, ``posterior`` (the exact posterior's loss on the same points) and their
        difference ``gap``, this also by size as ``gap_at_<m>``; ``correlation`` of the predicted means with the posterior's, over
        the points of all sizes but 0."""
        said: dict[str, float] = {}
        losses, exact, means, wanted = [], [], [], []
        for m in self.contexts:
            x, y = (tensor[: None if max_batches is None else max_batches * self.EVALUATION_BATCH] for tensor in self.splits[split])
            inputs, targets = self.rows(x, y, m)
            output = torch.cat([predict(piece).double() for piece in inputs.split(self.EVALUATION_BATCH)])
            losses.append(-float(self.distribution(output, targets).mean()))
            if (split, m) not in self._posteriors:
                all_x, all_y = self.splits[split]
                self._posteriors[split, m] = self.posterior(all_x[:, :m], all_y[:, :m], all_x[:, m:])
            mean, variance = (moment[: len(x)] for moment in self._posteriors[split, m])
            exact.append(float(0.5 * ((targets - mean).square() / variance + variance.log() + math.log(2 * math.pi)).mean()))
            said[f"gap_at_{m}"] = losses[-1] - exact[-1]
            if m:
                means.append(self.distribution.mean(output).flatten())
                wanted.append(mean.flatten())
        found, reference = sum(losses) / len(losses), sum(exact) / len(exact)
        correlation = torch.corrcoef(torch.stack([torch.cat(means), torch.cat(wanted)]))[0, 1].nan_to_num()  # 0 of equal means.
        return {"loss": found, "posterior": reference, "gap": found - reference, "correlation": float(correlation)} | said
