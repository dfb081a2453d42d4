"""The task ``multitask_digits``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task


def test_the_answers_are_those_of_the_digits():
    made, digits = make_task("multitask_digits"), make_task("digits")
    assert made.model_arguments() == {"inputs": 64, "outputs": (10, 2, 2, 2)}
    for split in ("train", "validation", "test"):
        (x, y), (pictures, digit) = made.splits[split], digits.splits[split]
        assert torch.equal(x, pictures.flatten(1))
        assert torch.equal(y[:, 0], digit)
        assert torch.equal(y[:, 1], digit % 2)
        assert torch.equal(y[:, 2], (digit >= 5).long())
        assert set(digit[y[:, 3] == 1].tolist()) == {0, 6, 8, 9}
    assert made.data_hash != digits.data_hash


def test_the_score_is_the_mean_over_the_questions():
    made = make_task("multitask_digits")
    x, y = made.splits["test"]
    books = {row.numpy().tobytes(): answers for row, answers in zip(x, y, strict=True)}

    def oracle(inputs):
        answers = torch.stack([books[row.numpy().tobytes()] for row in inputs])
        hot = [torch.nn.functional.one_hot(a, width) for a, width in zip(answers.T, made.widths, strict=True)]
        hot[1] = hot[1].flip(1)  # Always wrong about odd and even.
        return 50 * torch.cat(hot, 1).float()

    scores = made.evaluate(oracle, "test")
    assert scores["error"] == pytest.approx(0.25)
    assert scores["loss"] == pytest.approx(50 / 4, rel=1e-3)
    assert made.loss(oracle(x), y).item() == pytest.approx(50 / 4, rel=1e-3)
    assert made.evaluate(oracle, "test", max_batches=1)["error"] == pytest.approx(0.25)
