"""``graph_algorithms``: graphs on which an algorithm is to be run step by step, evaluated on larger graphs too.

Of the kind of Veličković et al., The CLRS Algorithmic Reasoning Benchmark, 2022, arXiv 2205.15659: random graphs, a target for
every step. The tasks of Saldyt and Kambhampati, Mind The Gap: Deep Learning Doesn't Learn Deeply, 2025, arXiv 2505.18623, and of
Bohde et al., On the Markov Property of Neural Algorithmic Reasoning, 2024, arXiv 2403.04929.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from gatework.bench.tasks.base import Batch, Predict, Split, Task, digest
from gatework.core.errors import GateworkError
from gatework.models.graph_processor import HINTS, WEIGHT_STEP, Algorithm, run_algorithm


class GraphAlgorithms(Task):
    """An algorithm's state is to be said for every node of a graph after every step; the score counts nodes with any step wrong.

    A graph has n nodes, each pair of them linked, both ways, with a probability that is drawn for each graph from 0.3 to 0.5; it
    need not be connected. Weights are multiples of 1/16, uniform up to 1 (for ``bfs`` and ``dfs`` all are 1); the source is any
    node. The graphs of a training batch have one n, drawn from ``nodes_from`` to ``nodes``; evaluation has graphs of ``nodes`` and
    of ``test_nodes`` nodes. Inputs, steps and hints are those of :class:`gatework.models.GraphProcessor`.

    The loss is the sum, over the hints, of mean cross-entropies (for a distance the mean squared error where it exists) over all
    nodes and steps. The score is the share of nodes of which any step gets a class wrong, on graphs of ``test_nodes`` nodes.

    Args:
        algorithm: ``bfs``, which is parallel; ``bellman_ford``, parallel too; ``dfs``, whose steps go one after another.
        nodes_from: nodes of the smallest graphs in training.
        nodes: nodes of the largest.
        test_nodes: nodes of the graphs that the score is made on.

    Raises:
        GateworkError: sizes that do not fit.
    """

    name = "graph_algorithms"
    backbone = "graph_processor"
    unit = "example"
    score_name = "trace_error"
    score_unit = "share of nodes wrong at any step"
    lower_is_better = True
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 100_000,
        "tune_tokens": 30_000,
        "batch_size": 32,
        "learning_rates": (3e-4, 1e-2),
        "baseline": "memory=full",
        "model": {"d_model": 32},
        "match": "none",
    }

    EVALUATION_ROWS: ClassVar[int] = 128
    EVALUATION_BATCH: ClassVar[int] = 32

    def __init__(self, algorithm: Algorithm = "bfs", nodes_from: int = 8, nodes: int = 16, test_nodes: int = 32) -> None:
        if not 2 <= nodes_from <= nodes or test_nodes < 2:
            given = f"{nodes_from}, {nodes} and {test_nodes}"
            raise GateworkError(f"nodes_from is at least 2 and at most nodes, test_nodes at least 2, got {given}")
        self.algorithm, self.nodes_from, self.nodes, self.test_nodes = algorithm, nodes_from, nodes, test_nodes
        self.hints = HINTS[algorithm]
        # Seeds that no training stream uses: PyTorch's CPU generator takes the lower 32 bits of a seed, `batches` the lower 31.
        self.fixed = {
            (split, n): self.rows(self.EVALUATION_ROWS, n, torch.Generator().manual_seed(2**31 + index + 2 * (n == test_nodes)))
            for index, split in enumerate(("validation", "test")) for n in (nodes, test_nodes)
        }
        self.data_hash = digest(*(tensor for rows in self.fixed.values() for tensor in rows))

    def rows(self, count: int, nodes: int, generator: torch.Generator) -> Batch:
        """``count`` graphs of so many nodes, (count, nodes, nodes + 1), and the hints after each step, (count, steps, nodes, H)."""
        density = 0.3 + 0.2 * torch.rand(count, 1, 1, generator=generator)
        linked = (torch.rand(count, nodes, nodes, generator=generator) < density).triu(1)
        weights = torch.randint(1, round(1 / WEIGHT_STEP) + 1, linked.shape, generator=generator) * WEIGHT_STEP
        upper = linked * (weights if self.algorithm == "bellman_ford" else 1.0)
        source = torch.nn.functional.one_hot(torch.randint(nodes, (count,), generator=generator), nodes)
        x = torch.cat([upper + upper.mT, source[..., None]], -1)
        return x, run_algorithm(self.algorithm, x)

    def model_arguments(self) -> dict[str, Any]:
        """The algorithm."""
        return {"algorithm": self.algorithm}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Fresh graphs without end."""
        generator = torch.Generator().manual_seed(seed % 2**31)
        while True:
            nodes = int(torch.randint(self.nodes_from, self.nodes + 1, (), generator=generator))
            yield self.rows(batch_size, nodes, generator)

    def units_per_batch(self, batch_size: int) -> int:
        """Graphs."""
        return batch_size

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The sum of the hints' mean losses."""
        total = output.new_zeros((), dtype=torch.promote_types(output.dtype, torch.float32))
        output = output.to(total.dtype)
        for channel, hint in enumerate(self.hints):
            said, wanted = output[..., channel], y[..., channel]
            if hint == "reached":
                total = total + binary_cross_entropy_with_logits(said, wanted)
            elif hint == "distance":
                real = y[..., 0]
                total = total + ((said - wanted) * real).square().sum() / real.sum()
            elif hint == "current":
                total = total + cross_entropy(said.flatten(0, 1), wanted.flatten(0, 1).argmax(1))
            else:
                total = total + cross_entropy(output[..., channel:].flatten(0, 2), wanted.flatten().long())
        return total

    def wrong(self, output: Tensor, y: Tensor) -> Tensor:
        """Whether a node has a class wrong, (B, steps, n)."""
        found = torch.zeros_like(y[..., 0], dtype=torch.bool)
        for channel, hint in enumerate(self.hints):
            said, wanted = output[..., channel], y[..., channel]
            if hint == "reached":
                found |= (said > 0) != (wanted > 0)
            elif hint == "current":
                here = said.argmax(-1, keepdim=True) == torch.arange(said.shape[-1])
                found |= here != (wanted > 0)
            elif hint == "pointer":
                found |= output[..., channel:].argmax(-1) != wanted.long()
        return found

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """On graphs of ``test_nodes`` nodes ``loss``, ``trace_error`` (share of the nodes of which any step is wrong),
        ``step_error`` (share of nodes and steps), ``error`` (share of nodes at the last step) and ``accuracy`` (1 - error); for
        ``bellman_ford`` ``distance_error`` (mean absolute error over reached nodes and all steps). On graphs of ``nodes`` nodes
        the errors, as ``<score>_at_<nodes>``."""
        said = self._evaluate(predict, self.fixed[split, self.test_nodes], max_batches)
        if self.nodes != self.test_nodes:
            inside = self._evaluate(predict, self.fixed[split, self.nodes], max_batches)
            said |= {f"{name}_at_{self.nodes}": value for name, value in inside.items() if name.endswith("error")}
        return said

    def _evaluate(self, predict: Predict, rows: Batch, max_batches: int | None) -> dict[str, float]:
        x, y = rows
        output = torch.cat([predict(piece).float() for piece in x.split(self.EVALUATION_BATCH)[:max_batches]])
        y = y[: len(output)]
        wrong = self.wrong(output, y).double()
        error = float(wrong[:, -1].mean())
        found = {
            "loss": float(self.loss(output, y)), "trace_error": float(wrong.amax(1).mean()), "step_error": float(wrong.mean()),
            "error": error, "accuracy": 1 - error,
        }
        if "distance" in self.hints:
            real = y[..., 0]
            found["distance_error"] = float(((output[..., 1] - y[..., 1]).abs() * real).sum() / real.sum())
        return found
