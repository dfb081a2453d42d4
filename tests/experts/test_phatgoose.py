"""The routed low-rank layer against the equations, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gatework.core import PartError, metrics
from gatework.core.cost import count_flops
from gatework.experts import Phatgoose

D_IN, D_OUT, RANK, ADAPTERS = 10, 7, 3, 5


def tensors(adapters=ADAPTERS, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (adapters, RANK, D_IN), (adapters, D_OUT, RANK), (adapters, D_IN)
    return [torch.randn(*shape, dtype=torch.float64, generator=g) for shape in shapes]


def layer(k=2, adapters=ADAPTERS, seed=0):
    torch.manual_seed(seed)
    return Phatgoose(nn.Linear(D_IN, D_OUT).double(), *tensors(adapters, seed), k)


def x(n=17, seed=1):
    return torch.randn(n, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def norm(vector):
    mean = sum(vector) / len(vector)
    variance = sum((value - mean) ** 2 for value in vector) / len(vector)
    return torch.stack([(value - mean) / (variance + 1e-5).sqrt() for value in vector])


def reference(part, u):
    """One token: scores of all adapters, the k largest (ties: lowest index), their share of the whole softmax, all updates."""
    scores = torch.stack([sum(norm(v) * norm(u)) / math.sqrt(D_IN) for v in part.v])
    p = scores.exp() / scores.exp().sum()
    kept = sorted(range(len(scores)), key=lambda z: (-scores[z].item(), z))[: part.k]
    y = part.base.weight @ u + part.base.bias
    for z in kept:
        y = y + p[z] / p[kept].sum() * (part.b[z] @ (part.a[z] @ u))
    return y


@pytest.mark.parametrize("k", [1, 2, 5])
def test_outputs_and_all_gradients_equal_the_equations(k):
    """The reference renormalises the softmax over all adapters, the layer takes the softmax over the kept scores: the same."""
    part, u = layer(k), x().requires_grad_()
    weights = torch.randn(17, D_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted = [*part.parameters(), u]
    results = []
    for y in (part(u.view(1, 17, D_IN))[0], torch.stack([reference(part, row) for row in u])):
        grads = torch.autograd.grad((y * weights).sum(), wanted, allow_unused=True)
        results.append([y, *(torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True))])
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)
    assert bool(results[0][3].any()) == (k > 1)  # The weight of a single adapter is a constant 1.
    assert part.train()(u[:0]).shape == (0, D_OUT)


def test_routing_and_its_invariances():
    part, u = layer(), 30 * x(200)  # Long vectors: the norms' eps is far away.
    part.v.data *= 30
    routing = part.route(u)
    assert bool(((routing.dense() != 0).sum(1) == 2).all())
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(200, dtype=torch.float64), rtol=0, atol=1e-14)
    assert set(routing.experts.flatten().tolist()) == set(range(ADAPTERS))
    cosine = torch.nn.functional.cosine_similarity(*(t - t.mean(-1, keepdim=True) for t in (u[:, None], part.v[None])), dim=-1)
    torch.testing.assert_close(routing.logits, cosine * math.sqrt(D_IN), rtol=0, atol=1e-6)
    for other, tokens in (
        (part.v * torch.tensor([[0.5], [1.0], [3.0], [7.0], [100.0]], dtype=torch.float64), u), (part.v + 4.0, u),
        (part.v, 2.5 * u + 3),
    ):
        changed = layer()
        changed.v.data = other.detach().clone()
        again = changed.route(tokens)
        assert torch.equal(again.experts, routing.experts)
        torch.testing.assert_close(again.weights, routing.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(changed.route(-u).logits, -routing.logits, rtol=0, atol=1e-6)  # a > 0 only.
    part.v.data = part.v[:1].expand(ADAPTERS, -1).clone()
    routing = part.route(u)
    assert bool((routing.experts[:, 0] != routing.experts[:, 1]).all())  # The last bit of a product may tell equal vectors apart.
    torch.testing.assert_close(routing.weights, torch.full((200, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-15)
    part.v.data.zero_()  # Untrained: exact ties, the lowest indices win.
    routing = part.route(u)
    assert not routing.logits.any()
    assert bool((routing.experts == torch.tensor([0, 1])).all())


def test_one_adapter_is_its_update_with_weight_1():
    part, u = layer(1, adapters=1), x()
    assert bool((part.route(u).weights == 1).all())
    weight = part.base.weight + part.b[0] @ part.a[0]
    torch.testing.assert_close(part(u), u @ weight.T + part.base.bias, rtol=0, atol=1e-12)


def test_token_by_token_is_the_whole_and_unused_adapters_cost_nothing():
    part, u = layer().eval(), x(64)
    with torch.no_grad():
        whole = part(u)
        load = metrics(part)["load"]
        torch.testing.assert_close(load, part.route(u).dense().ne(0).sum(0) / 128, rtol=0, atol=0, check_dtype=False)
        torch.testing.assert_close(torch.cat([part(row[None]) for row in u]), whole, rtol=0, atol=1e-12)
        assert not metrics(part)
        for some in (u, u[:1]):
            with count_flops() as count:
                part(some)
            n, low_rank = len(some), 2 * RANK * (D_IN + D_OUT)
            combined = 2 * 2 * D_OUT if n == 1 else 0  # The weighted sum of one token's two updates is a product too.
            assert count.total == n * (2 * D_IN * D_OUT + 2 * ADAPTERS * D_IN + 2 * low_rank) + combined


def test_scores_keep_float32_under_autocast():
    part, u = layer().float(), x(50).float()
    expected = part.route(u)
    with torch.autocast("cpu", torch.bfloat16):
        routing, y = part.route(u), part(u)
    assert torch.equal(routing.weights, expected.weights)
    assert torch.equal(routing.experts, expected.experts)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), part(u), rtol=0.05, atol=0.1)


def test_wrong_input_meets_one_sentence():
    a, b, v = tensors()
    base = nn.Linear(D_IN, D_OUT)
    with pytest.raises(ValueError, match=r"k must be between 1 and the number of adapters 5, got 6"):
        Phatgoose(base, a, b, v, 6)
    with pytest.raises(ValueError, match=r"must have the shapes \(E, r, d_in\), \(E, d_out, r\) and \(E, d_in\)"):
        Phatgoose(base, a, b[:, :, :2], v)
    with pytest.raises(PartError, match=r"a token has width 10, and u has the shape \(17, 9\)"):
        layer()(x()[:, 1:])
