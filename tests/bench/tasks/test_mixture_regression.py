"""The task ``mixture_regression``."""

from __future__ import annotations

import torch

from gatework.bench.tasks import make_task


def test_the_truth_loses_nothing():
    made = make_task("mixture_regression")
    truth = made.truth

    @torch.no_grad()
    def predict(x):
        means = x.double() @ truth.slope.t() + truth.intercept
        return torch.stack([truth.log_gate(x.double()), means, truth.log_variance.expand_as(means)], 1)

    for batches in (None, 3):
        assert abs(made.evaluate(predict, "test", batches)["excess"]) < 1e-5
    state = torch.get_rng_state()
    make_task("mixture_regression", seed=1)
    assert torch.equal(state, torch.get_rng_state())
