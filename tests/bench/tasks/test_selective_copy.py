"""The task ``selective_copy``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.bench.tasks.base import IGNORE
from gatework.core import GateworkError

from .made import take


@pytest.mark.parametrize("fixed_places", [False, True])
@pytest.mark.parametrize(("vocab_size", "length", "copied"), [(10, 72, 8), (4, 2, 1), (16, 40, 16), (5, 30, 15)])
def test_rows(vocab_size, length, copied, fixed_places):
    made = make_task("selective_copy", vocab_size=vocab_size, length=length, copied=copied, fixed_places=fixed_places)
    for x, y in take(made, 1, 16, 4):
        assert x.shape == y.shape == (16, length)
        for row, labels in zip(x.tolist(), y.tolist(), strict=True):
            slots, markers = row[: length - copied], row[length - copied :]
            data = [token for token in slots if token]
            assert markers == [vocab_size - 1] * copied
            assert all(1 <= token <= vocab_size - 2 for token in data)
            assert labels == [IGNORE] * (length - copied) + data
            if fixed_places:
                assert slots == data + [0] * (length - 2 * copied)


def test_every_place_and_every_token_is_equally_likely():
    made = make_task("selective_copy", vocab_size=7, length=20, copied=4)
    rows = torch.cat([x[:, :16] for x, _ in take(made, 0, 4000, 5)])
    torch.testing.assert_close((rows > 0).double().mean(0), torch.full((16,), 0.25, dtype=torch.float64), rtol=0, atol=0.012)
    share = rows[rows > 0].bincount(minlength=6)[1:].double() / (rows > 0).sum()
    torch.testing.assert_close(share, torch.full((5,), 0.2, dtype=torch.float64), rtol=0, atol=0.006)
    together = ((rows[:, 0] > 0) & (rows[:, 1] > 0)).double().mean()
    assert together.item() == pytest.approx(4 * 3 / (16 * 15), abs=0.006)  # Places are drawn without replacement.


@pytest.mark.parametrize("fixed_places", [False, True])
def test_longer_rows_hold_as_many_tokens(fixed_places):
    made = make_task("selective_copy", vocab_size=8, length=24, copied=5, fixed_places=fixed_places, extrapolate=True)
    widths = set()

    def answer(x):
        """What a copier says: at the j-th marker the j-th token that is no noise."""
        widths.add(x.shape[1])
        said = torch.zeros_like(x)
        for row, out in zip(x, said, strict=True):
            out[row == 7] = row[(row > 0) & (row < 7)]
        return torch.nn.functional.one_hot(said, 8).float() * 30

    said = made.evaluate(answer, "test")
    assert widths == {24, 48, 96}
    assert {said[f"{name}_at_{n}"] for name in ("error", "last_error", "row_error") for n in widths} == {0.0}
    assert said["loss"] < 1e-6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"vocab_size": 3}, "vocab_size must be at least 4 .* got 3"),
        ({"copied": 0}, "copied must be at least 1, got 0"),
        ({"copied": 37}, "37 tokens to copy need a length of at least 74, got 72"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(GateworkError, match=sentence):
        make_task("selective_copy", **options)
