"""``continuous_convolution``: a kernel of the distance, over points anywhere."""

from __future__ import annotations

import itertools

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from gatework.core import PartError
from gatework.mixers.continuous_convolution import ContinuousConvolution
from gatework.ops.quadrature import trapezoid


def layer(seed=0, **settings):
    torch.manual_seed(seed)
    part = ContinuousConvolution(**({"d_in": 2, "d_out": 3, "radius": 0.3} | settings)).double()
    torch.nn.init.normal_(part.bias)
    return part


def samples(axes=1, seed=1, batch=2, count=6, at=4):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, count, 2, dtype=torch.float64, generator=generator)
    points, other = (torch.rand(batch, n, axes, dtype=torch.float64, generator=generator) for n in (count, at))
    return u, points, torch.rand(batch, count, dtype=torch.float64, generator=generator), other


def kernel(part, offset):
    """kappa of one offset, from the values at the knots."""
    total = torch.zeros(part.d_in, len(part.bias), dtype=torch.float64)
    half = part.taps // 2
    for index, knot in enumerate(itertools.product(range(-half, half + 1), repeat=part.axes)):
        height = torch.ones((), dtype=torch.float64)
        for z, k in zip(offset, knot, strict=True):
            if part.period is not None:
                z = min((z + shift * part.period for shift in (-1, 0, 1)), key=abs)
            height = height * (1 - (z / part.distance - k).abs()).clamp(min=0)
        total = total + height * part.weight[index]
    return total


@pytest.mark.parametrize(
    "settings", [{}, {"taps": 3, "axes": 2, "radius": 0.5}, {"period": 1.0}, {"taps": 1, "axes": 3, "radius": 0.8}]
)
def test_outputs_and_gradients_are_those_of_the_sum(settings):
    part, results = layer(**settings), []

    def slow(u, points, w, at):
        rows = []
        for b in range(len(u)):
            for t in range(at.shape[1]):
                terms = [w[b, s] * u[b, s] @ kernel(part, at[b, t] - points[b, s]) for s in range(u.shape[1])]
                rows.append(torch.stack(terms).sum(0) + part.bias)
        return torch.stack(rows).view(len(u), -1, 3)

    for run in (part, slow):
        given = [t.requires_grad_() for t in samples(part.axes)]
        part.zero_grad()
        y = run(*given)
        y.sin().sum().backward()
        results.append([y, *(t.grad for t in given), *(p.grad.clone() for p in part.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-11)
    assert results[0][0].shape == (2, 4, 3)


def test_outputs_are_at_the_points_where_no_others_are_given():
    part, (u, points, w, _) = layer(), samples()
    assert torch.equal(part(u, points, w), part(u, points, w, points))


@pytest.mark.parametrize("period", [None, 1.0])
def test_points_as_far_apart_as_the_knots_are_an_ordinary_convolution(period):
    part = layer(radius=0.3, taps=5, period=period)  # Knots 0.1 apart.
    u = torch.randn(2, 10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    points = (torch.arange(10, dtype=torch.float64) / 10).expand(2, -1)[..., None]
    y = part(u, points, torch.full((2, 10), 0.1, dtype=torch.float64))
    channels, taps = u.transpose(1, 2), part.weight.flip(0).permute(2, 1, 0)
    mode = "constant" if period is None else "circular"
    wanted = 0.1 * torch.nn.functional.conv1d(torch.nn.functional.pad(channels, (2, 2), mode=mode), taps)
    assert_close(y, wanted.transpose(1, 2) + part.bias, rtol=0, atol=1e-12)


def test_a_point_split_in_two_halves_of_its_weight_changes_nothing():
    part, (u, points, w, at) = layer(radius=1.0), samples()
    twice = torch.tensor([0, 1, 2, 2, 3, 4, 5])
    halves = w[:, twice]
    halves[:, 2:4] /= 2
    assert_close(part(u[:, twice], points[:, twice], halves, at), part(u, points, w, at), rtol=0, atol=1e-12)


def test_nothing_is_seen_from_the_radius_on():
    part = layer(radius=0.3)
    u, points = torch.randn(1, 1, 2).double(), torch.tensor([[[0.5]]], dtype=torch.float64)
    at = torch.tensor([[[0.1], [0.2], [0.2 + 1e-9], [0.79], [0.8]]], dtype=torch.float64)
    seen = (part(u, points, torch.ones(1, 1).double(), at) - part.bias).abs().sum(-1)[0]
    assert (seen[[0, 1, 4]] < 1e-12).all()
    assert (seen[[3]] > 1e-3).all()
    assert 0 < seen[2] < 1e-6  # It is continuous there.


@torch.no_grad()
def test_it_converges_on_any_grid_where_a_convolution_shrinks_to_a_point():
    part = layer(radius=0.3, taps=3)
    at = torch.linspace(0, 1, 9, dtype=torch.float64)[None, :, None]

    def on(points, weights):
        u = torch.stack([(3 * points).sin(), (5 * points).cos()], -1)
        return part(u[None], points[None, :, None], weights[None], at)

    def even(count):
        return torch.linspace(0, 1, count, dtype=torch.float64)

    exact = on(even(20001), trapezoid(even(20001)))
    random, unweighted = [], []
    for count in (32, 64, 128, 256):
        inside = torch.rand(count - 2, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).sort().values
        points = torch.cat([torch.zeros(1), inside, torch.ones(1)])
        random.append((on(points, trapezoid(points)) - exact).abs().max().item())
        crowded = even(count) ** 3
        unweighted.append((on(crowded, torch.full_like(crowded, 1 / count)) - exact).abs().max().item())
        assert (on(crowded, trapezoid(crowded)) - exact).abs().max().item() < unweighted[-1] / 10
    assert random[-1] < random[0] / 10
    assert min(unweighted) > 0.5 * max(unweighted)
    errors = [(on(even(n), trapezoid(even(n))) - exact).abs().max().item() for n in (41, 81, 161)]
    assert errors[0] / errors[1] > 3.5  # Second order.
    assert errors[1] / errors[2] > 3.5


def test_empty_inputs():
    part = layer()
    for batch, count, at in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        u, points, w, other = samples(batch=batch, count=count, at=at)
        assert part(u, points, w, other).shape == (batch, at, 3)
    u, points, w, other = samples(count=0)
    assert_close(part(u, points, w, other), part.bias.expand(2, 4, -1))


def test_wrong_settings_and_inputs_are_refused():
    for settings, message in (
        ({"taps": 4}, "d_in, d_out and axes are at least 1 and taps odd, got 2, 3, 1 and 4"),
        ({"axes": 0}, "got 2, 3, 0 and 5"),
        ({"radius": 0.0}, "radius must be positive and at most half the period, got 0.0 and None"),
        ({"period": 0.5}, "got 0.3 and 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**settings)
    u, points, w, at = samples(axes=2)
    with pytest.raises(PartError, match=r"have the shapes \(B, S, 2\), \(B, S, 1\) and \(B, S\), not \(2, 6, 2\)"):
        layer()(u, points, w)
    jaxtyping.config.update("jaxtyping_disable", True)  # The annotation check of the test run would come first.
    try:
        with pytest.raises(PartError, match=r"outputs are asked for at places \(2, T, 1\), not \(2, 4, 2\)"):
            layer()(u, points[..., :1], w, at)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
