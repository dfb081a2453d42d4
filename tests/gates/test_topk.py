"""Plain top-k routing: weights, statistics, the balance terms that it takes."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import build, losses, metrics
from gatework.gates import NoisyTopK, Switch, TopK, ZLoss
from gatework.gates.base import top_k

D, E = 6, 5


def gate(**settings) -> TopK:
    torch.manual_seed(0)
    made = TopK(D, E, **settings).double()
    torch.nn.init.normal_(made.weight)
    return made


def tokens(n: int = 12) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", ["renorm", "topk_softmax", "none"])
def test_weights_follow_the_equations(k, score, normalize):
    g, x = gate(k=k, score=score, normalize=normalize), tokens()
    routing = g(x)
    for n in range(len(x)):
        logits = g.weight @ x[n]
        s = torch.softmax(logits, 0) if score == "softmax" else torch.sigmoid(logits)
        chosen = sorted(range(E), key=lambda e: -s[e])[:k]
        kept = s[chosen]
        if normalize == "renorm":
            kept = kept / kept.sum()
        elif normalize == "topk_softmax":
            kept = torch.softmax(logits[chosen], 0)
        assert routing.experts[n].tolist() == chosen
        torch.testing.assert_close(routing.weights[n], kept, rtol=0, atol=1e-12)
    assert ((routing.dense() != 0).sum(1) == k).all()


def test_topk_softmax_is_softmax_then_renorm():
    x = tokens()
    a, b = gate(normalize="topk_softmax")(x), gate(normalize="renorm")(x)
    torch.testing.assert_close(a.weights, b.weights, rtol=0, atol=1e-14)


def test_one_expert_keeps_a_gradient_by_default():
    g = gate(k=1)
    assert g.normalize == "none"
    g(tokens()).weights.sum().backward()
    assert g.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("k", [2, 5])
def test_ties_go_to_the_lower_index(k):
    assert top_k(torch.zeros(3, E), k).tolist() == [list(range(k))] * 3
    assert top_k(torch.tensor([[0.0, 1.0, 1.0, 2.0, 1.0]]), 3).tolist() == [[3, 1, 2]]


def test_losses_only_in_training():
    g = gate().eval()
    g(tokens(17))
    assert not losses(g)
    assert set(metrics(g)) == {"load", "entropy", "max_violation", "dead"}
    g(tokens(16))  # A step of decoding.
    assert metrics(g) == {}


def test_padding_is_routed_nowhere_and_enters_nothing():
    g, x = gate(balance=["switch(1.0)", "z_loss(1.0)", "importance", "loss_free"]), tokens()
    free = g.balance.loss_free
    mask = torch.arange(len(x)) % 3 != 0
    full = g(x, mask)
    with_padding, seen, counted = losses(g), metrics(g), free.counts.clone()
    free.counts.zero_()
    alone = g(x[mask])
    assert not full.weights[~mask].any()
    torch.testing.assert_close(full.weights[mask], alone.weights, rtol=0, atol=0)
    for name, value in losses(g).items():
        torch.testing.assert_close(with_padding[name], value, rtol=0, atol=1e-12)
    for name, value in metrics(g).items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-12)
    assert set(with_padding) == {"switch", "z_loss", "importance"}
    assert torch.equal(counted, free.counts)


def test_metrics_by_hand():
    g, x = gate(k=2), tokens()
    routing = g(x)
    found = metrics(g)
    counts = torch.bincount(routing.experts.flatten(), minlength=E).double()
    torch.testing.assert_close(found["load"], counts / counts.sum())
    assert found["max_violation"].item() == pytest.approx((counts.max() / counts.mean() - 1).item())
    entropy = -(routing.probs * routing.probs.log()).sum(1).mean()
    assert found["entropy"].item() == pytest.approx(entropy.item())


def test_routing_is_float32_under_autocast():
    g = TopK(D, E)
    x = torch.randn(7, D)
    with torch.autocast("cpu", torch.bfloat16):
        routing = g(x)
    assert routing.weights.dtype == torch.float32
    torch.testing.assert_close(routing.logits, x @ g.weight.T, rtol=0, atol=1e-6)
    assert g(x.bfloat16()).weights.dtype == torch.float32


def test_jitter_only_in_training():
    g, x = gate(jitter=0.01), tokens()
    torch.manual_seed(0)
    noisy = g(x).logits
    exact = x @ g.weight.T
    assert 0 < (noisy - exact).abs().max() < 0.1
    torch.testing.assert_close(g.eval()(x).logits, exact, rtol=0, atol=1e-12)


def test_initialisation():
    torch.manual_seed(0)
    weight = TopK(256, 64).weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert math.isclose(weight.mean().item(), 0, abs_tol=1e-3)


@pytest.mark.parametrize(
    ("balance", "names"),
    [
        ([], []), (None, []), ("switch(0.5)", ["switch"]), (ZLoss, ["z_loss"]), (Switch(0.5), ["switch"]),
        ([ZLoss(0.1), "importance", Switch], ["z_loss", "importance", "switch"]),
        (("loss_free", Switch), ["loss_free", "switch"]),
    ],
)
def test_balance_takes_expressions_classes_and_instances(balance, names):
    g = TopK(D, E, balance=balance)
    assert list(g.balance) == names
    g(tokens().float())
    assert list(losses(g)) == [name for name in names if name != "loss_free"]


def test_balance_in_an_expression():
    g = build("topk(k=1, balance=[switch(0.5), loss_free(rate=0.1)])", "gate", d_model=D, n_experts=E)
    assert (g.balance.switch.weight, g.balance.loss_free.rate, g.balance.loss_free.n_experts) == (0.5, 0.1, E)
    assert list(build("topk(balance=z_loss)", "gate", d_model=D, n_experts=E).balance) == ["z_loss"]
    default = build("topk", "gate", d_model=D, n_experts=E).balance
    assert {name: term.weight for name, term in default.items()} == {"switch": 0.01, "z_loss": 0.001}


@pytest.mark.parametrize("cls", [TopK, NoisyTopK])
def test_padding_gets_no_gradient_from_the_terms(cls):
    torch.manual_seed(0)
    g, x = cls(D, E, balance=["importance", "switch", "z_loss"]).double(), tokens().requires_grad_()
    torch.nn.init.normal_(g.weight)
    mask = torch.arange(len(x)) % 2 == 0
    g(x, mask)
    sum(losses(g).values()).backward()
    assert not x.grad[~mask].any()
    assert x.grad[mask].any(1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 6}, "k must be between 1 and the number of experts 5, got 6"),
        ({"jitter": 1.0}, "jitter must be in"),
        ({"balance": "switch(weight=-1.0)"}, "switch: weight must be at least 0, got -1.0"),
        ({"balance": ["switch", Switch(0.1)]}, "balance has switch twice; give each term once"),
        ({"balance": "load"}, "load needs clean and scale, which this gate does not have; noisy_topk does"),
        ({"balance": "topk"}, "'topk' is a gate, not a balance"),
        ({"balance": ["loss_free(n_experts=4)"]}, "loss_free: n_experts is 5 in the model around it"),
        ({"balance": build("loss_free(n_experts=4)", "balance")}, "loss_free is made for 4 experts, the gate has 5"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        TopK(D, E, **settings)
