"""The trapezoid rule."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from gatework.ops.quadrature import trapezoid


def random_points(count, seed=0):
    return torch.rand(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).sort(-1).values


def test_sums_are_those_of_torchs_trapezoids_with_gradients():
    points = random_points(9).requires_grad_()
    values = points.detach().sin()
    found, wanted = (trapezoid(points) * values).sum(-1), torch.trapezoid(values, points, dim=-1)
    assert_close(found, wanted)
    gradients = [torch.autograd.grad(total.sum(), points)[0] for total in (found, wanted)]
    assert_close(*gradients)


def test_a_circle_has_no_ends():
    points = 2 * math.pi * random_points(7)
    weights = trapezoid(points, period=2 * math.pi)
    assert_close(weights.sum(-1), torch.full((2,), 2 * math.pi, dtype=torch.float64))
    turned = (points + 1.3) % (2 * math.pi)
    order = turned.argsort(-1)
    assert_close(trapezoid(turned.gather(-1, order), period=2 * math.pi), weights.gather(-1, order))
    even = torch.arange(5, dtype=torch.float64) / 5
    assert_close(trapezoid(even, period=1.0), torch.full((5,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize(("period", "weight"), [(None, 1.0), (3.0, 3.0)])
def test_one_point_and_none(period, weight):
    assert trapezoid(torch.tensor([0.4]), period).tolist() == [weight]
    assert trapezoid(torch.zeros(2, 0), None).shape == (2, 0)
