"""``mixture_regression``: examples of a softmax-gated mixture of Gaussian regressions, whose density is to be found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import ExampleTask, Predict, Split
from gatework.core.errors import GateworkError
from gatework.experts.gaussian_moe import GaussianMoE
from gatework.models.mixture import log_density


class MixtureRegression(ExampleTask):
    """y given x from a true mixture of linear Gaussian experts with a softmax gate; 4,096 train, 1,024 validate, 4,096 test.

    x is uniform in [-1, 1]^inputs. The gate's weights are normal with standard deviation 3, its biases 0.5, the experts' slopes
    and intercepts 2, and their variances between 0.05 and 0.3. The score is what the model loses against the truth: the mean
    log-density of the true mixture minus the model's, in nats per example, an estimate of their Kullback-Leibler divergence (0 at
    best; on few examples it may fall below).

    Args:
        inputs: width of an example.
        experts: of the true mixture.
        seed: of the truth and the data.

    Raises:
        GateworkError: sizes below 1.
    """

    name = "mixture_regression"
    backbone = "mixture"
    score_name = "excess"
    score_unit = "nats above the truth"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 150_000,
        "tune_tokens": 50_000,
        "batch_size": 64,
        "learning_rates": (3e-3, 1e-1),
        "baseline": "gate=topk(k=4)",
        "model": {"experts": 4},
        "match": "none",
    }

    SIZES = {"train": 4096, "validation": 1024, "test": 4096}

    def __init__(self, inputs: int = 2, experts: int = 4, seed: int = 0) -> None:
        if min(inputs, experts) < 1:
            raise GateworkError(f"inputs and experts must be at least 1, got {inputs} and {experts}")
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        with torch.random.fork_rng(devices=[]):
            self.truth = GaussianMoE(inputs, experts).double()
        with torch.no_grad():
            self.truth.gate_weight.copy_(3 * normal(experts, inputs))
            self.truth.gate_bias.copy_(0.5 * normal(experts))
            self.truth.slope.copy_(2 * normal(experts, inputs))
            self.truth.intercept.copy_(2 * normal(experts))
            self.truth.log_variance.copy_(torch.empty(experts).double().uniform_(0.05, 0.3, generator=generator).log())
            x = 2 * torch.rand(sum(self.SIZES.values()), inputs, generator=generator, dtype=torch.float64) - 1
            y = self.truth.sample(x, generator)
            sizes = list(self.SIZES.values())
            self.best = {
                name: float(value.mean()) for name, value in zip(self.SIZES, self.truth(x, y).split(sizes), strict=True)
            }
        parts = zip(self.SIZES, x.float().split(sizes), y.float().split(sizes), strict=True)
        super().__init__({name: (a, b) for name, a, b in parts})

    def model_arguments(self) -> dict[str, Any]:
        """Width of an example."""
        return {"inputs": self.splits["train"][0].shape[1]}

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean negative log-density."""
        return -log_density(output.float(), y).mean()

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (mean negative log-density in nats) and ``excess``, how much of it the truth would not have."""
        output, x, y = self.outputs(predict, split, max_batches)
        mean = float(log_density(output.double(), y.double()).mean())
        with torch.no_grad():
            best = self.best[split] if len(x) == len(self.splits[split][0]) else float(self.truth(x.double(), y.double()).mean())
        return {"loss": -mean, "excess": best - mean}
