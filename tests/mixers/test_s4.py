"""S4 against the dense system, and against the paper's kernel."""

from __future__ import annotations

import pytest
import torch

from gatework.core import build
from gatework.core.cost import count_flops
from gatework.mixers import S4
from gatework.ops.hippo import legs, normal_plus_low_rank
from gatework.ops.state_space import state_space

from .state_space_layers import D, channels, inputs, rates, same_with_gradients, whole

N = 8


def layer(d_state: int = N, **settings) -> S4:
    torch.manual_seed(0)
    return S4(D, d_state=d_state, **settings).double()


def reference(m: S4, x: torch.Tensor) -> torch.Tensor:
    rate, low_rank = rates(m), whole(m.p)
    matrix = torch.cat([rate, rate.conj()], -1).diag_embed() - low_rank[..., None] * low_rank.conj()[..., None, :]
    return channels(m, x, matrix, whole(m.b), whole(m.c), bilinear=True)


@pytest.mark.parametrize("length", [1, 5, 64, 70])
def test_equals_the_dense_system_with_all_gradients(length):
    m, x = layer(), inputs(length).requires_grad_()
    with torch.no_grad():
        for p in m.parameters():
            p += 0.1 * torch.randn_like(p)
    same_with_gradients(m, m(x), reference(m, x), x)


def test_it_starts_as_hippo():
    """The system is HiPPO-LegS in another basis: the same transfer function, for outputs read in that basis."""
    m = layer()
    a, b = legs(N)
    half = normal_plus_low_rank(N)[3]
    c = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        m.c.copy_(torch.view_as_real(c.to(half.dtype) @ half))
    x = inputs(20)
    step = m.log_step.detach().exp()
    rows = []
    for d in range(D):
        one = torch.eye(N, dtype=torch.float64)
        a_bar, b_bar = (torch.linalg.solve(one - step[d] / 2 * a, y) for y in (one + step[d] / 2 * a, step[d] * b[:, None]))
        h, outputs = torch.zeros(N, len(x), dtype=torch.float64), []
        for t in range(20):
            h = a_bar @ h + b_bar * x[:, t, d]
            outputs.append(c @ h)
        rows.append(torch.stack(outputs, 1))
    y = state_space(m.system(), x)[0]
    torch.testing.assert_close(y, torch.stack(rows, 2), rtol=1e-4, atol=1e-4)  # The parameters are float32's.


@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
def test_the_papers_kernel_gives_the_same_outputs(length):
    m, x = layer(64), inputs(length)
    kernel = m.kernel(length)
    assert kernel.shape == (D, length)
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    y = torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)
    torch.testing.assert_close(state_space(m.system(), x)[0], y, rtol=0, atol=1e-9)


def test_the_kernel_of_a_longer_sequence_begins_with_that_of_a_shorter():
    """c, not c (1 - A^L), is the parameter, so the length changes nothing."""
    m = layer(64)
    torch.testing.assert_close(m.kernel(200)[:, :77], m.kernel(77), rtol=0, atol=1e-9)


def test_stable_whatever_the_parameters_are():
    m = layer()
    with torch.no_grad():
        for p in m.parameters():
            p += 5 * torch.randn_like(p)
    assert (torch.linalg.matrix_norm(m.system().matrix(), 2) <= 1).all()


def test_what_the_state_costs():
    m = S4(16, d_state=64)
    assert m.state_bytes(10**6) == 16 * 64 * 4
    assert m.no_weight_decay == ("log_step", "log_decay", "frequency", "b", "p")
    assert all(isinstance(getattr(m, name), torch.nn.Parameter) for name in m.no_weight_decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"d_state": 5}, "even number of entries, got 5"), ({"dt_max": 1e-4}, "0 < dt_min <= dt_max, got 0.001 and 0.0001")],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        S4(D, **settings)


def test_flops_grow_by_the_chunks_of_the_systems():
    """Beyond tables that do not depend on the length: 128 x 128 kernels, two products with 64 numbers of state, the projection."""
    m, totals = build("s4", "mixer", d_model=4), []
    for length in (128, 256, 512):
        with torch.no_grad(), count_flops() as count:
            m(torch.randn(1, length, 4))
        totals.append(count.total)
    chunk = 4 * (2 * 128 * 128 + 4 * 128 * 64) + 2 * 128 * 2 * 4 * 4
    assert (totals[1] - totals[0], totals[2] - totals[1]) == (chunk, 2 * chunk)
