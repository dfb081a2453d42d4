"""``Routing``: slot form and dense form are each other's inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatework.core import Routing


def dense_by_hand(routing: Routing) -> torch.Tensor:
    out = torch.zeros(routing.weights.shape[0], routing.n_experts, dtype=routing.weights.dtype)
    for n in range(out.shape[0]):
        for j in range(routing.weights.shape[1]):
            out[n, int(routing.experts[n, j])] += routing.weights[n, j]
    return out


def sparse(seed: int, tokens: int, experts: int, keep: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(tokens, experts, dtype=torch.float64, generator=generator)
    return torch.where(torch.rand(tokens, experts, generator=generator) < keep, values, 0)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_from_dense_then_dense_is_the_identity(seed, tokens, experts, keep):
    matrix = sparse(seed, tokens, experts, keep)
    routing = Routing.from_dense(matrix)
    assert routing.n_experts == experts
    assert torch.equal(routing.dense(), matrix)
    assert torch.equal(dense_by_hand(routing), matrix)
    k = max(1, int((matrix != 0).sum(1).max())) if tokens else 1
    assert routing.weights.shape == routing.experts.shape == (tokens, k)
    assert ((routing.experts >= 0) & (routing.experts < experts)).all()
    for row in routing.experts.tolist():  # No token names an expert twice, so its used slots do not either.
        assert len(set(row)) == k
    assert torch.equal(routing.counts(), (matrix != 0).sum(0))
    again = Routing.from_dense(routing.dense())
    assert torch.equal(again.weights, routing.weights)
    assert torch.equal(again.experts, routing.experts)


def test_slots_are_ordered_by_falling_weight_and_then_by_id():
    matrix = torch.tensor([[0.0, 0.2, 0.5, 0.2], [0.3, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    routing = Routing.from_dense(matrix)
    assert routing.weights.tolist() == [pytest.approx([0.5, 0.2, 0.2]), pytest.approx([0.3, 0, 0]), [0, 0, 0]]
    assert routing.experts[0].tolist() == [2, 1, 3]
    assert routing.experts[1, 0] == 0
    assert (routing.weights == 0).sum() == 5  # Exactly 0, not small.


def test_dense_sums_up_and_an_empty_slots_expert_means_nothing():
    weights = torch.tensor([[0.75, 0.0], [0.25, 0.5]])
    for other in (0, 1, 2):
        routing = Routing(weights, torch.tensor([[2, other], [0, 1]]), 3)
        assert routing.dense().tolist() == [[0, 0, 0.75], [0.25, 0.5, 0]]
        assert routing.counts().tolist() == [1, 1, 1]


def test_gradients_reach_the_used_entries_both_ways():
    matrix = sparse(3, 5, 4, 0.5).requires_grad_()
    upstream = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((Routing.from_dense(matrix).dense() * upstream).sum(), matrix)
    used = matrix != 0
    assert torch.equal(gradient[used], upstream[used])
    weights = torch.rand(5, 2, dtype=torch.float64).requires_grad_()
    experts = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3]])
    (gradient,) = torch.autograd.grad((Routing(weights, experts, 4).dense() * upstream).sum(), weights)
    assert torch.equal(gradient, upstream.gather(1, experts))


def test_from_dense_keeps_what_monitoring_needs():
    logits = torch.randn(3, 4)
    routing = Routing.from_dense(logits.softmax(1), logits=logits, probs=logits.softmax(1))
    assert routing.logits is logits
    assert torch.equal(routing.probs, routing.dense())
    assert Routing.from_dense(logits).logits is None
