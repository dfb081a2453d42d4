import math

import pytest
import torch

from gatework.core import PartError, build
from gatework.feedforward import MLP


@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_equations(bias):
    torch.manual_seed(0)
    m = MLP(5, d_ff=7, activation="tanh", bias=bias).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    y = m(x, mask=torch.tensor([[True, True, False]]).expand(2, 3))
    for b in range(2):
        for t in range(3):
            hidden = []
            for h in range(7):
                value = sum(m.up.weight[h, d].item() * x[b, t, d].item() for d in range(5))
                hidden.append(math.tanh(value + (m.up.bias[h].item() if bias else 0)))
            for d in range(5):
                want = sum(m.down.weight[d, h].item() * hidden[h] for h in range(7)) + (m.down.bias[d].item() if bias else 0)
                assert abs(y[b, t, d].item() - want) < 1e-14


def test_parameters_and_defaults():
    assert sum(p.numel() for p in MLP(12).parameters()) == 2 * 12 * 48
    assert sum(p.numel() for p in MLP(12, d_ff=20, bias=True).parameters()) == 2 * 12 * 20 + 20 + 12
    assert type(MLP(4).activation).__name__ == "GELU"


def test_any_leading_shape():
    m = MLP(4)
    assert m(torch.randn(4)).shape == (4,)
    assert m(torch.randn(0, 4)).shape == (0, 4)


def test_wrong_sizes():
    with pytest.raises(PartError, match="d_ff must be at least 1, got 0"):
        build("mlp(d_ff=0)", d_model=4)
    with pytest.raises(PartError, match="d_model must be at least 1, got 0"):
        build("mlp", d_model=0)
