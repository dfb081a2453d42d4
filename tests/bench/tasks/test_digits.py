"""The task ``digits``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task

from .made import take, task


def test_digits_are_stratified_pictures():
    made = task("digits")
    shares = [made.splits[part][1].bincount(minlength=10) / len(made.splits[part][1]) for part in ("train", "validation", "test")]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    assert (shares[0] - shares[2]).abs().max() < 0.005
    x = made.splits["train"][0]
    assert (x.min(), x.max()) == (0, 1)
    assert make_task("digits", split_seed=1).data_hash != made.data_hash


def test_an_epoch_shows_every_example_once():
    made = task("digits")
    batches = take(made, 0, 359, 6)  # 1077 = 3 x 359: two epochs.
    for epoch in (batches[:3], batches[3:]):
        shown = torch.cat([x for x, _ in epoch]).flatten(1)
        assert sorted(map(tuple, shown.tolist())) == sorted(map(tuple, made.splits["train"][0].flatten(1).tolist()))
    assert not torch.equal(batches[0][0], batches[3][0])
    assert made.units_per_batch(10_000) == 1077
    assert len(take(made, 0, 10_000, 2)[1][0]) == 1077


def test_error_of_a_known_predictor():
    made = task("digits")
    x, y = made.splits["test"]
    answers = {row.numpy().tobytes(): label.item() for row, label in zip(x, y, strict=True)}

    def predict(inputs):  # Right, except for the digit 3.
        labels = torch.tensor([answers[row.numpy().tobytes()] for row in inputs])
        return torch.nn.functional.one_hot(torch.where(labels == 3, 4, labels), 10).float()

    assert made.evaluate(predict, "test")["error"] == pytest.approx((y == 3).float().mean().item())
