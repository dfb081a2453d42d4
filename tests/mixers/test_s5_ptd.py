"""S5-PTD against its equations and the matrix that it starts from."""

from __future__ import annotations

import pytest
import torch

from gatework.mixers import S5PTD
from gatework.ops.hippo import legs, perturbation

from .state_space_layers import D, inputs, rates, same_with_gradients, shared


def layer(**settings) -> S5PTD:
    torch.manual_seed(0)
    return S5PTD(D, **({"d_state": 8} | settings)).double()


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("settings", [{}, {"hippo_blocks": 2}, {"perturbation": "random", "epsilon": 1e-3}])
def test_equals_the_equations_with_all_gradients(settings, length):
    m, x = layer(**settings), inputs(length).requires_grad_()
    same_with_gradients(m, m(x), shared(m, x, copies=1), x)


@pytest.mark.parametrize("blocks", [1, 2])
def test_it_starts_as_the_perturbed_hippo_matrix(blocks):
    """With one step for all modes c e^(A t) b is that of A + E in each block: the modes and weights belong together."""
    m, size = layer(hippo_blocks=blocks), 8 // blocks
    matrix = torch.block_diag(*[legs(size)[0] + perturbation("optimised", size, 0.003)] * blocks)
    torch.manual_seed(0)
    entering = torch.randn(blocks, size, D).double().flatten(0, 1) * D**-0.5
    read = torch.complex(*(torch.randn(2, blocks, D, size).double() * 8**-0.5)).transpose(0, 1).flatten(1)
    b, c = torch.view_as_complex(m.b), torch.view_as_complex(m.c)
    for t in (0.0, 0.1, 1.0):
        ours = (c * (t * rates(m)[:, 0]).exp()) @ b
        wanted = read @ torch.linalg.matrix_exp(t * matrix).to(read.dtype) @ entering.to(read.dtype)
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)  # The parameters are float32's.


def test_what_the_state_costs():
    m = S5PTD(16, d_state=16)
    assert m.state_bytes(10**6) == 32 * 4
    assert all(isinstance(getattr(m, name), torch.nn.Parameter) for name in m.no_weight_decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hippo_blocks": 3}, "d_state 8 is not divisible into hippo_blocks 3"),
        ({"epsilon": 0.0}, "epsilon positive"),
        ({"dt_min": 1.0}, "0 < dt_min <= dt_max"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)
