import math

import pytest
import torch

from gatework.core import PartError, build
from gatework.feedforward import GLU

ACTIVATIONS = {
    "silu": lambda v: v / (1 + math.exp(-v)),
    "gelu": lambda v: v * math.erfc(-v / math.sqrt(2)) / 2,
    "relu": lambda v: max(v, 0.0),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
}


def reference(m, x, act):
    """Number by number, from W_down (act(W_gate x) * (W_up x))."""
    def linear(layer, v):
        bias = layer.bias.tolist() if layer.bias is not None else [0.0] * len(layer.weight)
        return [sum(w * c for w, c in zip(row, v, strict=True)) + b for row, b in zip(layer.weight.tolist(), bias, strict=True)]

    rows = []
    for v in x.tolist():
        hidden = [act(g) * u for g, u in zip(linear(m.gate, v), linear(m.up, v), strict=True)]
        rows.append(linear(m.down, hidden))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_the_equations(name, bias):
    torch.manual_seed(0)
    m = GLU(5, d_ff=7, activation=name, bias=bias).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(m(x.view(2, 3, 5)).view(6, 5), reference(m, x, ACTIVATIONS[name]), rtol=1e-9, atol=1e-12)


def test_order_1_of_silu_is_the_sigmoid_glu():
    torch.manual_seed(0)
    first, x = GLU(5, d_ff=7, order=1).double(), torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(first(x), reference(first, x, ACTIVATIONS["sigmoid"]), rtol=1e-9, atol=1e-12)


def test_parameters_and_defaults():
    for d_model, d_ff in {96: 256, 128: 344, 64: 176, 3: 8}.items():
        m = GLU(d_model)
        assert m.up.weight.shape == (d_ff, d_model)
        assert sum(p.numel() for p in m.parameters()) == 3 * d_model * d_ff
    assert type(GLU(4).activation).__name__ == "SiLU"


def test_wrong_arguments():
    with pytest.raises(PartError, match="order=1 needs a self-gated activation such as silu; ReLU has no gate of its own"):
        build("glu(activation=relu, order=1)", d_model=4)
    with pytest.raises(PartError, match="order must be one of 1, 2, got 3"):
        build("glu(order=3)", d_model=4)
    with pytest.raises(PartError, match="d_ff must be at least 1"):
        build("glu(d_ff=-8)", d_model=4)
