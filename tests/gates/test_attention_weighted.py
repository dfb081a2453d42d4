"""The gate made of a history against its equations, behaviour by behaviour; its contrast; what it is given by others."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import PartError, losses, metrics
from gatework.experts import MoE
from gatework.gates import AttentionWeighted
from gatework.gates.attention_weighted import contrastive_loss

N, M, D, E = 6, 5, 4, 3


def gate(**settings):
    torch.manual_seed(0)
    made = AttentionWeighted(D, E, hidden=7, **settings).double()
    made.default.data.copy_(torch.tensor([0.3, -0.2, 0.5]))
    return made.eval()


def given(seed=1, n=N, m=M):
    g = torch.Generator().manual_seed(seed)
    x, history, query = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((n, 9), (n, m, D), (n, D)))
    mask = torch.rand(n, m, generator=g) < 0.6
    mask[0] = False
    return x, {"history": history, "history_mask": mask, "query": query}


def mlp(network, z):
    first, _, last = network
    hidden = torch.stack([torch.clamp(row @ z + bias, min=0) for row, bias in zip(first.weight, first.bias, strict=True)])
    return torch.stack([row @ hidden + bias for row, bias in zip(last.weight, last.bias, strict=True)])


def reference(part, history, history_mask, query):
    rows = []
    for s, there, q in zip(history, history_mask, query, strict=True):
        g = part.default.clone()
        for behaviour, real in zip(s, there, strict=True):
            if real:
                z = torch.cat([behaviour, q, behaviour * q])
                g = g + mlp(part.activation, z)[0] * mlp(part.gate, z)
        rows.append(g)
    return torch.stack(rows)


def test_weights_and_all_gradients_equal_the_equations():
    part, (x, some) = gate(), given()
    leaves = [some["history"].requires_grad_(), some["query"].requires_grad_(), *part.parameters()]
    coefficients = torch.randn(N, E, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    results = []
    for weights in (part(x, **some).dense(), reference(part, **some)):
        results.append([weights, *torch.autograd.grad((weights * coefficients).sum(), leaves)])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    routing = part(x, **some)
    assert routing.experts.tolist() == [[0, 1, 2]] * N
    assert bool((routing.weights < 0).any())
    torch.testing.assert_close(routing.weights[0], part.default.detach(), rtol=0, atol=0)  # No history.
    seen = metrics(part)
    share = routing.weights.abs() / routing.weights.abs().sum(1, keepdim=True)
    torch.testing.assert_close(seen["load"], share.detach().mean(0), rtol=0, atol=1e-14)
    assert seen["negative"].item() == pytest.approx((routing.weights < 0).double().mean().item())


def test_two_histories_add_up_in_any_order_and_padding_has_no_effect():
    part, (x, some) = gate(), given()
    history, mask, query = some.values()
    first = mask & (torch.arange(M) < 2)

    def g(history=history, mask=mask):
        return part(x, history=history, history_mask=mask, query=query).weights.detach() - part.default.detach()

    torch.testing.assert_close(g(), g(mask=first) + g(mask=mask & ~first), rtol=0, atol=1e-13)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(g(history[:, order], mask[:, order]), g(), rtol=0, atol=1e-13)
    hidden = torch.where(mask[..., None], history, torch.nan)
    assert torch.equal(g(hidden), g())
    longer = torch.cat([history, torch.full((N, 3, D), torch.inf, dtype=torch.float64)], 1)
    torch.testing.assert_close(g(longer, torch.cat([mask, torch.zeros(N, 3, dtype=torch.bool)], 1)), g(), rtol=0, atol=1e-13)
    assert g(history[:, :0], mask[:, :0]).abs().max() == 0
    tokens = torch.tensor([True, False, True, True, False, True])
    assert not part(x, tokens, **some).weights[~tokens].any()
    # In float32 under autocast too.
    small = gate().float()
    with torch.autocast("cpu", torch.bfloat16):
        routed = small(x.float(), history=history.float(), history_mask=mask, query=query.float())
    assert routed.weights.dtype == torch.float32
    torch.testing.assert_close(routed.weights.double() - part.default.detach(), g(), rtol=0, atol=1e-5)


def test_contrastive_loss_equals_the_equation():
    g, h = (torch.randn(5, E, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def expected(g, h, t):
        def cos(a, b):
            return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

        terms = [math.log(sum(math.exp(cos(a, c) / t) for c in h) / math.exp(cos(a, b) / t)) for a, b in zip(g, h, strict=True)]
        return sum(terms) / len(terms)

    assert contrastive_loss(g, h, 0.1).item() == pytest.approx(expected(g, h, 0.1), abs=1e-12)
    mask = torch.tensor([True, False, True, True, False])
    assert contrastive_loss(g, h, 0.5, mask).item() == pytest.approx(expected(g[mask], h[mask], 0.5), abs=1e-12)
    assert contrastive_loss(g, h, 0.5, torch.zeros(5, dtype=torch.bool)).item() == 0
    equal = g[:1].expand(5, E)
    assert contrastive_loss(equal, equal, 0.1).item() == pytest.approx(math.log(5), abs=1e-12)
    assert min(contrastive_loss(g * s, h, 0.1).item() for s in (-3, 0.1, 5)) >= 0
    assert torch.autograd.gradcheck(lambda a, b: contrastive_loss(a, b, 0.3), (g.requires_grad_(), h.requires_grad_()))


def test_while_training_the_other_view_hides_behaviours_but_never_all():
    part, (x, some) = gate(contrast=0.7, drop=0.5, temperature=0.2).train(), given()
    mask = some["history_mask"]
    views = torch.stack([part._view(mask) for _ in range(4000)])
    assert not views[:, ~mask].any()
    assert bool((views.any(2) == mask.any(1)).all())
    many = mask.sum(1).argmax()
    count = int(mask[many].sum())
    kept = views[:, many][:, mask[many]].double().mean().item()
    assert count >= 3
    assert kept == pytest.approx(0.5 + 0.5**count / count, abs=0.03)  # The last one left stays.
    state = torch.get_rng_state()
    weights = part(x, **some).weights
    said = losses(part)["contrast"]
    torch.set_rng_state(state)
    seen = part._view(mask)
    other = reference(part, some["history"], seen, some["query"])
    expected = 0.7 * contrastive_loss(weights, other, 0.2, mask.any(1))
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, reference(part, **some), rtol=0, atol=1e-12)  # The experts' weights see everything.
    tokens = torch.tensor([True, True, False, True, True, False])
    torch.set_rng_state(state)
    part(x, tokens, **some)
    expected = 0.7 * contrastive_loss(weights, other, 0.2, mask.any(1) & tokens)
    torch.testing.assert_close(losses(part)["contrast"], expected, rtol=0, atol=1e-12)
    whole = gate(drop=0.0).train()
    assert torch.equal(whole._view(mask), mask)  # The positives are identical: their cosine is 1.
    part.eval()(x, **some)
    assert not losses(part)


def test_an_experts_layer_hands_the_history_on():
    torch.manual_seed(0)
    layer = MoE(D, 6, experts=E, gate="attention_weighted(hidden=7)").double().eval()
    _, some = given()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    shaped = {name: value.view(2, 3, *value.shape[1:]) for name, value in some.items()}
    y = layer(x, **shaped)
    weights = layer.gate(x.view(-1, D), **some).weights
    alone = torch.stack([layer.activation.gated(x.view(-1, D) @ w_in.T) @ w_out.T
                         for w_in, w_out in zip(layer.w_in, layer.w_out, strict=True)], 1)
    torch.testing.assert_close(y.view(-1, D), (weights[..., None] * alone).sum(1), rtol=0, atol=1e-12)
    with pytest.raises(PartError, match="history"):
        layer(x)


def test_wrong_input_meets_one_sentence():
    x, some = given()
    with pytest.raises(PartError, match="attention_weighted needs each token's history, history_mask and query"):
        gate()(x, query=some["query"])
    with pytest.raises(PartError, match="built for behaviours of width 4, not 3"):
        gate()(x, **(some | {"history": some["history"][..., :3], "query": some["query"][:, :3]}))
    with pytest.raises(ValueError, match="d_model, n_experts and hidden must be at least 1: 4, 0, 32"):
        AttentionWeighted(4, 0)
    with pytest.raises(ValueError, match=r"drop in \[0, 1\) and temperature positive, got 0.1, 1.0, 0.1"):
        AttentionWeighted(4, 2, drop=1.0)
