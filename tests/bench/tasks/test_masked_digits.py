"""The task ``masked_digits``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.core import GateworkError

from .made import take, task


@pytest.mark.parametrize(("patch", "ratio", "hidden"), [(2, 0.75, 12), (2, 0.5, 8), (4, 0.75, 3), (1, 0.9, 58)])
def test_what_is_hidden_is_asked_for(patch, ratio, hidden):
    made = make_task("masked_digits", patch=patch, ratio=ratio)
    assert made.model_arguments() == {"input_shape": (1, 8, 8), "hidden": hidden, "patch": patch}
    pictures = {split: task("digits").splits[split][0] for split in made.splits}
    for split, (x, y) in made.splits.items():
        assert x.shape == (len(pictures[split]), 2, 8, 8)
        assert y.shape == (len(x), hidden * patch**2)
        mask = x[:, 1] == 1
        assert ((x[:, 1] == 0) | mask).all()
        assert not x[:, 0][mask].any()
        assert torch.equal(x[:, 0][~mask], pictures[split][:, 0][~mask])
        for row, picture, hides in zip(y[:20], pictures[split][:20, 0], mask[:20], strict=True):
            squares = [
                (picture[i : i + patch, j : j + patch], hides[i : i + patch, j : j + patch])
                for i in range(0, 8, patch) for j in range(0, 8, patch)
            ]
            assert all(hide.all() or not hide.any() for _, hide in squares)
            assert torch.equal(row, torch.cat([square.flatten() for square, hide in squares if hide.all()]))


def test_every_place_is_hidden_as_often_and_anew_in_each_pass():
    made = task("masked_digits")
    assert made.splits["train"][0][:, 1].mean((0, 1, 2)).item() == pytest.approx(0.75)
    shares = made.splits["train"][0][:, 1].mean(0)
    assert shares.min() > 0.69
    assert shares.max() < 0.81
    first, second = (batch[0] for batch in take(made, 0, 1077, 2))
    order = [x[:, 0].flatten(1).sum(1).argsort() for x in (first, second)]
    assert not torch.equal(first[order[0], 1], second[order[1], 1])
    assert len({tuple(mask.flatten().tolist()) for mask in first[:, 1]}) > 500


def test_patches_can_be_normed():
    made = make_task("masked_digits", normalize=True)
    raw = task("masked_digits").splits["test"][1].unflatten(1, (12, 4))
    y = made.splits["test"][1].unflatten(1, (12, 4))
    torch.testing.assert_close(y.mean(-1), torch.zeros(360, 12), rtol=0, atol=1e-4)
    busy = raw.var(-1) > 1e-3
    torch.testing.assert_close(y.var(-1)[busy], torch.ones(int(busy.sum())), rtol=0, atol=2e-3)
    assert not y[raw.var(-1) == 0].any()


def test_the_score_is_the_error_of_the_hidden_pixels():
    made = task("masked_digits")
    x, y = made.splits["test"]
    answers = {row.numpy().tobytes(): target for row, target in zip(x, y, strict=True)}

    def predict(inputs):
        return torch.stack([answers[row.numpy().tobytes()] for row in inputs]) + 0.1

    assert made.evaluate(predict, "test")["mse"] == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 3}, "have patches of side 1, 2 or 4, not 3"),
        ({"ratio": 1.0}, "ratio 1.0 of 16 patches must hide and show at least one"),
        ({"patch": 4, "ratio": 0.9}, "ratio 0.9 of 4 patches"),
        ({"ratio": 0.0}, "ratio 0.0"),
        ({"ratio": math.nan}, "ratio nan of 16 patches"),
    ],
)
def test_wrong_options_meet_one_sentence(options, message):
    with pytest.raises(GateworkError, match=message):
        make_task("masked_digits", **options)
