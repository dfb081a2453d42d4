"""The importance loss against its equation."""

from __future__ import annotations

import pytest
import torch

from gatework.core import Routing
from gatework.gates import Importance
from gatework.gates.base import cv_squared


def routing(weights: list[list[float]], experts: list[list[int]], n_experts: int) -> Routing:
    return Routing(torch.tensor(weights, dtype=torch.float64), torch.tensor(experts), n_experts)


def test_by_hand():
    term = Importance(0.3)
    loss = term(routing([[0.7, 0.3], [0.6, 0.4], [1.0, 0.0]], [[0, 1], [1, 2], [0, 2]], 3))
    sums = [1.7, 0.9, 0.4]
    mean = sum(sums) / 3
    variance = sum((value - mean) ** 2 for value in sums) / 3  # Of the population.
    assert loss.item() == pytest.approx(0.3 * variance / mean**2, abs=1e-9)


def test_least_at_equal_importance_whatever_the_numbers_of_tokens():
    even = routing([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]], [[0, 1], [1, 2], [1, 2]], 3)
    assert Importance(1.0)(even).item() == 0
    assert Importance(1.0)(routing([[1.0], [1.0]], [[0], [0]], 4)).item() == pytest.approx(3)  # E - 1: all on one.


def test_cv_squared_uses_the_population_variance():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    assert cv_squared(values).item() == pytest.approx(3.5 / 9)


def test_gradient():
    experts = torch.tensor([[0, 1], [1, 2], [2, 0]])
    term = Importance(0.5)
    weights = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: term(Routing(w, experts, 4)), weights)


def test_wrong_weight():
    for weight in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight must be at least 0"):
            Importance(weight)
