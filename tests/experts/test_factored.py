"""Gated sums of rank-1 components against the dense matrices that they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.core import PartError
from gatework.experts.factored import FactoredLinear, Factors

D_IN, D_OUT, GROUPS, SHARED, RANK = 7, 6, 3, 2, 2
EXACT = {"rtol": 0, "atol": 1e-12}


class Given(FactoredLinear):
    """The gates are the condition."""

    def gates(self, condition):
        return torch.atleast_2d(condition)

    def forward(self, x, condition):
        return self._forward(x, self.gates(condition))

    def extend(self, groups, **settings):
        return self._extended(groups, **({"keep": True, "freeze": True, "noop": False} | settings))


def layer(bias=True) -> Given:
    torch.manual_seed(0)
    made = Given(D_IN, D_OUT, GROUPS, SHARED, RANK, bias).double()
    for bank in (made.learngenes, *made.tailors):
        nn.init.uniform_(bank.s, 0.5, 2)
    return made


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(made, gates):
    """U_0 diag(s_0) V_0^T + sum_k a_k U_k diag(s_k) V_k^T."""
    def product(bank):
        return [s * torch.outer(u, v) for u, s, v in zip(bank.u.T, bank.s, bank.v.T, strict=True)]

    every = [one for bank in made.tailors for one in product(bank)]
    return sum(product(made.learngenes)) + sum(gates[r // RANK] * one for r, one in enumerate(every))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("middle", [(), (4,), (2, 3)])
def test_each_sample_has_its_own_dense_weight_with_all_gradients(middle, bias):
    made = layer(bias).extend(2, freeze=False)
    x, gates = randn(5, *middle, D_IN).requires_grad_(), randn(5, GROUPS + 2, seed=2).requires_grad_()
    wanted = torch.stack([row @ dense(made, gate).T for row, gate in zip(x, gates, strict=True)]) + (made.bias if bias else 0)
    results = []
    for y in (made(x, gates), wanted):
        results.append([y, *torch.autograd.grad((y * randn(*y.shape, seed=3)).sum(), [x, gates, *made.parameters()])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


def test_factors_are_the_product_with_and_without_gates():
    torch.manual_seed(0)
    factors, x, gates = Factors(D_IN, D_OUT, 3).double(), randn(4, D_IN), randn(4, 3, seed=2)
    for p, value in ((factors.u, randn(D_OUT, 3)), (factors.s, randn(3)), (factors.v, randn(D_IN, 3, seed=4))):
        p.data.copy_(value)
    torch.testing.assert_close(factors(x), x @ factors.v @ torch.diag(factors.s) @ factors.u.T, **EXACT)
    wanted = torch.stack([factors.u @ (gate * factors.s * (factors.v.T @ row)) for row, gate in zip(x, gates, strict=True)])
    torch.testing.assert_close(factors(x, gates), wanted, **EXACT)


@pytest.mark.parametrize("middle", [(), (4,), (0,)])
def test_no_samples(middle):
    made = layer()
    assert made(randn(0, *middle, D_IN), randn(0, GROUPS)).shape == (0, *middle, D_OUT)


def test_exports_leave_out_what_a_gate_closes():
    made, gates, x = layer(), torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64), randn(4, D_IN)
    torch.testing.assert_close(made.merge(gates).weight, dense(made, gates), **EXACT)
    pair = made.factors(gates)
    assert [tuple(part.weight.shape) for part in pair] == [(SHARED + 2 * RANK, D_IN), (D_OUT, SHARED + 2 * RANK)]
    torch.testing.assert_close(pair(x), made(x, gates.expand(4, -1)), **EXACT)
    assert not any(p.grad_fn for p in (*made.merge(gates).parameters(), *pair.parameters()))


def test_a_trained_weight_gives_its_singular_values_in_order():
    torch.manual_seed(0)
    linear = nn.Linear(D_IN, D_OUT).double()
    made = Given.from_linear(linear, groups=2, learngenes=2, tailors=2)
    u, s, vt = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    assert torch.equal(torch.cat([made.learngenes.s, made.tailors[0].s]), s)
    torch.testing.assert_close(made.merge(torch.ones(2, dtype=torch.float64)).weight, linear.weight, **EXACT)
    kept = [0, 1, 4, 5]
    second = made.merge(torch.tensor([0.0, 1.0]).double())
    torch.testing.assert_close(second.weight, (u * s)[:, kept] @ vt[kept], **EXACT)
    assert torch.equal(made.bias, linear.bias)


@pytest.mark.parametrize("keep", [True, False])
def test_new_groups_stand_behind_or_in_the_place_of_the_present_ones(keep):
    made = layer()
    new = made.extend(1, keep=keep, noop=True)
    assert (made.groups, new.groups) == (GROUPS, GROUPS * keep + 1)
    old, only = randn(GROUPS), torch.tensor([3.0], dtype=torch.float64)
    gates = torch.cat([old, only]) if keep else only
    torch.testing.assert_close(new.merge(gates).weight, dense(made, old if keep else torch.zeros(GROUPS)), **EXACT)
    assert {name for name, p in new.named_parameters() if p.requires_grad} == {f"tailors.{int(keep)}.{name}" for name in "usv"}
    assert all(p.requires_grad for p in made.parameters())


def test_wrong_input_meets_one_sentence():
    made = layer()
    for call, message in [
        (lambda: made(randn(2, D_IN + 1), randn(2, GROUPS)), r"x is \(samples, ..., 7\), not \(2, 8\)"),
        (lambda: made(randn(D_IN), randn(2, GROUPS)), r"x is \(samples, ..., 7\), not \(7,\)"),
        (lambda: made(randn(2, D_IN), randn(3, GROUPS)), "there are 3 conditions for 2 samples"),
        (lambda: made.merge(randn(2, GROUPS)), "one condition makes one weight, got 2"),
        (lambda: made.extend(0), "at least 1 new group is due, got 0"),
        (lambda: Given.from_linear(nn.Linear(4, 9), groups=1, learngenes=3, tailors=2), "has 4 singular values, not the 5"),
    ]:
        with pytest.raises(PartError, match=message):
            call()
    with pytest.raises(ValueError, match="must be at least 1, got 7, 6, 0, 2, 2"):
        Given(D_IN, D_OUT, 0, SHARED, RANK, True)
