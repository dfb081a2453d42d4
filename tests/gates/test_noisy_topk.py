"""Noisy top-k gating against the paper's equations."""

from __future__ import annotations

import pytest
import torch

from gatework.core import losses
from gatework.gates import NoisyTopK

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
        expected["load"] = 0.1 * load.var(correction=0) / load.mean() ** 2
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


def test_gradients_reach_both_matrices():
    g = gate()
    routing = g(tokens())
    (routing.weights[:, 0].sum() + sum(losses(g).values())).backward()
    assert g.weight.grad.abs().sum() > 0
    assert g.noise_weight.grad.abs().sum() > 0


def test_wrong_arguments():
    with pytest.raises(ValueError, match="between 1 and the number of experts 5"):
        NoisyTopK(D, E, k=0)
    with pytest.raises(ValueError, match="load: weight must be at least 0, got -1"):
        NoisyTopK(D, E, balance="load(-1.0)")


def test_any_term_fits():
    g = gate(balance=["switch(1.0)", "z_loss(1.0)", "loss_free(0.5)", "load"])
    g.balance.loss_free.bias[3] = 1e4
    routing = g(tokens())
    assert (routing.experts[:, 0] == 3).all()  # The bias decides who is chosen ...
    torch.testing.assert_close(routing.weights, routing.logits.gather(1, routing.experts).softmax(1), rtol=0, atol=0)  # ... alone.
    assert set(losses(g)) == {"switch", "z_loss", "load"}
    assert g.balance.loss_free.counts.sum() == 9 * 2
