"""The task ``federated_digits``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.core import GateworkError

from .made import task


def test_clients_share_out_the_digits_with_skewed_classes():
    made = task("federated_digits")
    parts = {name: made.clients(name) for name in ("train", "validation", "test")}
    rows = sorted(row.numpy().tobytes() for some in parts.values() for x, _ in some for row in x)
    every = sorted(row.numpy().tobytes() for x, _ in task("digits").splits.values() for row in x)
    assert rows == every
    shares = []
    for train, validation, test in zip(*parts.values(), strict=True):
        whole = sum(len(x) for x, _ in (train, validation, test))
        assert whole >= made.LEAST
        assert len(validation[0]) == len(test[0]) == whole // 5
        labels = torch.cat([y for _, y in (train, validation, test)])
        shares.append(labels.bincount(minlength=10) / whole)
    shares = torch.stack(shares)
    # With Dirichlet(0.4) a client's largest class is far above the tenth of an even split; with a large alpha it is not.
    assert shares.amax(1).mean() > 0.25
    even = make_task("federated_digits", alpha=1000.0).clients("train")
    assert torch.stack([y.bincount(minlength=10) / len(y) for _, y in even]).amax(1).mean() < 0.16
    assert len(make_task("federated_digits", count=5).clients()) == 5
    assert make_task("federated_digits", split_seed=1).data_hash != made.data_hash
    with pytest.raises(GateworkError, match="no split 'tests'; there are train, validation, test"):
        made.clients("tests")


def test_every_client_counts_the_same():
    made = task("federated_digits")
    sizes = [len(y) for _, y in made.clients("test")]
    asked = []

    def predict(x):  # All right for the first client, all wrong for the others.
        asked.append(len(x))
        y = made.clients("test")[len(asked) - 1][1]
        return torch.nn.functional.one_hot(y if len(asked) == 1 else (y + 1) % 10, 10).float()

    scores = made.evaluate(predict, "test")
    assert asked == sizes
    assert scores["accuracy"] == pytest.approx(1 / 8)
    assert scores["error"] == pytest.approx(7 / 8)
    asked.clear()
    assert made.evaluate(predict, "test", max_batches=2)["accuracy"] == 0.5
