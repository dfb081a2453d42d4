"""``federated_digits``: scikit-learn's digits, split over clients that see different classes."""

from __future__ import annotations

import numpy as np
import torch

from gatework.bench.tasks.base import Batch, Predict, Split, SupervisedTask
from gatework.bench.tasks.digits import Digits
from gatework.core.errors import GateworkError


class FederatedDigits(SupervisedTask):
    """The digits split over label-skewed clients; the score is 1 - the mean over the clients of their accuracies.

    Of each class, shares drawn from Dirichlet(``alpha``) go to the clients (as in Hsu et al., 2019, arXiv 1909.06335);
    the draw is repeated until every client has 40 examples. Each client's examples, shuffled, are cut into 60% to train and
    20% each to validate and test.

    In a study one model is trained on all clients' examples together, which no client could do. A federated trainer takes
    ``clients("train")``. ``evaluate`` calls ``predict`` once per client, with that client's examples in order.

    Args:
        count: number of clients.
        alpha: the smaller, the fewer classes has a client.
        split_seed: seed of the split.

    Raises:
        GateworkError: for fewer than 2 or more than 20 clients, ``alpha`` below 0.05, or where scikit-learn, which bundles the
            data, is not installed.
    """

    name = "federated_digits"
    defaults = Digits.defaults

    LEAST = 40

    def __init__(self, count: int = 8, alpha: float = 0.4, split_seed: int = 0) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise GateworkError('the digits need scikit-learn: pip install "gatework[bench]"') from None
        if not 2 <= count <= 20 or not alpha >= 0.05:
            raise GateworkError(f"count must be between 2 and 20 clients and alpha at least 0.05, got {count} and {alpha}")
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.tensor(pixels.reshape(-1, 1, 8, 8) / 16.0, dtype=torch.float32), torch.tensor(labels).long()
        rng = np.random.default_rng(split_seed)
        while True:
            owned = _deal(labels, count, alpha, rng)
            if min(map(len, owned)) >= self.LEAST:
                break
        self._clients: dict[str, list[Batch]] = {"train": [], "validation": [], "test": []}
        for rows in owned:
            held = len(rows) // 5
            pieces = np.split(rng.permutation(rows), [len(rows) - 2 * held, len(rows) - held])
            for split, piece in zip(self._clients, pieces, strict=True):
                self._clients[split].append((x[piece], y[piece]))
        splits = {
            split: (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for split, parts in self._clients.items()
        }
        super().__init__(splits, classes=10)

    def clients(self, split: str = "train") -> list[Batch]:
        """Inputs (n, 1, 8, 8) and labels (n,) of each client.

        Raises:
            GateworkError: for a split that there is not.
        """
        if split not in self._clients:
            raise GateworkError(f"no split {split!r}; there are {', '.join(self._clients)}")
        return self._clients[split]

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``accuracy`` and ``error``: means over the clients, each of which counts the same;
        over the first ``max_batches`` clients, where given."""
        losses, accuracies = [], []
        for x, y in self._clients[split][:max_batches]:
            output = predict(x).float()
            losses.append(float(torch.nn.functional.cross_entropy(output, y)))
            accuracies.append(float((output.argmax(-1) == y).float().mean()))
        accuracy = sum(accuracies) / len(accuracies)
        return {"loss": sum(losses) / len(losses), "accuracy": accuracy, "error": 1 - accuracy}


def _deal(labels: np.ndarray, count: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    """The rows of each client: of each class a share from one Dirichlet draw."""
    owned: list[list[np.ndarray]] = [[] for _ in range(count)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        borders = np.round(np.cumsum(rng.dirichlet([alpha] * count))[:-1] * len(rows)).astype(int)
        for client, piece in zip(owned, np.split(rows, borders), strict=True):
            client.append(piece)
    return [np.concatenate(pieces) for pieces in owned]
