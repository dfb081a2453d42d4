"""The task ``ranking``."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task


def test_clicks_follow_the_hidden_types():
    task = make_task("ranking", examples=8000)
    x, y = (torch.cat([task.splits[split][i] for split in ("train", "validation", "test")]) for i in (0, 1))
    chance = task.logits.sigmoid()
    for low, high in ((0.0, 0.2), (0.4, 0.6), (0.8, 1.0)):
        rows = (chance > low) & (chance < high)
        assert y[rows].mean().item() == pytest.approx(chance[rows].mean().item(), abs=0.04)
    assert task.logits.std().item() == pytest.approx(3, rel=0.1)
    length = (x[:, 2:] != 0).sum(1)
    assert torch.bincount(length, minlength=9).float().div(len(x)).sub(1 / 9).abs().max() < 0.02
    assert bool(((x[:, 2:] != 0) == (torch.arange(8) < length[:, None])).all())
    shares = torch.stack([torch.bincount(x[task.types == t, 2:].flatten(), minlength=201)[1:].float() for t in range(4)])
    shares = shares / shares.sum(1, keepdim=True)
    assert (shares[:, None] - shares[None]).abs().sum(-1).add(2 * torch.eye(4)).min() > 0.5  # A history reveals its type.
