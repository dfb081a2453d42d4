"""``g_forgetnet``."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gatework.core import PartError, losses, metrics
from gatework.gates.g_forgetnet import GForgetNet


def given(seed=0):
    torch.manual_seed(seed)
    return GForgetNet(inputs=3, d_model=4, penalty=0.2).double(), *(torch.randn(2, 5, n, dtype=torch.float64) for n in (3, 4))


def test_equation_loss_and_metric():
    part, x, h = given()
    torch.nn.init.normal_(part.gate.bias)
    gates = torch.empty_like(h)
    for row in range(2):
        for node in range(5):
            both = torch.cat([x[row, node], h[row, node]])
            gates[row, node] = 1 / (1 + (-(part.gate.weight @ both) - part.gate.bias).exp())
    assert_close(part(x, h), gates * h, rtol=0, atol=1e-12)
    assert_close(losses(part)["gate"], 0.2 * gates.mean(), rtol=0, atol=1e-12)
    part(x, h)
    found = metrics(part)["gate"]
    assert_close(found, gates.mean().detach(), rtol=0, atol=1e-12)
    assert not found.requires_grad
    losses(part)
    part.eval()(x, h)
    assert losses(part) == {}


def test_it_starts_half_open_and_the_penalty_closes_it():
    part, x, h = given()
    assert not part.gate.bias.any()
    assert part.values(x, h).mean().item() == pytest.approx(0.5, abs=0.1)
    optimizer, means = torch.optim.SGD(part.parameters(), 10.0), []
    for _ in range(60):
        part(x, h)
        (loss,) = losses(part).values()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(loss.item() / 0.2)
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.1


def test_limits_are_forgetnet_and_the_baseline():
    part, x, h = given()
    for bias, wanted in ((-torch.inf, torch.zeros_like(h)), (torch.inf, h)):
        torch.nn.init.constant_(part.gate.bias, bias)
        assert torch.equal(part(x, h), wanted)


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="inputs and d_model must be at least 1, got 0 and 4"):
        GForgetNet(0, 4)
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        GForgetNet(3, 4, penalty=-1.0)
    part, _, h = given()
    with pytest.raises(PartError, match=r"shapes \(\.\.\., 3\) and \(\.\.\., 4\) with the same rows, not \(2, 5, 4\)"):
        part(h, h)


def test_numbers_without_channels_are_refused(unchecked):
    for x, h in ((torch.zeros(()), torch.zeros(4)), (torch.zeros(3), torch.zeros(()))):
        with pytest.raises(PartError, match=r"inputs and state have the shapes \(\.\.\., 3\) and \(\.\.\., 4\)"):
            GForgetNet(3, 4)(x, h)
