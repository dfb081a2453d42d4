"""One step of sparse coding, against the objective that it descends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gatework.core import PartError, metrics
from gatework.core.cost import count_flops
from gatework.feedforward import CrateISTA

D = 6


def layer(**settings) -> CrateISTA:
    torch.manual_seed(0)
    m = CrateISTA(D, **settings).double()
    with torch.no_grad():
        m.norm.weight.uniform_(0.5, 1.5)
        m.norm.bias.normal_(std=0.3)
    return m


def inputs() -> Tensor:
    return torch.randn(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normed(m: CrateISTA, x: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * m.norm.weight + m.norm.bias


def equations(m: CrateISTA, x: Tensor) -> Tensor:
    """Token by token, the products of the official code."""
    rows = []
    for token in x.flatten(0, -2):
        y, d = normed(m, token), m.dictionary
        step = m.step * (d.T @ y - d.T @ (d @ y)) - m.step * m.threshold
        rows.append(torch.stack([torch.relu(a) for a in y + step]))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("settings", [{}, {"step": 0.4, "threshold": 0.1}, {"threshold": 0.0}], ids=str)
def test_equals_the_equations_with_all_gradients(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    got, expected = m(x), equations(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    assert (got == 0).any()
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_it_is_the_proximal_step_of_its_objective():
    """z minimises |z - (y - eta grad f(y))|^2 / (2 eta) + lambda |z|_1 over z >= 0, f = 1/2 |y - D z|^2 at z = y."""
    m, x = layer(step=0.3, threshold=0.4), inputs()
    z = m(x)
    assert (z >= 0).all()
    for token, code in zip(x.flatten(0, 1), z.flatten(0, 1), strict=True):
        y = normed(m, token).detach()
        start = y.clone().requires_grad_()
        (grad,) = torch.autograd.grad((y - m.dictionary.detach() @ start).square().sum() / 2, start)
        forward = y - m.step * grad

        def surrogate(z: Tensor, forward: Tensor = forward) -> Tensor:
            return (z - forward).square().sum() / (2 * m.step) + m.threshold * z.sum()

        least = surrogate(code)
        generator = torch.Generator().manual_seed(3)
        for size in (1e-3, 0.1, 1.0):
            moved = (code + size * torch.randn(20, D, dtype=torch.float64, generator=generator)).clamp(min=0)
            assert all(surrogate(other) >= least for other in moved)


def test_a_small_step_lowers_the_objective():
    m, x = layer(step=0.02, threshold=0.3), inputs()

    def objective(y: Tensor, z: Tensor) -> Tensor:
        return (y - z @ m.dictionary.T).square().sum(-1) / 2 + m.threshold * z.abs().sum(-1)

    y = torch.stack([normed(m, token) for token in x.flatten(0, 1)])
    inside = y.abs()  # A start that is allowed: no entry is negative.
    d = m.dictionary
    stepped = (inside + m.step * (y - inside @ d.T) @ d - m.step * m.threshold).relu()
    assert (objective(y, stepped) <= objective(y, inside)).all()


def test_an_orthogonal_dictionary_rotates():
    m, x = layer(step=0.3, threshold=0.2), inputs()
    with torch.no_grad():
        m.dictionary.copy_(torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q)
    y = m.norm(x)
    expected = torch.relu(y - 0.3 * 0.2 + 0.3 * (y @ m.dictionary - y))
    torch.testing.assert_close(m(x), expected, rtol=0, atol=1e-13)


def test_two_products_of_the_dictionary():
    m = CrateISTA(D)
    with torch.no_grad(), count_flops() as count:
        m(torch.randn(7, D))
    assert count.total == 2 * 2 * 7 * D * D


def test_the_share_of_outputs_that_are_not_0():
    m, x = layer(), inputs()
    z = m(x)
    assert metrics(m)["nonzero"].item() == pytest.approx((z != 0).double().mean().item())
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) < 0.5
    m(x, mask=mask)
    assert metrics(m)["nonzero"].item() == pytest.approx((z[mask] != 0).double().mean().item())
    sparser = layer(threshold=8.0)
    sparser(x)
    assert metrics(sparser)["nonzero"] < (z != 0).double().mean()


def test_its_start_and_its_size():
    torch.manual_seed(0)
    m = CrateISTA(50)
    assert m.dictionary.abs().max().item() == pytest.approx(math.sqrt(6 / 50), rel=0.01)
    assert m.dictionary.std().item() == pytest.approx(math.sqrt(2 / 50), rel=0.02)
    assert sum(p.numel() for p in m.parameters()) == 50 * 50 + 2 * 50
    assert isinstance(m.norm, nn.LayerNorm)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"step": 0.0}, "step must be positive and threshold at least 0, both finite, got 0.0 and 0.5"),
        ({"threshold": -1.0}, "got 0.1 and -1.0"),
        ({"step": math.nan}, "got nan and 0.5"),
        ({"threshold": math.inf}, "got 0.1 and inf"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        CrateISTA(**({"d_model": D} | settings))


@pytest.mark.parametrize("mask", [torch.ones(2, 4, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(2, 3)])
def test_inputs_that_do_not_fit_meet_one_sentence(unchecked, mask):
    with pytest.raises(PartError, match=r"CrateISTA was built for width 6, not for inputs of shape \(2, 5\)"):
        CrateISTA(6)(torch.zeros(2, 5))
    with pytest.raises(PartError, match=r"mask has one bool per token, shape \(2, 3\), not "):
        CrateISTA(6)(torch.zeros(2, 3, 6), mask=mask)
