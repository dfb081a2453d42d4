"""S4-PTD against the dense HiPPO matrix that it starts from."""

from __future__ import annotations

import pytest
import torch

from gatework.mixers import S4D, S4PTD
from gatework.ops.hippo import legs, normal_plus_low_rank, perturb_then_diagonalise, perturbation
from gatework.ops.state_space import state_space

from .state_space_layers import D, channels, inputs, rates, same_with_gradients

N = 8


def layer(**settings) -> S4PTD:
    torch.manual_seed(0)
    return S4PTD(D, **({"d_state": N} | settings)).double()


def read_by(m, c: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """c h for x' = matrix x + B u with HiPPO's B, zero-order hold, in every channel's step."""
    size, b = len(matrix), legs(len(matrix))[1]
    block = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    block[:size, :size], block[:size, size] = matrix, b
    both = torch.linalg.matrix_exp(m.log_step.detach().exp()[:, None, None] * block)
    h, rows = torch.zeros(len(x), D, size, dtype=torch.float64), []
    for t in range(x.shape[1]):
        h = torch.einsum("dij,bdj->bdi", both[:, :size, :size], h) + both[:, :size, size] * x[:, t, :, None]
        rows.append((c * h).sum(-1))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("settings", [{}, {"perturbation": "random", "epsilon": 1e-3}])
def test_equals_the_dense_system_with_all_gradients(settings, length):
    m, x = layer(**settings), inputs(length).requires_grad_()
    b, c = torch.view_as_complex(m.b), torch.view_as_complex(m.c)
    same_with_gradients(m, m(x), channels(m, x, rates(m).diag_embed(), b, c, bilinear=False), x)


def test_it_starts_as_the_perturbed_hippo_matrix():
    """Its outputs are those of x' = (A + E) x + B u read out by one normal vector per channel."""
    m, x = layer(), inputs(30)
    a = legs(N)[0] + perturbation("optimised", N, 0.003)
    torch.manual_seed(0)
    c = torch.randn(D, N).double()  # Drawn first, so that this is what the layer has drawn.
    torch.testing.assert_close(state_space(m.system(), x)[0], read_by(m, c, x, a), rtol=1e-4, atol=1e-4)


def test_it_stays_closer_to_hippo_than_s4d():
    """On a wave at the frequency where the transfer function of S4D-LegS has its spike."""
    n, step, spike = 32, 1e-3, 324.9655
    ptd, s4d = S4PTD(D, d_state=n).double(), S4D(D, d_state=n, init="legs").double()
    half, (_, _, vectors) = normal_plus_low_rank(n)[3], perturb_then_diagonalise(perturbation("optimised", n, 0.003))
    c = torch.randn(D, n, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        for m in (ptd, s4d):
            m.log_step.fill_(torch.tensor(step, dtype=torch.float64).log())
        ptd.c.copy_(torch.view_as_real(c.to(vectors.dtype) @ vectors))
        s4d.c.copy_(torch.view_as_real(c.to(half.dtype) @ half / 2))  # Half of B, as theory wants it.
    x = (spike * step * torch.arange(2000, dtype=torch.float64)).cos()[None, :, None].expand(1, -1, D)
    wanted = read_by(ptd, c, x, legs(n)[0])[:, 1000:]
    ours, theirs = ((state_space(m.system(), x)[0][:, 1000:] - wanted).abs().max().item() for m in (ptd, s4d))
    assert ours < theirs / 20


def test_what_the_state_costs():
    m = S4PTD(16, d_state=16)
    assert m.state_bytes(10**6) == 16 * 32 * 4
    assert all(isinstance(getattr(m, name), torch.nn.Parameter) for name in m.no_weight_decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_state": 0}, "d_state must be at least 1"),
        ({"epsilon": -1.0}, "epsilon positive and finite, got 8 and -1.0"),
        ({"perturbation": "random", "epsilon": 0.3, "d_state": 32}, "take a smaller epsilon"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)
