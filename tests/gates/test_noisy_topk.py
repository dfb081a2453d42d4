"""Noisy top-k gating against the paper's equations."""

from __future__ import annotations

import pytest
import torch

from gatework.core import losses
from gatework.gates import NoisyTopK
from gatework.gates.base import cv_squared

D, E = 6, 5


def gate(**settings) -> NoisyTopK:
    made = NoisyTopK(D, E, **settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return made


def tokens(n: int = 9) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def softplus(x):
    return torch.log1p(x.exp())


@pytest.mark.parametrize("k", [1, 2, 5])
def test_training_follows_the_equations_under_the_same_noise(k):
    g, x = gate(k=k), tokens()
    torch.manual_seed(7)
    routing = g(x)
    found = losses(g)
    torch.manual_seed(7)
    noise = torch.randn(len(x), E, dtype=torch.float64)
    clean, scale = x @ g.weight.T, softplus(x @ g.noise_weight.T) + 1e-2
    h = clean + scale * noise
    dense, load = torch.zeros(len(x), E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for n in range(len(x)):
        chosen = sorted(range(E), key=lambda e: -h[n, e])[:k]
        dense[n, chosen] = torch.softmax(h[n, chosen], 0)
        for e in range(E):
            others = sorted((h[n, j].item() for j in range(E) if j != e), reverse=True)
            if k < E:
                z = (clean[n, e] - others[k - 1]) / scale[n, e]
                load[e] += 0.5 * (1 + torch.erf(z / 2**0.5))
    torch.testing.assert_close(routing.dense(), dense, rtol=0, atol=1e-12)
    importance = dense.sum(0)
    expected = {"importance": 0.1 * importance.var(correction=0) / importance.mean() ** 2}
    if k < E:
        expected["load_loss"] = 0.1 * load.var(correction=0) / load.mean() ** 2
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-9)


def test_evaluation_has_no_noise_and_draws_none():
    g, x = gate().eval(), tokens()
    before = torch.get_rng_state()
    torch.testing.assert_close(g(x).logits, x @ g.weight.T, rtol=0, atol=1e-12)
    assert torch.equal(before, torch.get_rng_state())
    assert not losses(g)


def test_the_start_is_uniform():
    g = NoisyTopK(D, E).double()
    assert not any(p.any() for p in g.parameters())
    routing = g.eval()(tokens())
    assert routing.experts.tolist() == [[0, 1]] * 9  # All tie: the lowest indices.
    torch.testing.assert_close(routing.weights, torch.full((9, 2), 0.5, dtype=torch.float64))


def test_equal_clean_logits_and_no_spread_have_no_load_loss():
    g = NoisyTopK(D, E).double()
    clean = torch.zeros(4, E, dtype=torch.float64)
    load = g.expected_load(clean, clean, torch.ones_like(clean))
    assert cv_squared(load).item() == pytest.approx(0, abs=1e-20)


def test_expected_load_is_the_expected_number_of_choices():
    g, x = gate(k=2), tokens(3)
    clean, scale = x @ g.weight.T, softplus(x @ g.noise_weight.T) + 1e-2
    generator = torch.Generator().manual_seed(2)
    total, chosen, draws = 0.0, torch.zeros(E, dtype=torch.float64), 4000
    for _ in range(draws):
        h = clean + scale * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
        load = g.expected_load(clean, h, scale)
        total = total + load.detach() / draws
        chosen += torch.bincount(h.topk(2).indices.flatten(), minlength=E) / draws
    assert total.sum().item() == pytest.approx(2 * 3, rel=0.02)
    torch.testing.assert_close(total, chosen, rtol=0.05, atol=0.05)


def test_cv_squared_uses_the_population_variance():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert cv_squared(values).item() == pytest.approx(3.5 / 9)


def test_gradients_reach_both_matrices():
    g = gate()
    routing = g(tokens())
    (routing.weights[:, 0].sum() + sum(losses(g).values())).backward()
    assert g.weight.grad.abs().sum() > 0
    assert g.noise_weight.grad.abs().sum() > 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="between 1 and the number of experts 5"):
        NoisyTopK(D, E, k=0)
    with pytest.raises(ValueError, match="at least 0"):
        NoisyTopK(D, E, load=-1.0)
