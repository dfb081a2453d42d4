"""The task ``image_regression``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task


def test_the_picture_is_smooth_on_one_half_and_a_checkerboard_on_the_other():
    made = make_task("image_regression", side=32, square=2, seed=3)
    x, y = (torch.cat([made.splits[name][i] for name in ("train", "validation", "test")]) for i in (0, 1))
    assert [len(made.splits[name][0]) for name in ("train", "validation", "test")] == [616, 204, 204]
    picture = torch.full((32, 32), math.nan)
    where = x * 32 - 0.5
    assert torch.equal(where, where.round())
    picture[tuple(where.long().T)] = y[:, 0]
    assert not picture.isnan().any(), "every pixel is in one split"
    board = [[1.0 if (i // 2 + j // 2) % 2 == 0 else -1.0 for j in range(32)] for i in range(16, 32)]
    assert picture[16:].tolist() == board
    smooth = picture[:16]
    assert smooth.mean().item() == pytest.approx(0, abs=1e-6)
    assert smooth.var(correction=0).item() == pytest.approx(1, rel=1e-5)
    steps = torch.cat([smooth.diff(dim=0).flatten(), smooth.diff(dim=1).flatten()])
    assert steps.abs().max() < 0.8 < picture[16:].diff(dim=1).abs().max()
    perfect = made.evaluate(lambda x: picture[tuple((x * 32 - 0.5).long().T)][:, None] + 0.1, "test")
    assert perfect["mse"] == pytest.approx(0.01, rel=1e-4)
    assert perfect["psnr"] == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-4)
