"""Heterogeneous hash experts, point by point."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError, losses
from gatework.core.cost import count_flops
from gatework.experts import HeterogeneousHashExperts
from gatework.ops.hash_grid import HashGridEncoding

SIZES = {"d_model": 2, "features": 5, "experts": 3, "levels": 3, "log2_size": 6, "n_min": 4, "n_max": 64, "coarsest": 4, "d_ff": 7}


def layer(**settings) -> HeterogeneousHashExperts:
    torch.manual_seed(0)
    made = HeterogeneousHashExperts(**(SIZES | settings)).double()
    for name, p in made.named_parameters():
        if name.endswith("table"):
            torch.nn.init.normal_(p)
    return made


def points(n: int = 60, d: int = 2) -> torch.Tensor:
    return torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def field(expert, x):
    encoding, first, _, second = expert
    return torch.relu(encoding(x[None])[0] @ first.weight.T + first.bias) @ second.weight.T + second.bias


@pytest.mark.parametrize("d", [2, 3])
def test_each_point_is_drawn_by_its_expert_times_its_probability(d):
    made, x = layer(d_model=d), points(d=d)
    routing = made.gate(x)
    weights = torch.randn(60, 5, dtype=torch.float64)
    chosen = routing.experts[:, 0].tolist()
    assert len(set(chosen)) >= 2
    wanted = list(made.parameters())
    results = []
    for y in (made(x), torch.stack([routing.probs[n, e] * field(made.experts[e], x[n]) for n, e in enumerate(chosen)])):
        results.append([y, *torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-11)


def test_experts_have_ranges_of_their_own():
    finest = [expert[0].cells[-1].item() for expert in layer().experts]
    assert finest == [4, 16, 64]
    assert [expert[0].cells[0].item() for expert in layer().experts] == [4, 4, 4]
    equal = layer(coarsest=64)
    assert [expert[0].cells.tolist() for expert in equal.experts] == [[4, 16, 64]] * 3
    assert [len(expert[0].table) for expert in layer().experts] == [3 * 25, 25 + 2 * 64, 25 + 2 * 64]


def test_one_expert_is_a_plain_field_of_the_finest_grid():
    made, x = layer(experts=1), points()
    assert isinstance(made.experts[0][0], HashGridEncoding)
    assert made.experts[0][0].n_max == 64
    torch.testing.assert_close(made(x), torch.stack([field(made.experts[0], p) for p in x]), rtol=0, atol=1e-12)


def test_one_expert_is_run_per_point():
    x = points().float()
    counted = []
    for experts in (1, 3, 9):
        made = layer(experts=experts).float()
        gate = 2 * 60 * (8 * 32 + 32 * experts)
        with torch.no_grad(), count_flops() as count:
            made(x)
        counted.append(count.total - gate)
    assert counted == [2 * 60 * (6 * 7 + 7 * 5)] * 3


def test_no_points_and_the_gate_s_loss():
    made = layer()
    assert made(points()[:0]).shape == (0, 5)
    made(points())
    assert set(losses(made)) == {"gate.switch"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coarsest": 65}, "between n_min 4 and n_max 64, got 65"), ({"experts": 0}, "at least 1"),
        ({"d_model": 4}, "1, 2 or 3 coordinates"), ({"gate": "moe"}, "is a feedforward, not a gate"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises((ValueError, PartError), match=message):
        layer(**settings)
