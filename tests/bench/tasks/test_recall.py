"""The task ``recall``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.bench.tasks.base import IGNORE

from .made import take, task


@pytest.mark.parametrize(("vocab_size", "length", "pairs"), [(128, 64, 8), (34, 64, 16), (64, 32, 1), (256, 128, 4)])
def test_rows_of_recall(vocab_size, length, pairs):
    made = make_task("recall", vocab_size=vocab_size, length=length, pairs=pairs)
    half = vocab_size // 2
    for x, y in take(made, 1, 16, 4):
        assert x.shape == y.shape == (16, length)
        for row, labels in zip(x.tolist(), y.tolist(), strict=True):
            keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
            book = dict(zip(keys, values, strict=True))
            assert len(book) == len(set(values)) == pairs
            assert all(1 <= key < half for key in keys)
            assert all(half <= value < vocab_size for value in values)
            asked = [i for i, label in enumerate(labels) if label != IGNORE]
            assert sorted(row[i] for i in asked) == sorted(keys)
            assert all(labels[i] == book[row[i]] and i >= 2 * pairs and i % 2 == 0 for i in asked)
            assert all(row[i] not in book for i in range(2 * pairs, length) if i not in asked)
            assert all(0 <= token < vocab_size for token in row)


def test_most_queries_come_soon():
    """Gaps follow a power law: for one pair, gap g has the probability alpha g^(alpha - 1), normalised."""
    made = make_task("recall", length=32, pairs=1)
    gaps = torch.cat([((y != IGNORE).long().argmax(1) - 2) // 2 for _, y in take(made, 0, 2000, 10)])
    share = gaps.bincount(minlength=15) / len(gaps)
    weights = torch.arange(1, 16, dtype=torch.float64) ** (0.01 - 1)
    torch.testing.assert_close(share.double(), weights / weights.sum(), rtol=0, atol=0.012)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**31 + 1, 2**32 + 1, 2**40])
def test_no_training_seed_shows_the_evaluation_rows(seed):
    made = task("recall")
    known = {row.numpy().tobytes() for split in ("validation", "test") for row in made.fixed[split, 1][0]}
    keys = {row[: 2 * made.pairs : 2].numpy().tobytes() for split in ("validation", "test") for row in made.fixed[split, 1][0]}
    assert len(known) == 2 * made.EVALUATION_ROWS
    for size in (32, 512):
        for x, _ in take(made, seed, size, 4):
            assert not known & {row.numpy().tobytes() for row in x}
            assert not keys & {row[: 2 * made.pairs : 2].numpy().tobytes() for row in x}


def test_only_queries_are_scored():
    made = task("recall")
    x, y = made.fixed["test", 1]
    books = {row.numpy().tobytes(): labels for row, labels in zip(x, y, strict=True)}

    def oracle(inputs):
        labels = torch.stack([books[row.numpy().tobytes()] for row in inputs])
        return torch.nn.functional.one_hot(labels.clamp_min(0), made.vocab_size).float() * 50

    scores = made.evaluate(oracle, "test")
    assert (scores["accuracy"], scores["error"]) == (1.0, 0.0)
    assert scores["loss"] < 1e-3
    assert made.loss(oracle(x), y).item() < 1e-3
    assert torch.equal(x, make_task("recall").fixed["test", 1][0])


def test_longer_rows_hold_as_many_pairs_and_are_scored_by_their_length():
    made = make_task("recall", length=32, pairs=4, extrapolate=True)
    assert {key: rows[0].shape for key, rows in made.fixed.items()} == {
        (split, times): (512, 32 * times) for split in ("validation", "test") for times in (1, 2, 4)
    }
    answers = {rows[0].numpy().tobytes(): rows[1] for (_, times), rows in made.fixed.items() if times == 2}
    assert all(((y != IGNORE).sum(1) == 4).all() for y in answers.values())
    sizes = []

    def predict(x):
        """Right up to 64 tokens, and never beyond."""
        sizes.append(x.shape[1])
        known = {row.numpy().tobytes(): label for rows in made.fixed.values() for row, label in zip(*rows, strict=True)}
        y = torch.stack([known[row.numpy().tobytes()] for row in x])
        return torch.nn.functional.one_hot(y.clamp(min=0) + (x.shape[1] > 64), made.vocab_size + 1).float()

    said = made.evaluate(predict, "test")
    assert (said["error"], said["error_at_64"], said["error_at_128"]) == (0, 0, 1)
    assert sizes == [32] * 8 + [64] * 8 + [128] * 8
    names = {"loss", "accuracy", "error", "last_error", "row_error"}
    assert set(make_task("recall").evaluate(lambda x: torch.zeros(*x.shape, 128), "test")) == names
    assert set(said) == names | {f"{name}_at_{n}" for name in ("error", "last_error", "row_error") for n in (32, 64, 128)}
