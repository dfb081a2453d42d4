"""The task ``dynamical_systems``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task


def test_rates_are_those_of_the_differential_equations():
    """Against an adaptive solver; parameters and initial values are drawn family by family, in this order."""
    solve = pytest.importorskip("scipy.integrate").solve_ivp
    fields = [
        lambda t, z, a, b: [0.5 * z[0] - a * z[0] * z[1], b * z[0] * z[1] - 0.5 * z[1]],
        lambda t, z, a, b: [z[1], a * (1 - z[0] ** 2) * z[1] - b * z[0]],
        lambda t, z, a, b: [z[1], -a * math.sin(z[0]) - b * z[1]],
        lambda t, z, a, b: [-z[0] + a * z[1] + z[0] ** 2 * z[1], b - a * z[1] - z[0] ** 2 * z[1]],
    ]
    ranges = [[(0.25, 1), (0.25, 1)], [(0.2, 1.5), (0.5, 1.5)], [(1, 4), (0, 0.5)], [(0.05, 0.15), (0.3, 0.9)]]
    places = [(0.5, 2), (-2, 2), (-2, 2), (0.2, 1.5)]
    made = make_task("dynamical_systems", systems=2, trajectories=1, seed=5)
    x, y = (torch.cat([made.splits[name][i].view(8, -1, 20, 3 - i) for name in ("train", "validation", "test")], 1) for i in (0, 1))
    assert torch.equal(x[..., 0], torch.arange(8.0)[:, None, None].expand(8, 5, 20))
    generator = torch.Generator().manual_seed(5)
    for f, field in enumerate(fields):
        low, high = torch.tensor(ranges[f], dtype=torch.float64).T
        p = low + torch.rand(2, 1, 2, dtype=torch.float64, generator=generator) * (high - low)
        start = places[f][0] + (places[f][1] - places[f][0]) * torch.rand(2, 5, 2, dtype=torch.float64, generator=generator)
        paths = torch.tensor(
            [
                [
                    solve(field, (0, 4), start[s, j].tolist(), args=p[s, 0].tolist(), t_eval=[0.2 * i for i in range(21)],
                          rtol=1e-9, atol=1e-9, max_step=0.1).y.T.tolist()
                    for j in range(5)
                ]
                for s in range(2)
            ],
            dtype=torch.float64,
        )
        states, rates = paths[:, :, :-1], paths.diff(dim=2) / 0.2
        train = states[:, :1].flatten(0, 2)
        scaled = (states - train.mean(0)) / train.std(0, correction=0)
        torch.testing.assert_close(x[2 * f : 2 * f + 2, ..., 1:], scaled.float(), rtol=0, atol=2e-3)
        speed = rates[:, :1].flatten(0, 2).square().mean(0).sqrt()
        torch.testing.assert_close(y[2 * f : 2 * f + 2], (rates / speed).float(), rtol=0, atol=2e-3)


def test_unseen_systems_have_one_trajectory_to_adapt_to_and_two_to_score_on():
    made = make_task("dynamical_systems", families=2, trajectories=1)
    (x, y), (query_x, query_y) = made.unseen(systems=3)
    assert (x.shape, y.shape, query_x.shape, query_y.shape) == ((120, 3), (120, 2), (240, 3), (240, 2))
    assert x[:, 0].unique().tolist() == query_x[:, 0].unique().tolist() == [0.0, 1, 2, 3, 4, 5]
    known = {tuple(row.tolist()) for row in made.splits["train"][0][:, 1:]}
    assert not known & {tuple(row.tolist()) for row in x[:, 1:]}
    assert all(torch.equal(a, b) for a, b in zip(made.unseen(systems=3)[0], (x, y), strict=True))
