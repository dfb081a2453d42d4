"""The task ``in_context_ar``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.bench.tasks.in_context_ar import ridge
from gatework.core import GateworkError
from gatework.models.mesa import one_gradient_step, optimal_rate

from .made import take, task


@pytest.mark.parametrize("start", ["gaussian", "sparse", "sign"])
def test_every_sequence_is_turned_by_a_map_of_its_own(start):
    made, single = (make_task("in_context_ar", dimensions=4, length=9, start=start, scale=0.5, pairs=p) for p in (True, False))
    ((both, y),), ((x, same),) = take(made, 0, 200, 1), take(single, 0, 200, 1)
    assert torch.equal(y, same)
    assert torch.equal(both[..., :8], x)
    assert torch.equal(both[:, 1:, 8:], x[:, :-1])
    assert not both[:, 0, 8:].any()
    assert made.model_arguments() == {"inputs": 16, "outputs": 8}
    assert single.model_arguments() == {"inputs": 8, "outputs": 8}
    assert x.shape == y.shape == (200, 8, 8)
    assert torch.equal(x[:, 1:], y[:, :-1])
    z = torch.view_as_complex(torch.cat([x, y[:, -1:]], 1).double().unflatten(-1, (-1, 2)).contiguous())
    first = z[:, 0]
    assert not first.imag.any()
    there = first.real != 0
    turn = (z[:, 1] / first)[there]
    torch.testing.assert_close(turn.abs(), torch.ones_like(turn.abs()), rtol=0, atol=1e-4)
    phases = turn.angle().sort().values
    uniform = torch.linspace(-math.pi, math.pi, len(phases), dtype=torch.float64)
    assert (phases - uniform).abs().max() < 2 * math.pi * 1.9 / math.sqrt(len(phases))  # Kolmogorov and Smirnov, 1 in 1000.
    for t in range(8):
        expected = torch.where(there, z[:, t] * z[:, 1] / first.where(there, 1), 0)
        torch.testing.assert_close(z[:, t + 1], expected, rtol=0, atol=2e-5)
    if start == "gaussian":
        assert first.real.square().mean().item() == pytest.approx(0.25, rel=0.2)
    else:
        assert there.sum(1).unique().tolist() == [1 if start == "sparse" else 4]
        assert set(first.real[there].tolist()) == {0.5, -0.5}


def test_ridge_is_the_least_squares_of_each_prefix():
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = ridge(x, 0.1)
    assert not found[:, 0].any()
    for b in range(2):
        for t in range(1, 6):
            # Rows beneath the data stand for the penalty.
            a = torch.cat([x[b, :t], math.sqrt(0.1) * torch.eye(3, dtype=torch.float64)])
            target = torch.cat([x[b, 1 : t + 1], torch.zeros(3, 3, dtype=torch.float64)])
            w = torch.linalg.lstsq(a, target).solution.t()
            torch.testing.assert_close(found[b, t], w @ x[b, t], rtol=0, atol=1e-10)


def test_scores_of_models_that_are_known():
    made = make_task("in_context_ar", start="sparse", length=12)
    rate = optimal_rate("sparse", 5, 12)
    exact = made.evaluate(lambda x: one_gradient_step(x[..., :10], rate), "test")
    assert exact["relative_mse"] < 1e-10
    assert 0 < exact["ridge_last"] < 1e-4 < exact["ridge"] < 0.2
    error, reference, zero = made.by_place(lambda x: one_gradient_step(x[..., :10], rate), "test")
    assert error.shape == reference.shape == zero.shape == (11,)
    assert (error[1:] < 1e-10).all()
    assert error[0] == reference[0] == zero[0]  # Nothing is known yet.
    assert reference[1] > reference[4] > reference[-1]
    nothing = made.evaluate(lambda x: torch.zeros_like(x[..., :10]), "test", max_batches=2)
    assert nothing["relative_mse"] == nothing["relative_mse_last"] == pytest.approx(1)
    assert nothing["loss"] == pytest.approx(0.1)  # One of ten numbers, in the mean, is 1 in absolute value.
    gaussian = task("in_context_ar").evaluate(lambda x: torch.zeros_like(x[..., :10]), "validation")
    assert gaussian["loss"] == pytest.approx(0.5, rel=0.1)


def test_the_first_place_does_not_count():
    made = task("in_context_ar")
    ((_, y),) = take(made, 0, 4, 1)
    wrong = y.clone()
    wrong[:, 0] = 9
    assert made.loss(wrong, y).item() == 0
    assert made.units_per_batch(4) == 4 * 31


@pytest.mark.parametrize("options", [{"dimensions": 0}, {"length": 2}, {"scale": 0.0}, {"scale": math.inf}, {"scale": math.nan}])
def test_wrong_sizes_are_refused(options):
    with pytest.raises(GateworkError, match="dimensions must be at least 1, length at least 3 and scale positive and finite, got"):
        make_task("in_context_ar", **options)
    with pytest.raises(GateworkError, match="start must be"):
        make_task("in_context_ar", start="uniform")
