"""The dense-to-sparse gate against its equations, schedules and limits."""

from __future__ import annotations

import pytest
import torch

from gatework.core import advance, losses
from gatework.core.cost import count_flops
from gatework.experts import MoE
from gatework.gates import DenseToSparse

D, E = 6, 5


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gate(spread: float = 1.0, **settings) -> DenseToSparse:
    torch.manual_seed(0)
    made = DenseToSparse(D, E, **settings).double()
    torch.nn.init.normal_(made.weight, std=spread)
    return made


def routed(g, x, seed=3):
    torch.manual_seed(seed)
    return g(x).dense()


def noise(n: int, seed=3) -> torch.Tensor:
    torch.manual_seed(seed)
    return -torch.empty(n, E, dtype=torch.float64).exponential_().log()


@pytest.mark.parametrize("noisy_weights", [False, True])
@pytest.mark.parametrize("winner_only", [False, True])
def test_equals_the_equations_with_all_gradients(noisy_weights, winner_only):
    g, x = gate(noisy_weights=noisy_weights, balancing=0.3, tau_max=0.4), tokens().requires_grad_()
    g.winner_only.fill_(winner_only)
    got, said = routed(g, x), losses(g)["balance"]
    drawn = noise(len(x))
    rows, picks = [], []
    for n in range(len(x)):
        z = g.weight @ x[n]
        share = torch.softmax((z + drawn[n]) / g.temperature, 0)
        best = int((z + drawn[n]).argmax())
        picks.append(torch.tensor([float(e == best if winner_only else share[e] > 1e-3) for e in range(E)], dtype=torch.float64))
        rows.append(picks[n] * (share if noisy_weights else torch.softmax(z, 0)))
    wanted, chosen = torch.stack(rows), torch.stack(picks)
    assert 1 <= chosen.sum(1).min() <= chosen.sum(1).max() <= (1 if winner_only else E)
    assert winner_only or 1.5 < chosen.sum(1).mean() < 4.5
    balance = 0.3 * E**2 * sum(wanted[:, e].mean() * chosen[:, e].mean() for e in range(E)) / E
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    torch.testing.assert_close(said, balance, rtol=0, atol=1e-14)
    mine = torch.autograd.grad(got.square().sum() + said, [x, g.weight])
    theirs = torch.autograd.grad(wanted.square().sum() + balance, [x, g.weight])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_hot_gate_is_the_softmax_and_a_cold_one_a_race():
    x = tokens()
    hot = gate(tau_max=1e9)
    torch.testing.assert_close(routed(hot, x), (x @ hot.weight.T).softmax(1), rtol=0, atol=1e-14)
    cold = gate(tau_max=1e-6, tau_min=1e-6)
    dense = routed(cold, x)
    assert ((dense != 0).sum(1) == 1).all()
    winners = (x @ cold.weight.T + noise(len(x))).argmax(1)
    assert torch.equal(dense.argmax(1), winners)
    middle = routed(gate(tau_max=0.5), x)
    used = (middle != 0).sum(1)
    assert used.min() >= 1
    assert (middle.sum(1)[used < E] < 1).all()
    assert len(used.unique()) > 2


def test_evaluation_takes_the_most_probable_expert_without_noise():
    g, x = gate().eval(), tokens()
    probs = (x @ g.weight.T).softmax(1)
    routing = g(x)
    assert torch.equal(routing.experts[:, 0], probs.argmax(1))
    torch.testing.assert_close(routing.weights, probs.max(1, keepdim=True).values, rtol=0, atol=1e-15)
    assert g.k == 1
    g.dense_eval = True
    g.temperature.fill_(0.3)
    wanted = probs * ((x @ g.weight.T / g.temperature).softmax(1) > 1e-3)
    torch.testing.assert_close(g(x).dense(), wanted, rtol=0, atol=1e-15)
    assert 1 < (wanted != 0).sum(1).double().mean() < E
    assert g.k == E


@pytest.mark.parametrize("schedule", ["exp", "linear"])
def test_the_temperature_falls_and_arrives_exactly(schedule):
    g = gate(tau_max=2.0, tau_min=0.5, schedule=schedule, decay=0.5, hard=0.75)
    seen = []
    for step in range(1, 81):
        advance(g, step, 80)
        seen.append(g.temperature.item())
        t = step / 40
        formula = 2.0 * 0.25**t if schedule == "exp" else 2.0 - 1.5 * t
        assert seen[-1] == pytest.approx(max(formula, 0.5), rel=1e-12)
        assert bool(g.winner_only) == (step >= 60)
        assert g.k == (1 if step >= 60 else E)
    assert seen[38] > seen[39] == seen[40] == 0.5
    assert set(g.state_dict()) == {"weight", "temperature", "winner_only"}
    other = gate(tau_max=2.72, tau_min=0.41, schedule=schedule, decay=0.5)  # Where the formula is off by its rounding.
    advance(other, 5, 10)
    assert other.temperature.item() == 0.41
    never = gate(hard=None)
    advance(never, 80, 80)
    assert not never.winner_only


def test_fewer_experts_run_as_the_gate_cools():
    layer, x = MoE(D, d_ff=4, experts=E, gate="dense_to_sparse(tau_max=50.0, tau_min=0.1)").double(), tokens()
    torch.nn.init.normal_(layer.gate.weight)
    run, router, per_row = [], 40 * 2 * D * E, 2 * D * 3 * 4
    for step in (0, 30, 50, 60, 80):
        advance(layer, step, 100)
        with count_flops() as count:
            layer(x)
        run.append((count.total - router) / per_row)
    assert run[0] == 40 * E
    assert run == sorted(run, reverse=True)
    assert run[0] > run[1] > run[2] > run[4] == 40


def test_padding_enters_no_loss():
    g, x = gate(tau_max=1e9), tokens()
    mask = torch.arange(40) % 3 != 0
    dense, said = g(x, mask).dense(), losses(g)["balance"]
    assert not dense[~mask].any()
    g(x[mask])
    torch.testing.assert_close(said, losses(g)["balance"], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_min": 3.0}, "fall from tau_max to tau_min, got 2.0 and 3.0"),
        ({"tau_min": 0.0}, "temperatures are positive"),
        ({"decay": 0.0}, r"in \(0, 1\]"),
        ({"hard": 1.5}, r"in \(0, 1\]"),
        ({"balancing": -1.0}, "balancing 0"),
        ({"n_experts": 1000}, "n_experts must be below 1000, for a hot gate to choose all of them, got 1000"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DenseToSparse(D, **({"n_experts": E} | settings))
