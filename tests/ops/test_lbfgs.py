"""``minimize`` on functions whose minimum is known."""

from __future__ import annotations

import pytest
import torch

from gatework.ops.lbfgs import minimize


def test_a_quadratic_is_minimised_exactly():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64, generator=generator)
    matrix, target = root @ root.t() + torch.eye(5).double(), torch.randn(5, dtype=torch.float64, generator=generator)
    x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reached = minimize(lambda: (x @ matrix @ x) / 2 - target @ x, [x])
    wanted = torch.linalg.solve(matrix, target)
    torch.testing.assert_close(x.detach(), wanted, rtol=0, atol=1e-7)
    assert reached == pytest.approx(float(-target @ wanted / 2), abs=1e-12)
    assert x.grad is None


def test_a_curved_valley_over_two_tensors():
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.2, 1.0))
    assert minimize(lambda: (1 - a).square() + 100 * (b - a.square()).square(), [a, b]) < 1e-15
    assert (a.item(), b.item()) == pytest.approx((1, 1), abs=1e-7)


def test_it_stops_where_it_is_told_to():
    """After one iteration the valley's minimum is not reached; at a minimum nothing moves."""
    a = torch.tensor([-1.2, 1.0], dtype=torch.float64, requires_grad=True)

    def valley():
        return (1 - a[0]).square() + 100 * (a[1] - a[0].square()).square()

    assert minimize(valley, [a], iterations=1) > 1
    with torch.no_grad():
        a.fill_(1)
    assert minimize(valley, [a]) == 0
    assert a.tolist() == [1, 1]
