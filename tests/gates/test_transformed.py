"""The transformed softmax gate: equations, invariances, and why the theory transforms it."""

from __future__ import annotations

import pytest
import torch

from gatework.core import losses
from gatework.gates import Transformed

D, E = 4, 5
BOUNDED = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


def gate(**settings) -> Transformed:
    made = Transformed(D, E, **settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def tokens(n: int = 12) -> torch.Tensor:
    return 2 * torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("transform", BOUNDED)
@pytest.mark.parametrize("k", [None, 2, 3, 5])
def test_by_the_equations(transform, k):
    g, x = gate(k=k, transform=transform), tokens()
    weight, bias = (p.detach().clone().requires_grad_() for p in (g.weight, g.bias))
    expected, unlike = [], 0
    for n in range(len(x)):
        scores = [weight[e] @ BOUNDED[transform](x[n]) for e in range(E)]
        chosen = sorted(range(E), key=lambda e: -scores[e].item())[: k or E]
        unlike += set(chosen) != set(sorted(range(E), key=lambda e: -(scores[e] + bias[e]).item())[: k or E])
        kept = torch.stack([(scores[e] + bias[e]).exp() for e in chosen])
        row = torch.zeros(E, dtype=torch.float64)
        row[chosen] = kept / kept.sum()
        expected.append(row)
    assert (unlike > 0) == (k in (2, 3))  # That the choice leaves b0 out makes a difference here.
    expected = torch.stack(expected)
    dense = g(x).dense()
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-12)
    assert ((dense != 0).sum(1) == (k or E)).all()
    pull = torch.randn(len(x), E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((dense * pull).sum(), [g.weight, g.bias])
    torch.testing.assert_close(found, torch.autograd.grad((expected * pull).sum(), [weight, bias]), rtol=0, atol=1e-12)


def test_all_experts_are_the_dense_gate():
    x = tokens()
    assert torch.equal(gate(k=E)(x).dense(), gate()(x).dense())


@pytest.mark.parametrize("k", [None, 2])
def test_adding_the_same_to_all_experts_changes_nothing(k):
    g, x = gate(k=k), tokens()
    before = g(x).dense()
    with torch.no_grad():
        g.weight += torch.linspace(-1, 2, D)
        g.bias += 0.7
    torch.testing.assert_close(g(x).dense(), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", BOUNDED)
def test_the_interaction_that_the_transform_removes(transform):
    # u_s = exp(b1.M(x) + b0) softmax_s(c + d.x): by b1 and c_s it is M(x) times, and no longer x times, its derivative by c_s; so
    # the plain gate's d2u / db1 dc_s = du / dd_s, which is x times it, is gone.
    g, x = gate(transform=transform), tokens(1)
    c, d = (t.requires_grad_() for t in (torch.randn(3, dtype=torch.float64), torch.randn(3, D, dtype=torch.float64)))
    u = g(x).logits[0, 0].exp() * torch.softmax(c + d @ x[0], 0)[1]
    by_c, by_d = torch.autograd.grad(u, [c, d], create_graph=True)
    for s in range(3):
        mixed = torch.autograd.grad(by_c[s], g.weight, retain_graph=True)[0][0]
        torch.testing.assert_close(mixed, BOUNDED[transform](x[0]) * by_c[s].detach(), rtol=0, atol=1e-14)
        assert (mixed - by_d[s].detach()).abs().max() > 0.1 * by_d[s].abs().max()


def test_balance_terms_and_the_start():
    g = Transformed(D, E, k=1, balance=["switch(0.5)", "loss_free"]).double()
    assert not g.bias.any()
    torch.manual_seed(0)
    assert Transformed(128, 64).weight.std().item() == pytest.approx(0.02, rel=0.05)
    routing = g(tokens())
    assert (routing.weights == 1).all()
    losses(g)["switch"].backward()
    assert g.weight.grad.any()
    assert g.balance.loss_free.counts.sum() == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 6}, "k must be between 1 and the number of experts 5, got 6"), ({"k": 0}, "k must be between 1"),
     ({"k": 1}, "with k=1 the only weight is always 1")],
)  # fmt: skip
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        Transformed(D, E, **settings)
