"""S5 against its equations, and against S4D."""

from __future__ import annotations

import pytest
import torch

from gatework.mixers import S4D, S5
from gatework.ops.hippo import normal_plus_low_rank
from gatework.ops.scan import associative_scan

from .state_space_layers import D, inputs, rates, same_with_gradients, shared


def layer(**settings) -> S5:
    torch.manual_seed(0)
    return S5(D, **({"d_state": 8} | settings)).double()


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("settings", [{}, {"hippo_blocks": 2}, {"d_state": 2}])
def test_equals_the_equations_with_all_gradients(settings, length):
    m, x = layer(**settings), inputs(length).requires_grad_()
    same_with_gradients(m, m(x), shared(m, x, copies=2), x)


def test_the_chunks_equal_the_associative_scan():
    m, x = layer(), inputs(70)
    u = m.inputs(x)
    u = torch.complex(*u.chunk(2, -1))
    factor = (rates(m)[:, 0] * m.log_step.exp()).exp()
    _, h = associative_scan(lambda first, then: (first[0] * then[0], then[0] * first[1] + then[1]), (factor.expand_as(u), u))
    torch.testing.assert_close(m(x), m.output(torch.cat([h.real, h.imag], -1), x), rtol=0, atol=1e-12)


def test_of_single_channels_it_is_s4d():
    """Each mode reading one channel and writing the same one, with its channel's step: the systems' outputs are S4D's."""
    n = 4
    torch.manual_seed(0)
    s4d, s5 = S4D(D, d_state=2 * n).double(), S5(D, d_state=2 * n * D).double()
    x = inputs(50)
    with torch.no_grad():
        s4d.skip.zero_()
        s5.skip.zero_()
        s5.log_step.copy_(s4d.log_step.repeat_interleave(n))
        for name in ("log_decay", "frequency"):
            getattr(s5, name).copy_(getattr(s4d, name).reshape(-1, 1))
        s5.b.zero_()
        s5.c.zero_()
        for d in range(D):
            s5.b[d * n : (d + 1) * n, d] = s4d.b[d]
            s5.c[d, d * n : (d + 1) * n] = s4d.c[d]
        s4d.o_proj.weight.copy_(torch.cat([torch.eye(D), torch.zeros(D, D)]))
        s4d.o_proj.bias.zero_()
        s5.gate_proj.weight.zero_()
        s5.gate_proj.bias.zero_()
    torch.testing.assert_close(s5(x), s4d(x), rtol=0, atol=1e-11)  # Both gates are half open.


def test_it_starts_from_blocks_of_hippo():
    m = layer(hippo_blocks=2)
    rate = normal_plus_low_rank(4)[0]
    torch.testing.assert_close(rates(m)[:, 0], torch.cat([rate, rate]), rtol=1e-6, atol=1e-6)
    torch.manual_seed(0)
    wide = S5(400, d_state=64, hippo_blocks=4)
    # V* and V keep lengths: half the energy of B and of the complex C, of which each mode's conjugate has the other half.
    assert wide.b.square().sum().item() == pytest.approx(64 / 2, rel=0.05)
    assert wide.c.square().sum().item() == pytest.approx(400 * 2 / 2, rel=0.05)
    assert wide.log_step.std() > 0.5


def test_what_the_state_costs():
    m = S5(16, d_state=64)
    assert m.state_bytes(10**6) == 64 * 4
    assert all(isinstance(getattr(m, name), torch.nn.Parameter) for name in m.no_weight_decay)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_state": 10, "hippo_blocks": 2}, "d_state 10 is not divisible into hippo_blocks 2 of an even size"),
        ({"hippo_blocks": 0}, "hippo_blocks 0"),
        ({"dt_min": 0.0}, "0 < dt_min <= dt_max"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        S5(D, **settings)
