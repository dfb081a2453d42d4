"""ParaLSTM against its equations; what it shares with ParaGRU is tested there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatework.mixers import ParaLSTM

from .test_paragru import equal, gates_of, inputs, layer, output_of


def reference(m: ParaLSTM, x: Tensor) -> Tensor:
    gates, (a_f, a_g, a_o, p_f, p_o) = gates_of(m, x), m.recurrent_weight
    c, h, rows = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        f = torch.sigmoid(a_f * h + p_f * c + gates[:, t, 0])
        c = f * c + (1 - f) * torch.tanh(a_g * h + gates[:, t, 1])
        h = torch.sigmoid(a_o * h + p_o * c + gates[:, t, 2]) * torch.tanh(c)
        rows.append(h)
    return output_of(m, x, torch.stack(rows, 1))


@pytest.mark.parametrize("length", [1, 3, 40, 150])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_equals_the_equations_with_all_gradients(length, chunk):
    m, x = layer(ParaLSTM, chunk=chunk), inputs(length).requires_grad_()
    equal(m, x, reference(m, x))


def test_initial_values():
    torch.manual_seed(0)
    m = ParaLSTM(400, heads=2)
    assert m.recurrent_weight.std().item() == pytest.approx(2 / 2000**0.5, rel=0.05)
    assert m.input_weight.abs().max().item() == pytest.approx((6 / 400) ** 0.5, rel=1e-3)
    torch.testing.assert_close(m.bias[0], -torch.linspace(0, 1, 400), rtol=0, atol=0)
    assert not m.bias[1:].any()
