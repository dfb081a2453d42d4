"""Plain top-k routing: weights, balance losses, the loss-free bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gatework.core import advance, losses, metrics
from gatework.gates import TopK
from gatework.gates.base import switch_loss, top_k

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


def test_a_constant_on_all_logits_changes_z_alone():
    g, x = gate(switch=1.0, z=1.0), tokens()
    x = torch.cat([x[:, :-1], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    first, before = g(x), losses(g)
    with torch.no_grad():
        g.weight[:, -1] += 2.5
    second, after = g(x), losses(g)
    assert torch.equal(first.experts, second.experts)
    torch.testing.assert_close(first.weights, second.weights, rtol=0, atol=1e-12)
    torch.testing.assert_close(before["switch"], after["switch"], rtol=0, atol=1e-12)
    z = torch.logsumexp(x @ g.weight.T, 1).square().mean()
    torch.testing.assert_close(after["z"], z, rtol=0, atol=1e-12)
    assert abs(after["z"] - before["z"]) > 0.1


def test_switch_loss_is_one_when_uniform_and_least_there():
    uniform = torch.full((E, E), 1 / E, dtype=torch.float64)
    everyone = torch.arange(E)[:, None]
    assert switch_loss(uniform, everyone, None).item() == pytest.approx(1)
    skewed = torch.softmax(torch.randn(200, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3, 1)
    skewed[:, 0] += 1
    skewed = skewed / skewed.sum(1, keepdim=True)
    assert switch_loss(skewed, top_k(skewed, 2), None).item() > 1.2


def test_switch_loss_by_hand():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [1, 2]])
    expected = 3 * (0.25 * 0.4 + 0.5 * 0.4 + 0.25 * 0.2)
    assert switch_loss(probs, chosen, None).item() == pytest.approx(expected)


def test_losses_only_in_training():
    g = gate().eval()
    g(tokens())
    assert not losses(g)
    assert set(metrics(g)) == {"load", "entropy", "max_violation", "dead"}


def test_padding_is_routed_nowhere_and_enters_nothing():
    g, x = gate(bias_rate=0.1, switch=1.0, z=1.0), tokens()
    mask = torch.arange(len(x)) % 3 != 0
    full = g(x, mask)
    with_padding, seen, counted = losses(g), metrics(g), g.chosen.clone()
    g.chosen.zero_()
    alone = g(x[mask])
    assert not full.weights[~mask].any()
    torch.testing.assert_close(full.weights[mask], alone.weights, rtol=0, atol=0)
    for name, value in losses(g).items():
        torch.testing.assert_close(with_padding[name], value, rtol=0, atol=1e-12)
    for name, value in metrics(g).items():
        torch.testing.assert_close(seen[name], value, rtol=0, atol=1e-12)
    assert torch.equal(counted, g.chosen)


def test_metrics_by_hand():
    g, x = gate(k=2), tokens()
    routing = g(x)
    found = metrics(g)
    counts = torch.bincount(routing.experts.flatten(), minlength=E).double()
    torch.testing.assert_close(found["load"], counts / counts.sum())
    assert found["max_violation"].item() == pytest.approx((counts.max() / counts.mean() - 1).item())
    entropy = -(routing.probs * routing.probs.log()).sum(1).mean()
    assert found["entropy"].item() == pytest.approx(entropy.item())


def test_the_bias_moves_by_its_rate_against_the_load_and_only_selects():
    g, x = gate(k=1, normalize="none", bias_rate=0.05), tokens(64)
    plain = g(x)
    g(x)  # A second micro-batch before the step.
    counts = 2 * torch.bincount(plain.experts.flatten(), minlength=E)
    assert torch.equal(g.chosen, counts.float())
    advance(g, 1, 10)
    torch.testing.assert_close(g.bias, 0.05 * torch.sign(counts.float().mean() - counts))
    assert not g.chosen.any()
    again = g(x)
    same = (again.experts == plain.experts)[:, 0]
    assert same.any()
    assert torch.equal(again.weights[same], plain.weights[same])
    assert "bias" in g.state_dict()
    assert not g.bias.requires_grad


def test_the_bias_balances_a_fixed_router():
    g, x = gate(k=1, bias_rate=0.02), tokens(256)
    g(x)
    start = metrics(g)["max_violation"]
    for step in range(200):
        g(x)
        advance(g, step + 1, 200)
    g(x)
    assert metrics(g)["max_violation"] < start / 3


def test_checkpointing_counts_once():
    g, x = gate(bias_rate=0.1), tokens().requires_grad_()
    checkpoint(lambda y: g(y).weights, x, use_reentrant=False).sum().backward()
    assert g.chosen.sum().item() == 2 * len(x)


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
    ("settings", "message"),
    [({"k": 6}, "between 1 and the number of experts 5"), ({"switch": -1.0}, "at least 0"), ({"jitter": 1.0}, "jitter in")],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        TopK(D, E, **settings)
