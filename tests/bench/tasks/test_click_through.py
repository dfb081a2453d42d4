"""The task ``click_through``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task

from .made import task


def test_half_of_the_fields_and_of_the_values_mean_nothing():
    made = make_task("click_through", fields=8, values=10, examples=2000)
    table = made.informative.view(8, 10)
    assert sorted(table.sum(1).tolist()) == [0] * 4 + [5] * 4
    x, y = made.splits["train"]
    assert [len(made.splits[name][0]) for name in ("train", "validation", "test")] == [2000, 500, 500]
    assert torch.equal(x.div(10, rounding_mode="floor"), torch.arange(8).expand_as(x))
    assert set(y.tolist()) == {0.0, 1.0}
    share = x[:, 0].bincount(minlength=10).double().sort(descending=True).values / len(x)
    weights = 1 / torch.arange(1, 11, dtype=torch.float64)
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0, atol=0.03)
    assert make_task("click_through", fields=8, values=10, examples=2000, data_seed=1).data_hash != made.data_hash


def test_labels_of_clicks_follow_what_is_informative_and_nothing_else():
    """The share of clicks moves with an informative value by much more than chance, with another by chance."""
    made = make_task("click_through", fields=8, values=10, examples=40_000)
    x, y = made.splits["train"]
    z = []
    for feature in range(80):
        there = (x == feature).any(1)
        z.append(((y[there].mean() - y[~there].mean()) / (y.std() * (1 / there.sum() + 1 / (~there).sum()).sqrt())).abs())
    z = torch.stack(z)
    # A value that means nothing stands against the others of its field: it moves the share where the rest of the field means
    # something, so only the fields of pure noise are quiet.
    quiet = ~made.informative.view(8, 10).any(1)
    assert z.view(8, 10)[quiet].max() < 4
    assert z.view(8, 10)[~quiet].amax(1).min() > 8


def test_auc_is_that_of_the_ranks():
    made = task("click_through")
    _, y = made.splits["test"]
    assert made.evaluate(lambda x: torch.zeros(len(x)), "test")["auc"] == 0.5
    scores = torch.linspace(-1, 1, len(y))[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))] + y
    given = iter(scores.split(made.EVALUATION_BATCH))
    found = made.evaluate(lambda x: next(given), "test")
    wins = (scores[y == 1][:, None] > scores[y == 0][None, :]).double().mean().item()
    assert found["auc"] == pytest.approx(wins, abs=1e-9)
    assert found["auc_error"] == pytest.approx(1 - wins, abs=1e-9)
    assert math.isnan(made.evaluate(lambda x: torch.full((len(x),), math.nan), "test")["auc"])
