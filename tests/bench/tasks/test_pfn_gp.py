"""The task ``pfn_gp``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.core import GateworkError

from .made import take, task


@pytest.mark.parametrize("options", [{}, {"inputs": 3, "points": 12}, {"equidistant": True, "points": 11}])
def test_rows_hold_a_context_and_queries_without_their_y(options):
    made = make_task("pfn_gp", **options)
    inputs, n, sizes = made.inputs, made.points, []
    for x, y in take(made, 0, 7, 12):
        assert x.shape == (7, n, inputs + 2)
        m = n - y.shape[1]
        sizes.append(m)
        assert torch.equal(x[..., -1], (torch.arange(n) < m).float().expand(7, -1))
        assert not x[:, m:, inputs].any()
        assert x[:, :m, inputs].all()
        assert (x[..., :inputs] >= 0).all()
        assert (x[..., :inputs] <= 1).all()
        if made.equidistant:
            grid = torch.linspace(0, 1, n, dtype=torch.float64).float()
            torch.testing.assert_close(x[..., 0].sort(1).values, grid.expand(7, -1))
            assert (x[..., 0].diff(dim=1) < 0).any()  # In a random order.
    assert len(set(sizes)) > 3


def test_sizes_of_the_context_follow_their_law():
    made = make_task("pfn_gp", points=5)
    counts = torch.zeros(5)
    for _, y in take(made, 3, 1, 4000):
        counts[5 - y.shape[1]] += 1
    weights = 1 / (5 - torch.arange(5))
    torch.testing.assert_close(counts / 4000, weights / weights.sum(), rtol=0, atol=0.03)


def test_samples_have_the_processs_covariance():
    made = make_task("pfn_gp", points=3, outputscale=0.7, noise=0.2, lengthscale=0.3, equidistant=True)
    x, y = made.sample(60_000, torch.Generator().manual_seed(0))
    order = x[..., 0].argsort(1)
    y = y.gather(1, order)
    kernel = [[0.7 * math.exp(-((a - b) ** 2) / (2 * 0.09)) + 0.2 * (a == b) for a in (0, 0.5, 1)] for b in (0, 0.5, 1)]
    torch.testing.assert_close(y.t() @ y / len(y), torch.tensor(kernel, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize("m", [0, 1, 4])
def test_posterior_is_the_normal_distribution_conditioned(m):
    """By the block inverse of the joint covariance."""
    made = make_task("pfn_gp", inputs=2, points=7, noise=0.05, lengthscale=0.4)
    x, y = made.sample(3, torch.Generator().manual_seed(1))
    mean, variance = made.posterior(x[:, :m], y[:, :m], x[:, m:])
    assert mean.shape == variance.shape == (3, 7 - m)
    for b in range(3):
        kernel = torch.tensor(
            [[0.1 * math.exp(-float((p - q).square().sum()) / (2 * 0.16)) for q in x[b]] for p in x[b]], dtype=torch.float64
        )
        joint = kernel + 0.05 * torch.eye(7, dtype=torch.float64)
        a, across, rest = joint[:m, :m], joint[:m, m:], joint[m:, m:]
        inverse = torch.linalg.inv(a)
        torch.testing.assert_close(mean[b], across.t() @ inverse @ y[b, :m], rtol=0, atol=1e-10)
        torch.testing.assert_close(variance[b], (rest - across.t() @ inverse @ across).diagonal(), rtol=0, atol=1e-10)


def test_the_exact_posterior_in_bars_has_a_small_gap_and_the_prior_a_large_one():
    made = task("pfn_gp")
    normal, borders = torch.distributions.Normal, made.distribution.borders

    def exact(x):
        """The posterior's mass in each bar."""
        x = x.double()
        m = int(x[0, :, -1].sum())
        mean, variance = made.posterior(x[:, :m, :1], x[:, :m, 1], x[:, m:, :1])
        mass = normal(mean[..., None], variance.sqrt()[..., None]).cdf(borders[1:-1]).clamp(1e-30, 1)
        edges = torch.cat([torch.zeros_like(mass[..., :1]), mass, torch.ones_like(mass[..., :1])], -1)
        return edges.diff(dim=-1).clamp(min=1e-30).log()

    for split in ("validation", "test"):
        found = made.evaluate(exact, split)
        assert 0 < found["gap"] < 0.04
        assert found["correlation"] > 0.995
        assert all(-0.01 < found[f"gap_at_{m}"] < 0.06 for m in made.contexts)
    prior = made.evaluate(lambda x: torch.zeros(len(x), made.points - int(x[0, :, -1].sum()), 100), "test")
    assert prior["gap_at_0"] == pytest.approx(0.02, abs=0.02)
    assert prior["gap"] > 3 * found["gap"]
    assert prior["gap_at_29"] > prior["gap_at_7"] > prior["gap_at_0"]
    assert prior["correlation"] == 0
    assert prior["posterior"] == pytest.approx(found["posterior"])
    assert prior["loss"] - prior["posterior"] == pytest.approx(prior["gap"])
    assert made.evaluate(exact, "test", max_batches=1)["gap"] == pytest.approx(found["gap"], abs=0.1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"points": 1}, "points at least 2, the three scales are positive and finite, not 1, 1, 0.1, 0.1 and 0.1"),
        ({"noise": 0.0}, "not 1, 30, 0.1, 0.1 and 0.0"),
        ({"noise": math.nan}, "positive and finite, not 1, 30, 0.1, 0.1 and nan"),
        ({"outputscale": math.inf}, "positive and finite, not 1, 30, 0.1, inf and 0.1"),
        ({"noise": 1e-18}, "noise of at least 1e-10 outputscale and a lengthscale of at least 1e-100, not 1e-18, 0.1 and 0.1"),
        ({"lengthscale": 1e-300}, "not 0.1, 0.1 and 1e-300"),
        ({"inputs": 2, "equidistant": True}, "points are equidistant on a line: that takes 1 input, not 2"),
        ({"bars": 1}, "100000 samples cannot be divided among 1 bars"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(GateworkError, match=sentence):
        make_task("pfn_gp", **options)
