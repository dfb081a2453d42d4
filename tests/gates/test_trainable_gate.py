"""Trainable gates against the equation, channel by channel."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gatework import gates
from gatework.core import PartError, build, losses, metrics
from gatework.gates import TrainableGate

M = 1e5
W = [-0.7, -0.25, -1e-9, 0.0, 1e-9, 0.31, 0.123456789, 2.5]
D = len(W)


def gate(**settings):
    torch.manual_seed(0)
    made = TrainableGate(D, **settings).double().train()
    made.weight.data.copy_(torch.tensor(W, dtype=torch.float64))
    return made


def shape(w, kind):
    return 1.0 if kind == "one" else math.exp(-w) / (1 + math.exp(-w)) ** 2


def slope_of_shape(w, kind):
    s = 1 / (1 + math.exp(-w))
    return 0.0 if kind == "one" else s * (1 - s) * (1 - 2 * s)


def saw(w):
    return (M * w - math.floor(M * w)) / M


def inputs():
    x, upstream = torch.randn(2, 3, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, upstream


@pytest.mark.parametrize("kind", ["one", "sigmoid"])
def test_value_is_the_step_and_gradient_is_the_shape(kind):
    g, (x, upstream) = gate(gradient=kind, penalty=0.0), inputs()
    x.requires_grad_()
    step = torch.tensor([0.0 if w < 0 else 1.0 for w in W], dtype=torch.float64)
    y = g(x)
    assert torch.equal(y, x * step)
    assert torch.equal(g.values(), step)
    assert torch.equal(g.eval()(x), y)
    y.backward(upstream)
    wanted = torch.tensor([shape(w, kind) for w in W], dtype=torch.float64) * (upstream * x).sum((0, 1))
    torch.testing.assert_close(g.weight.grad, wanted.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(x.grad, upstream * step, rtol=0, atol=0)
    assert metrics(g)["pruned"] == 3 / D


@pytest.mark.parametrize("kind", ["one", "sigmoid"])
def test_the_literal_form_is_the_equation_and_the_plain_one_its_limit(kind):
    literal, plain, (x, upstream) = gate(gradient=kind, literal=True, penalty=0.0), gate(gradient=kind, penalty=0.0), inputs()
    tg = torch.tensor([(w >= 0) + saw(w) * shape(w, kind) for w in W], dtype=torch.float64)
    torch.testing.assert_close(literal(x), x * tg, rtol=1e-13, atol=1e-13)
    literal(x).backward(upstream)
    plain(x).backward(upstream)
    reached = (upstream * x).sum((0, 1))
    wanted = torch.tensor([shape(w, kind) + saw(w) * slope_of_shape(w, kind) for w in W], dtype=torch.float64) * reached
    torch.testing.assert_close(literal.weight.grad, wanted, rtol=1e-9, atol=0)
    step, g = plain.values(), torch.tensor([shape(w, kind) for w in W], dtype=torch.float64)
    assert ((literal(x) / x)[0, 0] - step).abs().le(g / M).all(), "|TG - b| < g / M"
    assert (literal.weight.grad - plain.weight.grad).abs().le(reached.abs() / M).all()
    assert torch.equal(literal.eval()(x), x * step), "evaluation uses the step"


@pytest.mark.parametrize("kind", ["one", "sigmoid"])
@pytest.mark.parametrize("target", [0.0, 0.375, 0.5])
def test_the_loss_and_where_it_is_zero(kind, target):
    g, (x, _) = gate(target=target, penalty=3.0, gradient=kind), inputs()
    g(x)
    said = losses(g)["target"]
    assert said.item() == pytest.approx(3 * (target - 3 / D) ** 2, abs=1e-15)
    assert (said == 0) == (target == 3 / D)
    said.backward()
    wanted = [3 * 2 * (target - 3 / D) / D * shape(w, kind) for w in W]
    torch.testing.assert_close(g.weight.grad, torch.tensor(wanted, dtype=torch.float64), rtol=1e-13, atol=1e-15)
    g.eval()(x)
    assert losses(g) == {}


def test_all_gates_open_is_the_identity_and_so_they_start():
    torch.manual_seed(0)
    g = TrainableGate(4000)
    assert 0 <= g.weight.min() < 1e-3 < 0.099 < g.weight.max() < 0.1
    x = torch.randn(2, 4000)
    assert torch.equal(g(x), x)


def test_gates_freeze_for_the_last_share_whatever_the_momentum_does():
    g, (x, _) = gate(freeze=0.3, penalty=0.0), inputs()
    optimizer = torch.optim.SGD(g.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    kept = None
    for step in range(1, 11):
        optimizer.zero_grad()
        g(x).square().mean().backward()
        optimizer.step()
        before = g.weight.detach().clone()
        g.advance(step, 10)
        if step == 7:
            kept = before
        if step >= 7:
            assert torch.equal(g.weight, kept)
            assert step == 7 or not torch.equal(before, kept), "the optimizer has not moved it, so this shows nothing"
        else:
            assert torch.equal(g.weight, before)
    free = gate()
    free.advance(9, 10)
    assert "kept" not in free.state_dict()


def test_half_of_the_units_close_and_the_compacted_network_is_the_gated_one():
    """On a task that four hidden units can do: the gates reach the target, and cutting changes nothing."""
    torch.manual_seed(0)
    x = torch.randn(256, 6, dtype=torch.float64)
    y = torch.relu(x[:, :4]).sum(1, keepdim=True)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)).double()
    made = gates.attach(model, "0", "trainable_gate(penalty=10)")
    own = list(made["0"].parameters())
    rest = [p for p in model.parameters() if p is not own[0]]
    optimizer = torch.optim.Adam([{"params": own, "lr": 3e-3}, {"params": rest, "lr": 1e-2}])
    for _ in range(400):
        optimizer.zero_grad()
        (F.mse_loss(model(x), y) + sum(losses(model).values())).backward()
        optimizer.step()
    closed = int((made["0"].values() == 0).sum())
    assert 6 <= closed <= 10
    gated = model.eval()(x)
    assert F.mse_loss(gated, y) < 0.1 * y.var()
    assert gates.compact(model) == {"0": (16, 16 - closed)}
    torch.testing.assert_close(model(x), gated, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1"),
        ({"penalty": -1.0}, "penalty 0"),
        ({"target": 1.0}, r"shares in \[0, 1\)"),
        ({"freeze": -0.1}, r"shares in \[0, 1\)"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainableGate(**({"d_model": 3} | settings))
    with pytest.raises(PartError, match="gradient must be one of 'one', 'sigmoid', got 'tanh'"):
        build("trainable_gate(gradient=tanh)", "channel_gate", d_model=3)
