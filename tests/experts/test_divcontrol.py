"""Condition-gated factored layers against a loop over samples with dense weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatework.core import PartError, metrics
from gatework.core.cost import count_flops
from gatework.experts import AlignmentLoss
from gatework.experts.divcontrol import ConditionGate, DivLinear
from gatework.experts.kind import KINDLinear

D_IN, D_OUT, D_T, K, RG, RT = 7, 6, 5, 4, 2, 1
EXACT = {"rtol": 0, "atol": 1e-12}


def layer(**settings):
    torch.manual_seed(0)
    made = DivLinear(D_IN, D_OUT, D_T, **({"groups": K, "learngenes": RG, "tailors": RT} | settings)).double()
    with torch.no_grad():
        for bank in (made.learngenes, *made.tailors):
            bank.s.uniform_(0.5, 2)
        for row in made.gate.rows:
            row.weight.mul_(5)
    return made


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights_of(gate, t):
    """softmax(MLP(t) / tau) for one embedding, in a loop; with top-k the largest, renormalised."""
    h = gate.hidden.weight @ t + gate.hidden.bias
    h = h / (1 + torch.exp(-h))
    logits = [(row.weight[i] @ h + row.bias[i]) / gate.tau for row in gate.rows for i in range(len(row.bias))]
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))[: gate.k or len(logits)]
    total = sum(logits[i].exp() for i in kept)
    return [logits[i].exp() / total if i in kept else 0.0 * logits[i] for i in range(len(logits))]


def dense(div, t):
    """W(t), component by component."""
    total = sum(div.learngenes.s[r] * torch.outer(div.learngenes.u[:, r], div.learngenes.v[:, r]) for r in range(RG))
    shares = iter(weights_of(div.gate, t))
    for bank in div.tailors:
        for start in range(0, len(bank.s), div.rank):
            share = next(shares)
            for r in range(start, start + div.rank):
                total = total + share * bank.s[r] * torch.outer(bank.u[:, r], bank.v[:, r])
    return total


@pytest.mark.parametrize("settings", [{}, {"tailors": 2, "k": 2}, {"tau": 0.3}, {"groups": 1}, {"bias": False, "k": 3}], ids=str)
def test_per_sample_gating_equals_the_loop_with_all_gradients(settings):
    div, x, t = layer(**settings), randn(4, 3, D_IN).requires_grad_(), randn(4, D_T, seed=2).requires_grad_()
    y = div(x, t)
    bias = 0 if div.bias is None else div.bias
    wanted = torch.stack([row @ dense(div, one).T + bias for row, one in zip(x, t, strict=True)])
    torch.testing.assert_close(y, wanted, **EXACT)
    leaves, upstream = [x, t, *div.parameters()], randn(*y.shape, seed=3)
    grads = [torch.autograd.grad(out, leaves, upstream, materialize_grads=True) for out in (y, wanted)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    a = div.gates(t)
    torch.testing.assert_close(a.sum(1), torch.ones(4, dtype=torch.float64), **EXACT)
    entropy = -sum(p * math.log(p) for row in a.tolist() for p in row if p) / 4
    assert metrics(div)["entropy"].item() == pytest.approx(entropy, abs=1e-12)


def test_a_one_hot_gate_is_kind():
    div, t = layer(k=1), randn(5, D_T)
    kind = KINDLinear(D_IN, D_OUT, K, RG, RT).double()
    kind.load_state_dict({name: p for name, p in div.state_dict().items() if not name.startswith("gate")})
    a, x = div.gates(t), randn(5, D_IN, seed=2)
    assert torch.equal(a, F.one_hot(a.argmax(1), K).double())
    assert len(a.argmax(1).unique()) > 1
    assert torch.equal(div(x, t), kind(x, a.argmax(1)))


def test_one_group_is_a_plain_factorised_linear_layer():
    div, x = layer(groups=1, tailors=3), randn(5, D_IN)
    u = torch.cat([div.learngenes.u, div.tailors[0].u], 1)
    v = torch.cat([div.learngenes.v, div.tailors[0].v], 1)
    s = torch.cat([div.learngenes.s, div.tailors[0].s])
    torch.testing.assert_close(div(x, randn(5, D_T)), ((x @ v) * s) @ u.T + div.bias, **EXACT)


def test_ties_go_to_the_first_group_and_a_flat_gate_is_uniform():
    gate = ConditionGate(D_T, 6, k=5).double()
    nn.init.zeros_(gate.rows[0].weight)
    nn.init.zeros_(gate.rows[0].bias)
    assert torch.equal(gate(randn(2, D_T)), torch.tensor([[0.2] * 5 + [0.0]] * 2, dtype=torch.float64))
    div = layer()
    nn.init.zeros_(div.gate.rows[0].weight)
    nn.init.zeros_(div.gate.rows[0].bias)
    div(randn(2, D_IN), randn(2, D_T))
    assert metrics(div)["entropy"].item() == pytest.approx(math.log(K), abs=1e-12)


@pytest.mark.parametrize("k", [None, 2])
def test_exports_are_dense_exact_and_leave_closed_groups_out(k):
    div, x, t = layer(k=k), randn(5, D_IN), randn(D_T, seed=2)
    wanted = div(x, t.expand(5, -1))
    torch.testing.assert_close(div.merge(t)(x), wanted, **EXACT)
    torch.testing.assert_close(div.merge(t).weight, dense(div, t), **EXACT)
    pair = div.factors(t)
    torch.testing.assert_close(pair(x), wanted, **EXACT)
    with count_flops() as count:
        pair(x)
    assert count.total == 2 * 5 * (D_IN + D_OUT) * (RG + (k or K) * RT)


def test_from_a_trained_weight():
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT).double()
    div = DivLinear.from_linear(linear, d_condition=D_T, groups=2, learngenes=4, tailors=1)
    u, s, vt = torch.linalg.svd(linear.weight.detach())
    a = div.gates(randn(D_T))[0]
    gates = torch.cat([torch.ones(4, dtype=torch.float64), a])
    torch.testing.assert_close(div.merge(randn(D_T)).weight, u @ torch.diag(s * gates) @ vt[:6], **EXACT)
    assert torch.equal(div.bias, linear.bias)


def test_a_new_group_trains_alone_with_its_row():
    div, x, t = layer(), randn(4, D_IN), randn(4, D_T, seed=2)
    new = div.extend(2)
    a, before = new.gates(t), div.gates(t)
    assert a.shape == (4, K + 2)
    torch.testing.assert_close(a[:, :K] / a[:, :K].sum(1, keepdim=True), before, **EXACT)
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {
        "tailors.1.u", "tailors.1.s", "tailors.1.v", "gate.rows.1.weight", "gate.rows.1.bias",
    }  # fmt: skip
    kept = {name: p.detach().clone() for name, p in new.named_parameters()}
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        new(x, t).sub(1).square().mean().backward()
        optimizer.step()
    for name, p in new.named_parameters():
        assert torch.equal(p, kept[name]) != p.requires_grad, name
    wanted = torch.stack([row @ dense(new, one).T + new.bias for row, one in zip(x, t, strict=True)])
    torch.testing.assert_close(new(x, t), wanted, **EXACT)


def test_the_gate_stays_in_float32_under_autocast():
    gate, t = layer().gate.float(), randn(3, D_T).float()
    with torch.autocast("cpu", torch.bfloat16):
        a = gate(t)
    assert a.dtype == torch.float32
    assert torch.equal(a, gate(t))
    assert gate.bfloat16()(t.bfloat16()).dtype == torch.float32


def test_alignment_loss():
    torch.manual_seed(0)
    loss = AlignmentLoss(4, 3, weight=2.0).double()
    cond, early = randn(2, 5, 4).requires_grad_(), randn(2, 5, 3, seed=2).requires_grad_()
    projected = cond @ loss.projector.weight.T + loss.projector.bias
    cosines = [
        (p @ e / (p.norm() * e.norm())) for p, e in zip(projected.flatten(0, 1), early.flatten(0, 1), strict=True)
    ]
    wanted = 2 * (1 - sum(cosines) / 10)
    said = loss(cond, early)
    torch.testing.assert_close(said, wanted, **EXACT)
    assert torch.autograd.grad(said, early, allow_unused=True, retain_graph=True) == (None,)
    leaves = [cond, *loss.parameters()]
    for a, b in zip(torch.autograd.grad(said, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    plain = AlignmentLoss(3, 3, weight=1.0).double()
    with torch.no_grad():
        plain.projector.weight.copy_(torch.eye(3))
        plain.projector.bias.zero_()
    assert plain(early, 4 * early).item() == pytest.approx(0, abs=1e-12)
    assert plain(early, -early).item() == pytest.approx(2, abs=1e-12)
    assert AlignmentLoss(2, 2).weight == 0.5
    assert loss(cond[:, :0], early[:, :0]) == 0
    for a, b in ((early, early), (cond, cond)):
        with pytest.raises(PartError, match=r"the features are \(..., 4\) and as many of \(..., 3\), not"):
            loss(a, b)


def test_wrong_inputs_meet_one_sentence():
    div = layer()
    for call, message in [
        (lambda: div.merge(randn(2, D_T)), "one condition makes one weight, got 2"),
        (lambda: div.merge(randn(D_T + 1)), r"a condition is \(samples, 5\), not \(6,\)"),
        (lambda: div.extend(0), "at least 1 new group is due, got 0"),
    ]:
        with pytest.raises(PartError, match=message):
            call()
    wrong = [({"k": 5}, "between 1 and the number of groups 4"), ({"tau": 0.0}, "tau positive"), ({"groups": 0}, "at least 1")]
    for settings, message in wrong:
        with pytest.raises(ValueError, match=message):
            layer(**settings)
