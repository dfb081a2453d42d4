"""Feature-selection gates against the equation."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gatework import gates
from gatework.core import metrics
from gatework.core.cost import count_flops, count_parameters
from gatework.gates import FeatureSelection
from gatework.models import Decoder

D = 6


def gate(**settings):
    torch.manual_seed(0)
    return FeatureSelection(D, **settings).double()


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigmoid(w):
    return 1 / (1 + math.exp(-w))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_values_and_gradients_are_the_equation_s(scale):
    g, x, upstream = gate(scale=scale), randn(3, 4, D).requires_grad_(), randn(3, 4, D, seed=2)
    s = [sigmoid(w) for w in g.weight.tolist()]
    y = g(x)
    torch.testing.assert_close(y, x.detach() * scale * torch.tensor(s, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    y.backward(upstream)
    for d in range(D):
        wanted = sum(upstream[i, j, d].item() * x[i, j, d].item() for i in range(3) for j in range(4)) * scale * s[d] * (1 - s[d])
        assert g.weight.grad[d].item() == pytest.approx(wanted, rel=1e-12)
        torch.testing.assert_close(x.grad[..., d], upstream[..., d] * scale * s[d], rtol=1e-14, atol=1e-14)
    assert metrics(g)["gate"].item() == pytest.approx(scale * sum(s) / D, rel=1e-12)
    torch.testing.assert_close(g.eval()(x), y, rtol=0, atol=0)


def test_open_wide_it_is_the_plain_network():
    torch.manual_seed(0)
    model = Decoder(7, d_model=8, layers=2, heads=2).double()
    tokens = torch.arange(10).remainder(7).view(1, 10)
    plain, known = model(tokens), count_parameters(model)
    made = gates.attach(model, ["mixer.o_proj", "feedforward.down"], "feature_selection")
    assert count_parameters(model) == known + 4 * 8, "D extra parameters per site"
    assert sorted(made) == [f"depth.blocks.{i}.{name}" for i in (0, 1) for name in ("feedforward.down", "mixer.o_proj")]
    for m in made.values():
        nn.init.constant_(m.weight, 50.0)
    torch.testing.assert_close(model(tokens), plain, rtol=0, atol=1e-12)


def test_gates_stand_on_both_residual_branches():
    torch.manual_seed(0)
    model = Decoder(7, d_model=8, layers=1, heads=2).double()
    block, x = model.blocks[0], randn(2, 5, 8)
    mixed, fed = block.mix(x), block.transform(x)
    made = gates.attach(model, ["mixer.o_proj", "feedforward.down"], "feature_selection")
    for branch, plain, name in ((block.mix, mixed, "mixer.o_proj"), (block.transform, fed, "feedforward.down")):
        s = made[f"depth.blocks.0.{name}"].weight.sigmoid()
        torch.testing.assert_close(branch(x), plain * s, rtol=0, atol=1e-12)
        assert ((s - 0.5).abs() < 0.4).all()


def test_hard_mode_closes_in_evaluation_only_and_compacts():
    model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, 2)).double()
    g = gates.attach(model, "0", "feature_selection(threshold=0.4)")["0"]
    g.weight.data.copy_(torch.tensor([-2, -0.5, -0.4, 0.0, 1.0, 3.0], dtype=torch.float64))  # sigmoid(-0.4) = 0.401
    x = randn(5, 4)
    hidden = torch.relu(nn.functional.linear(x, model[0].weight, model[0].bias))
    soft = torch.tensor([sigmoid(w) for w in g.weight.tolist()], dtype=torch.float64)
    hard = torch.where(torch.tensor([True, True, False, False, False, False]), 0, soft)
    assert torch.equal(g.values() == 0, hard == 0)
    torch.testing.assert_close(model.train()(x), model[2](hidden * soft), rtol=0, atol=1e-12)
    gated = model.eval()(x)
    torch.testing.assert_close(gated, model[2](hidden * hard), rtol=0, atol=1e-12)
    folded = copy.deepcopy(model)
    gates.fold(folded)
    torch.testing.assert_close(folded(x), gated, rtol=0, atol=1e-12)
    assert gates.compact(model) == {"0": (6, 4)}
    torch.testing.assert_close(model(x), gated, rtol=0, atol=1e-12)
    with count_flops() as count:
        model(x)
    assert count.total == 2 * 5 * (4 * 4 + 4 * 2)


def test_initialisation():
    torch.manual_seed(0)
    weight = FeatureSelection(5000).weight
    assert weight.std().item() == pytest.approx((2 / 5001) ** 0.5, rel=0.03)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)
    assert (FeatureSelection(5000, scale=2.0).values() - 1).abs().max() < 0.06, "scale=2 starts where a trained model was"


@pytest.mark.parametrize("settings", [{"d_model": 0}, {"scale": 0.0}, {"threshold": 1.0}, {"threshold": -0.1}])
def test_wrong_arguments(settings):
    with pytest.raises(ValueError, match="d_model must be at least 1, scale positive and threshold in"):
        FeatureSelection(**({"d_model": 3} | settings))
