"""Mixture: the density of its output, any gate, and its task's score."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import PartError
from gatework.experts.gaussian_moe import GaussianMoE
from gatework.models import Mixture
from gatework.models.mixture import log_density


def points(n=30, d=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, 2 * torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("gate", "settings"),
    [("topk(k=3)", {}), ("activation_dts(act=sigmoid)", {"activation": "sigmoid", "temperature": True})],
)
def test_with_the_papers_gates_it_is_the_papers_model(gate, settings):
    torch.manual_seed(0)
    model = Mixture(2, 3, gate).double().eval()
    other = GaussianMoE(2, 3, **settings).double()
    with torch.no_grad():
        torch.nn.init.normal_(model.log_variance)
        torch.nn.init.normal_(model.gate.weight)
        own = dict(model.gate.named_parameters())
        other.gate_weight.copy_(own["weight"])
        other.gate_bias.copy_(own["bias"] if "bias" in own else torch.zeros(3))
        if settings:
            other.log_tau.copy_(own["log_tau"])
        for name in ("slope", "intercept", "log_variance"):
            getattr(other, name).copy_(getattr(model, name))
    x, y = points()
    torch.testing.assert_close(log_density(model(x), y), other(x, y), rtol=0, atol=1e-10)


def test_an_expert_that_is_not_chosen_has_no_part_in_it():
    """Sparse weights that do not sum to 1 are divided by their sum; the gradients stay finite."""
    torch.manual_seed(0)
    model = Mixture(2, 4, "topk(k=2, normalize=none)").double()
    x, y = points()
    output = model(x)
    weights, means = output[:, 0].exp(), output[:, 1]
    assert ((weights > 0).sum(1) == 2).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(30, dtype=torch.float64))
    density = (weights * torch.exp(-(y[:, None] - means).square() / 2) / math.sqrt(2 * math.pi)).sum(1)
    torch.testing.assert_close(log_density(output, y), density.log(), rtol=0, atol=1e-12)
    (-log_density(output, y).mean()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_what_is_no_mixture_is_refused():
    with pytest.raises(PartError, match="AttentionWeighted chooses by history"):
        Mixture(2, 3, "attention_weighted")
    with pytest.raises(PartError, match="built for 2 inputs, not 3"):
        Mixture(2)(torch.zeros(1, 3))
    with pytest.raises(PartError, match="at least 1, got 0 and 4"):
        Mixture(0)
