"""silu, gelu, relu, sigmoid, tanh."""

import math

import pytest
import torch

from gatework.core import build

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
