"""Class-gated factored layers against a loop over samples with dense weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.core import PartError
from gatework.core.cost import count_flops, count_parameters
from gatework.experts.kind import KINDLinear

D_IN, D_OUT, C, RG, RT = 7, 6, 3, 2, 1
EXACT = {"rtol": 0, "atol": 1e-12}


def layer(**settings):
    torch.manual_seed(0)
    made = KINDLinear(D_IN, D_OUT, **({"classes": C, "learngenes": RG, "tailors": RT} | settings)).double()
    with torch.no_grad():
        for bank in (made.learngenes, *made.tailors):
            bank.s.uniform_(0.5, 2)
    return made


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weight(kind, c):
    """W_c, component by component; None: the learngenes alone."""
    total = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    banks = [(kind.learngenes, range(len(kind.learngenes.s)))]
    if c is not None:
        start = c * kind.rank
        for bank in kind.tailors:
            if 0 <= start < len(bank.s):
                banks.append((bank, range(start, start + kind.rank)))
            start -= len(bank.s)
    for bank, components in banks:
        for r in components:
            total = total + bank.s[r] * torch.outer(bank.u[:, r], bank.v[:, r])
    return total


CLASSES = torch.tensor([2, 0, 2, 1, 0])


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("middle", [(), (4,), (2, 3)])
def test_a_mixed_batch_equals_the_loop_over_samples_with_all_gradients(rank, middle):
    kind = layer(tailors=rank)
    x = randn(5, *middle, D_IN).requires_grad_()
    y = kind(x, CLASSES)
    wanted = torch.stack([row @ weight(kind, int(c)).T + kind.bias for row, c in zip(x, CLASSES, strict=True)])
    torch.testing.assert_close(y, wanted, **EXACT)
    upstream = randn(*y.shape, seed=2)
    leaves = [x, *kind.parameters()]
    for a, b in zip(torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    torch.testing.assert_close(kind(x), x @ weight(kind, None).T + kind.bias, **EXACT)


def test_tailors_of_absent_classes_get_a_gradient_of_exactly_0():
    kind = layer(tailors=2)
    kind(randn(4, D_IN), torch.tensor([0, 2, 0, 0])).square().sum().backward()
    (bank,) = kind.tailors
    for p, axis in ((bank.u, 1), (bank.s, 0), (bank.v, 1)):
        by_class = p.grad.unflatten(axis, (C, 2)).movedim(axis, 0)
        assert not by_class[1].any()
        assert all(by_class[c].any() for c in (0, 2))
    assert all(p.grad.any() for p in kind.learngenes.parameters())


def test_from_a_trained_weight():
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT).double()
    whole = KINDLinear.from_linear(linear, classes=1, learngenes=4, tailors=2)
    torch.testing.assert_close(whole.merge(0).weight, linear.weight, **EXACT)
    x = randn(3, D_IN)
    torch.testing.assert_close(whole(x, torch.zeros(3, dtype=torch.long)), linear(x), **EXACT)
    every = KINDLinear.from_linear(linear, classes=2, learngenes=2, tailors=2)
    u, s, vt = torch.linalg.svd(linear.weight.detach())
    for c in (None, 0, 1):
        kept = [0, 1, *([] if c is None else [2 + 2 * c, 3 + 2 * c])]
        torch.testing.assert_close(every.merge(c).weight, u[:, kept] @ torch.diag(s[kept]) @ vt[kept], **EXACT)
        torch.testing.assert_close(every.merge(c).bias, linear.bias, **EXACT)
    half = KINDLinear.from_linear(nn.Linear(4, 4, bias=False).bfloat16(), classes=2, learngenes=2, tailors=1)
    assert half.bias is None
    assert half.learngenes.u.dtype == torch.bfloat16


def test_classes_differ_in_their_tailors_alone_and_have_the_stated_rank():
    kind = layer()
    for a, b in ((0, 1), (1, 2)):
        difference = kind.merge(a).weight - kind.merge(b).weight
        u = torch.cat([kind.tailors[0].u[:, [a, b]]], 1)
        # Everything outside the span of the two tailors is 0.
        outside = difference - u @ torch.linalg.lstsq(u, difference).solution
        assert outside.abs().max() < 1e-12
        assert torch.linalg.matrix_rank(difference) == 2 * RT
    assert all(torch.linalg.matrix_rank(kind.merge(c).weight) == RG + RT for c in range(C))
    assert torch.linalg.matrix_rank(kind.merge(None).weight) == RG


def test_exports_are_exact_small_and_cheap():
    kind, x = layer(), randn(5, D_IN)
    for c in (None, 0, 1, 2):
        wanted = kind(x, None if c is None else torch.full((5,), c))
        rank = RG + (0 if c is None else RT)
        dense, pair = kind.merge(c), kind.factors(c)
        torch.testing.assert_close(dense(x), wanted, **EXACT)
        torch.testing.assert_close(pair(x), wanted, **EXACT)
        assert count_parameters(pair) == (D_IN + D_OUT) * rank + D_OUT
        with count_flops() as count:
            pair(x)
        assert count.total == 2 * 5 * (D_IN + D_OUT) * rank
    with count_flops() as count:
        kind(x, CLASSES)
    assert count.total == 2 * 5 * (D_IN + D_OUT) * (RG + C * RT)


@pytest.mark.parametrize("grow", ["transfer", "extend"])
@pytest.mark.parametrize("noop", [True, False])
def test_new_classes_train_new_tailors_alone(grow, noop):
    kind, x = layer(), randn(4, D_IN)
    known = {c: kind.merge(c).weight for c in (None, 0, 1, 2)}
    torch.manual_seed(4)
    new = getattr(kind, grow)(2, noop=noop)
    first = 0 if grow == "transfer" else C
    assert (new.groups, new.gate.classes) == (first + 2, first + 2)
    if noop:
        assert all(torch.equal(new.merge(c).weight, known[None]) for c in (first, first + 1))
    else:
        assert not torch.equal(new.merge(first).weight, known[None])
    trained = {name for name, p in new.named_parameters() if p.requires_grad}
    assert trained == {f"tailors.{len(new.tailors) - 1}.{name}" for name in "usv"}
    optimizer = torch.optim.SGD([p for p in new.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # With U = 0 the second step is the first that moves V.
        optimizer.zero_grad()
        new(x, torch.tensor([first, first, first + 1, first])).sub(1).square().sum().backward()
        optimizer.step()
    assert torch.equal(new.merge(None).weight, known[None])
    assert not torch.equal(new.merge(first).weight, known[None])
    if grow == "extend":
        assert all(torch.equal(new.merge(c).weight, known[c]) for c in range(C))
        torch.testing.assert_close(new(x, torch.tensor([0, 4, 1, 3]))[1], x[1] @ weight(new, 4).T + new.bias, **EXACT)
    assert all(p.requires_grad for p in kind.parameters()), "the first layer is as it was"
    assert all(p.requires_grad for p in kind.transfer(2, freeze=False).parameters())


def test_initialisation():
    torch.manual_seed(0)
    kind = KINDLinear(200, 300, classes=3, learngenes=20, tailors=12)
    dense = nn.Linear(200, 300)
    for c in range(3):
        assert kind.merge(c).weight.var().item() == pytest.approx(1 / 600, rel=0.1)
    assert dense.weight.var().item() == pytest.approx(1 / 600, rel=0.05)
    assert kind.bias.abs().max() <= 200**-0.5
    fresh = kind.transfer(30, noop=False).tailors[0]
    assert fresh.u.std().item() == pytest.approx(0.02, rel=0.05)
    assert fresh.v.std().item() == pytest.approx(0.02, rel=0.05)
    assert (fresh.s == 1).all()


def test_wrong_inputs_meet_one_sentence():
    kind = layer()
    for call, message in [
        (lambda: kind(randn(2, D_IN), torch.tensor([0, 3])), "there is no class 3; classes are 0 to 2"),
        (lambda: kind(randn(2, D_IN), torch.tensor([-1, 0])), "there is no class -1"),
        (lambda: kind(randn(2, D_IN + 1), torch.tensor([0, 1])), r"x is \(samples, ..., 7\), not \(2, 8\)"),
        (lambda: kind.merge(torch.tensor([0, 1])), "one condition makes one weight, got 2"),
        (lambda: kind.transfer(0), "at least 1 new group is due, got 0"),
        (
            lambda: KINDLinear.from_linear(nn.Linear(4, 9), classes=2, learngenes=3, tailors=1),
            "a 9 x 4 weight has 4 singular values, not the 5 that are asked for",
        ),
    ]:
        with pytest.raises(PartError, match=message):
            call()
    with pytest.raises(ValueError, match="learngenes and tailors must be at least 1"):
        layer(tailors=0)
