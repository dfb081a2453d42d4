"""The router z-loss against its equation."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import PartError, Routing, losses
from gatework.gates import TopK, ZLoss

N, E = 6, 4


def routing(logits: torch.Tensor) -> Routing:
    return Routing(logits[:, :1].detach(), torch.zeros(len(logits), 1, dtype=torch.long), E, logits)


def test_by_the_equation():
    logits = 5 * torch.randn(N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(N) % 2 == 0
    rows = [math.log(sum(math.exp(value) for value in row)) ** 2 for row in logits.tolist()]
    assert ZLoss(0.3)(routing(logits)).item() == pytest.approx(0.3 * sum(rows) / N, rel=1e-12)
    assert ZLoss(0.3)(routing(logits), mask).item() == pytest.approx(0.3 * sum(rows[::2]) / 3, rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: ZLoss(0.3)(routing(z)), logits.requires_grad_())


def test_large_logits_stay_finite():
    assert ZLoss(1.0)(routing(torch.full((1, E), 1e4))).item() == pytest.approx((1e4 + math.log(E)) ** 2)


def test_a_constant_on_all_logits_changes_z_alone():
    torch.manual_seed(0)
    g = TopK(5, E, balance=["switch(1.0)", "z_loss(1.0)"]).double()
    torch.nn.init.normal_(g.weight)
    x = torch.randn(N, 5, dtype=torch.float64)
    x[:, -1] = 1
    first, before = g(x), losses(g)
    with torch.no_grad():
        g.weight[:, -1] += 2.5
    second, after = g(x), losses(g)
    assert torch.equal(first.experts, second.experts)
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(before["switch"], after["switch"], rtol=0, atol=1e-12)
    assert abs(after["z_loss"] - before["z_loss"]) > 0.1


def test_wrong_use():
    with pytest.raises(ValueError, match="weight must be at least 0"):
        ZLoss(-1.0)
    with pytest.raises(PartError, match="z_loss needs the logits of a routing, and this gate has none"):
        ZLoss()(Routing(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), 2))
