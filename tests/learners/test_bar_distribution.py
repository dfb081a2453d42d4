"""Bars with half-normal tails: a density, its mean, and borders of equal mass."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import PartError
from gatework.learners.bar_distribution import BarDistribution, equal_mass

BORDERS = torch.tensor([-1.0, -0.2, 0.3, 0.5, 2.0], dtype=torch.float64)


def made(seed=0):
    logits = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return BarDistribution(BORDERS), logits


def density(p, y):
    """From the equations, with PyTorch's half-normal distribution."""
    median = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1).icdf(torch.tensor(0.75, dtype=torch.float64))
    if y <= -0.2:
        return p[0] * torch.distributions.HalfNormal(0.8 / median).log_prob(torch.tensor(-0.2 - y, dtype=torch.float64)).exp()
    if y > 0.5:
        return p[3] * torch.distributions.HalfNormal(1.5 / median).log_prob(torch.tensor(y - 0.5, dtype=torch.float64)).exp()
    return p[1] / 0.5 if y <= 0.3 else p[2] / 0.2


def test_log_density_equals_the_equations_and_so_do_its_gradients():
    bars, logits = made()
    logits.requires_grad_()
    values = [-7.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.3, 0.31, 0.5, 0.6, 2.0, 9.0]
    ours = bars(logits.expand(len(values), -1), torch.tensor(values, dtype=torch.float64))
    theirs = torch.stack([density(logits.softmax(0), y).log() for y in values])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weight).sum(), logits, retain_graph=True)[0] for out in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_it_integrates_to_1_and_half_of_the_tails_lies_beyond_the_borders():
    bars, logits = made(1)
    y = torch.linspace(-15, 20, 700_001, dtype=torch.float64)
    values = bars(logits.expand(len(y), -1), y).exp()
    assert torch.trapezoid(values, y).item() == pytest.approx(1, abs=1e-4)
    p = logits.softmax(0)
    for outside, mass in ((y <= -1, p[0] / 2), (y <= -0.2, p[0]), (y > 2, p[3] / 2)):
        assert torch.trapezoid(values[outside], y[outside]).item() == pytest.approx(mass.item(), abs=1e-4)
    assert torch.trapezoid(values * y, y).item() == pytest.approx(bars.mean(logits).item(), abs=1e-4)


def test_borders_of_equal_mass():
    samples = torch.tensor([0.0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 100])  # The last is left over.
    assert equal_mass(samples, 2).tolist() == [0, 4.5, 9]
    assert equal_mass(samples.view(11, 1), 5).tolist() == [0, 1.5, 3.5, 5.5, 7.5, 9]
    drawn = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    borders = equal_mass(drawn, 50)
    counts = torch.histogram(drawn, borders).hist
    assert counts.min() > 1990
    assert counts.max() < 2010
    torch.testing.assert_close(borders[25], torch.tensor(0.0).double(), rtol=0, atol=0.02)


def test_uniform_logits_over_equal_mass_bars_say_the_sampled_density():
    generator = torch.Generator().manual_seed(0)
    bars = BarDistribution(equal_mass(torch.randn(200_000, dtype=torch.float64, generator=generator), 100))
    y = torch.randn(50_000, dtype=torch.float64, generator=generator)
    entropy = 0.5 * math.log(2 * math.pi * math.e)
    found = -bars(torch.zeros(50_000, 100).double(), y).mean().item()
    assert entropy < found < entropy + 0.05  # The outer bars reach to the extreme samples, and their tails beyond.


def test_half_precision_is_computed_in_float32_and_far_values_stay_finite():
    bars, logits = made()
    found = bars(logits.bfloat16().expand(2, -1), torch.tensor([-1e4, 1e4]))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert BarDistribution(BORDERS).to(torch.bfloat16).borders.dtype == torch.float32


def test_wrong_use_meets_one_sentence():
    for borders in ([0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1.0, math.inf], [0.0, math.nan, 1.0]):
        with pytest.raises(ValueError, match="borders are at least 3 finite numbers that rise strictly"):
            BarDistribution(torch.tensor(borders))
    with pytest.raises(PartError, match=r"there are 4 bars, and each takes one logit, not \(2, 5\)"):
        made()[0](torch.zeros(2, 5), torch.zeros(2))
    with pytest.raises(ValueError, match="3 samples cannot be divided among 4 bars"):
        equal_mass(torch.rand(3), 4)
    with pytest.raises(ValueError, match="3 samples cannot be divided among 1 bars"):
        equal_mass(torch.rand(3), 1)
    with pytest.raises(ValueError, match="too many samples are equal for 2 bars"):
        equal_mass(torch.zeros(8), 2)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="bars of equal mass take finite samples"):
            equal_mass(torch.tensor([0.0, 1.0, 2.0, wrong]), 2)


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_every_y_needs_logits_of_its_own(unchecked, shape):
    with pytest.raises(PartError, match=r"each y has its own logits: for logits of \(3, 4\) not y of "):
        made()[0](torch.zeros(3, 4), torch.zeros(shape))
