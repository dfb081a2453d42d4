"""The gate over coordinates, against its equations."""

from __future__ import annotations

import pytest
import torch

from gatework.core import losses, metrics
from gatework.experts import MoE
from gatework.gates import HashGate

E = 5


def gate(d: int = 2, **settings) -> HashGate:
    torch.manual_seed(0)
    made = HashGate(d, E, **settings).double()
    torch.nn.init.normal_(made.encoding.table)
    return made


def points(d: int = 2, n: int = 40) -> torch.Tensor:
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_routing_and_gradients_follow_the_equations(d):
    g, x = gate(d), points(d).requires_grad_()
    routing = g(x)
    h = g.encoding(x)
    h = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * g.norm.weight + g.norm.bias
    p = torch.softmax(torch.relu(h @ g.hidden.weight.T + g.hidden.bias) @ g.out.weight.T + g.out.bias, 1)
    best, chosen = p.max(1)
    assert routing.experts[:, 0].tolist() == chosen.tolist()
    torch.testing.assert_close(routing.weights[:, 0], best, rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.probs, p, rtol=0, atol=1e-12)
    wanted = [x, *g.parameters()]
    for ours, expected in zip(
        torch.autograd.grad((routing.weights[:, 0].log()).sum(), wanted, retain_graph=True),
        torch.autograd.grad(best.log().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_balance_loss():
    g, x = gate(switch=0.5), points()
    routing = g(x)
    share = torch.bincount(routing.experts[:, 0], minlength=E).double() / 40
    expected = 0.5 * E * (share * routing.probs.mean(0)).sum()
    torch.testing.assert_close(losses(g)["switch"], expected, rtol=0, atol=1e-12)
    assert set(metrics(g)) == {"load", "max_violation", "dead", "entropy"}
    assert HashGate(2, 3).switch == 5e-4
    g = gate(switch=0.0)
    g(x)
    assert not losses(g)


def test_one_expert_has_weight_one():
    assert torch.equal(HashGate(2, 1)(points().float()).weights, torch.ones(40, 1))


def test_it_serves_a_layer_of_experts():
    layer = MoE(3, d_ff=4, experts=E, gate="hash").double()
    assert layer(points(3)).shape == (40, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"d_model": 16}, "1, 2 or 3 coordinates, got 16"), ({"hidden": 0}, "at least 1"), ({"switch": -1.0}, "switch 0")],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        HashGate(**({"d_model": 2, "n_experts": E} | settings))
