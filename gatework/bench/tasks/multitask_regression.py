"""``multitask_regression``: tasks in clusters that share hidden structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import RegressionTask
from gatework.core.errors import GateworkError


class MultitaskRegression(RegressionTask):
    """Several regressions on the same normal inputs; those of one cluster read the same hidden features; 4,096 train.

    Each cluster c has random features h_c(x) = tanh(2 W_c x / sqrt(inputs)), 16 of them. Task t of the cluster is

        y_t = a_t h_c(x)    a_t = sqrt(related) a_c + sqrt(1 - related) b_t

    with W_c, a_c and b_t standard normal. Clusters are drawn apart from each other, so that sharing all is as wrong as sharing
    nothing. Targets are scaled to mean 0 and variance 1; then comes the noise, whose variance is the least mean squared error to
    be had. 1,024 examples validate, 2,048 test.

    Args:
        tasks: number of tasks, in clusters of equal size.
        clusters: number of clusters; it divides the tasks.
        inputs: width of an example.
        related: share of a task's variance that its cluster has in common, 0 to 1.
        noise: standard deviation of the noise.
        seed: of the data.

    Raises:
        GateworkError: for sizes that do not fit.
    """

    name = "multitask_regression"
    backbone = "multitask"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 120_000,
        "tune_tokens": 60_000,
        "batch_size": 64,
        "learning_rates": (1e-3, 5e-2),
        "baseline": "gate=topk(k=2)",
        "model": {"d_model": 16, "experts": 8, "d_ff": 16},
        "match": "none",
    }

    FEATURES = 16
    SIZES = {"train": 4096, "validation": 1024, "test": 2048}

    def __init__(
        self, tasks: int = 8, clusters: int = 4, inputs: int = 8, related: float = 0.8, noise: float = 0.1, seed: int = 0
    ) -> None:
        if min(tasks, clusters, inputs) < 1 or tasks % clusters:
            raise GateworkError(f"tasks come in clusters of equal size, at least one of one: {tasks} tasks, {clusters} clusters")
        if not 0 <= related <= 1 or noise < 0:
            raise GateworkError(f"related is a share and noise at least 0, got {related} and {noise}")
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        #: The cluster of each task.
        self.cluster = [t * clusters // tasks for t in range(tasks)]
        x = normal(sum(self.SIZES.values()), inputs)
        hidden = torch.tanh(torch.einsum("ni,chi->cnh", x, 2 * normal(clusters, self.FEATURES, inputs) / math.sqrt(inputs)))
        own = math.sqrt(related) * normal(clusters, self.FEATURES)[self.cluster]
        own = own + math.sqrt(1 - related) * normal(tasks, self.FEATURES)
        y = torch.einsum("tnh,th->nt", hidden[self.cluster], own)
        y = (y - y.mean(0)) / y.std(0, correction=0)
        y = y + noise * normal(*y.shape)
        sizes = list(self.SIZES.values())
        parts = zip(self.SIZES, x.float().split(sizes), y.float().split(sizes), strict=True)
        super().__init__({name: (a, b) for name, a, b in parts})

    def model_arguments(self) -> dict[str, Any]:
        """Width of an example, one output for each task."""
        x, y = self.splits["train"]
        return {"inputs": x.shape[1], "outputs": (1,) * y.shape[1]}
