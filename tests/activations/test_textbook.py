"""silu, gelu, relu, sigmoid, tanh."""

import math

import pytest
import torch

from gatework.core import build
from gatework.core.cost import saved_bytes
from gatework.core.registry import entries

FORMULAS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * math.erfc(-v / math.sqrt(2)) / 2,
    "relu": lambda v: max(v, 0.0),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "tanh": math.tanh,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_equals_the_formula(name):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    want = torch.tensor([FORMULAS[name](v) for v in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(build(name, "activation")(x), want, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_gate_times_x_is_the_activation(name):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    part = build(name, "activation")
    torch.testing.assert_close(x * part.gate(x), part(x), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("entry", entries("activation"), ids=lambda entry: entry.name)
def test_gated_is_the_activation_of_one_half_times_the_other_with_all_gradients(entry):
    torch.manual_seed(0)
    part = build(entry.name, "activation").double()
    halves = torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True)
    leaves = [halves, *part.parameters()]
    want = part(halves[..., :4]) * halves[..., 4:]
    got = part.gated(halves)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-15)
    upstream = torch.randn(1, 3, 4, dtype=torch.float64).expand(5, 3, 4)
    for mine, theirs in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


def test_gated_silu_saves_the_halves_alone():
    halves = torch.randn(64, 32, requires_grad=True)
    with saved_bytes() as saved:
        build("silu", "activation").gated(halves * 1)
    assert saved.total == 64 * 32 * 4
