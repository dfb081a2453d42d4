"""The task ``parity``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.bench.tasks.base import IGNORE
from gatework.core import GateworkError

from .made import take


@pytest.mark.parametrize("length", [1, 2, 40])
def test_every_place_of_a_dense_row_carries_the_parity_so_far(length):
    made = make_task("parity", length=length, least=1)
    for x, y in take(made, 2, 16, 3):
        assert x.shape == y.shape == (16, length)
        for row, labels in zip(x.tolist(), y.tolist(), strict=True):
            odd = 0
            for bit, label in zip(row, labels, strict=True):
                odd ^= bit
                assert label == odd


def test_bits_are_fair_and_independent():
    x = torch.cat([x for x, _ in take(make_task("parity", length=6), 0, 4096, 8)])
    patterns = (x * 2 ** torch.arange(6)).sum(1).bincount(minlength=64).double() / len(x)
    torch.testing.assert_close(patterns, torch.full((64,), 1 / 64, dtype=torch.float64), rtol=0, atol=0.003)


def test_a_row_that_is_not_dense_asks_for_one_length_of_its_range():
    made = make_task("parity", length=9, least=4, dense=False, extrapolate=True)
    ranges = {9: range(4, 10), 18: range(10, 19), 36: range(19, 37)}  # In bits; what is longer is asked nowhere before.
    batches = {9: take(made, 0, 600, 1)[0], 18: made.fixed["test", 2], 36: made.fixed["test", 4]}
    for width, (x, y) in batches.items():
        assert x.shape[1] == width
        assert ((y != IGNORE).sum(1) == 1).all()
        ends = (y != IGNORE).long().argmax(1)
        assert set((ends + 1).tolist()) == set(ranges[width])
        for row, labels, end in zip(x.tolist(), y.tolist(), ends.tolist(), strict=True):
            assert labels[end] == sum(row[: end + 1]) % 2
    asked = batches[9][1]
    share = (asked != IGNORE).double().mean(0)
    torch.testing.assert_close(share[3:], torch.full((6,), 1 / 6, dtype=torch.float64), rtol=0, atol=0.06)


def test_one_place_wrong_is_one_label_one_row_and_perhaps_the_last():
    made = make_task("parity", length=10, extrapolate=True)

    def answer(x):
        """The first row of a batch is missed at its last place up to 20 bits, at its first beyond."""
        y = x.cumsum(1) % 2
        place = -1 if x.shape[1] <= 20 else 0
        y[0, place] = 1 - y[0, place]
        return torch.nn.functional.one_hot(y, 2).float()

    said, batches = made.evaluate(answer, "test"), 512 / 64
    assert said["error"] == pytest.approx(batches / 512 / 10)
    assert said["accuracy"] == pytest.approx(1 - said["error"])
    assert said["last_error"] == said["row_error"] == pytest.approx(batches / 512)
    assert {name: said[f"{name}_at_10"] for name in ("error", "last_error", "row_error")} == {
        name: said[name] for name in ("error", "last_error", "row_error")
    }
    assert (said["last_error_at_20"], said["last_error_at_40"]) == (pytest.approx(batches / 512), 0)
    assert said["row_error_at_40"] == pytest.approx(batches / 512)
    assert said["error_at_40"] == pytest.approx(batches / 512 / 40)


def test_what_does_not_look_scores_chance():
    made = make_task("parity", extrapolate=True)
    said = made.evaluate(lambda x: torch.nn.functional.one_hot(torch.zeros_like(x), 2).float(), "validation")
    assert all(said[f"error_at_{n}"] == pytest.approx(0.5, abs=0.02) for n in (40, 80, 160))
    assert said["row_error"] == 1


@pytest.mark.parametrize("least", [0, 41])
def test_a_least_length_outside_is_refused(least):
    with pytest.raises(GateworkError, match=f"least must be between 1 and the length 40, got {least}"):
        make_task("parity", least=least)
