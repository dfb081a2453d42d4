"""S4D against the dense system of its eigenvalues and their conjugates."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.mixers import S4D
from gatework.mixers.s4d import diagonal_start
from gatework.ops.hippo import normal_plus_low_rank
from gatework.ops.state_space import state_space

from .state_space_layers import D, channels, inputs, rates, same_with_gradients, whole

N = 8
INITS = ["lin", "inv", "legs", "real"]


def layer(**settings) -> S4D:
    torch.manual_seed(0)
    return S4D(D, d_state=N, **settings).double()


def reference(m: S4D, x: torch.Tensor) -> torch.Tensor:
    rate = rates(m)
    matrix = torch.cat([rate, rate.conj()], -1).diag_embed()
    return channels(m, x, matrix, whole(m.b), whole(m.c), m.discretization == "bilinear")


@pytest.mark.parametrize("length", [1, 5, 70])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", INITS)
def test_equals_the_dense_system_with_all_gradients(init, discretization, length):
    m, x = layer(init=init, discretization=discretization), inputs(length).requires_grad_()
    same_with_gradients(m, m(x), reference(m, x), x)


def test_initial_eigenvalues():
    n = torch.arange(N // 2, dtype=torch.float64)
    legs, _, b, _ = normal_plus_low_rank(N)
    wanted = {
        "lin": torch.complex(0 * n - 0.5, math.pi * n),
        "inv": torch.complex(0 * n - 0.5, N / math.pi * (N / (2 * n + 1) - 1)),
        "legs": legs,
        "real": torch.complex(-(n + 1), 0 * n),
    }
    for init in INITS:
        m = layer(init=init)
        torch.testing.assert_close(rates(m), wanted[init].expand(D, -1), rtol=1e-6, atol=1e-6)
        entering = b if init == "legs" else torch.ones_like(b)
        torch.testing.assert_close(torch.view_as_complex(m.b), entering.expand(D, -1), rtol=1e-6, atol=1e-6)


def test_inv_comes_close_to_the_eigenvalues_of_legs():
    """To the largest, of which it is the law (the paper's conjecture 5)."""
    inv, legs = (S4D(1, init=init).frequency.detach()[0].sort(descending=True).values for init in ("inv", "legs"))
    torch.testing.assert_close(inv[:3], legs[:3], rtol=0.08, atol=0)


def test_random_start():
    torch.manual_seed(0)
    m = S4D(2000, d_state=4, dt_min=0.01, dt_max=0.1)
    assert math.log(0.01) <= m.log_step.min() < math.log(0.011)
    assert math.log(0.09) < m.log_step.max() <= math.log(0.1)
    assert m.log_step.mean().item() == pytest.approx((math.log(0.01) + math.log(0.1)) / 2, abs=0.05)
    assert m.c.var().item() == pytest.approx(0.5, rel=0.05)
    assert m.skip.var().item() == pytest.approx(1.0, rel=0.1)


def test_the_kernel_of_lin_is_a_damped_fourier_series():
    m = layer(init="lin")
    impulse = torch.zeros(1, 30, D, dtype=torch.float64)
    impulse[:, 0] = 1
    kernel = state_space(m.system(), impulse)[0][0].T
    step, c = m.log_step.exp()[:, None], torch.view_as_complex(m.c)
    t = torch.arange(30) * step
    expected = 0
    for n in range(N // 2):
        # Held over a step, the wave e^((-1/2 + i pi n) t) is its average over the step times the step.
        rate = torch.complex(torch.tensor(-0.5), torch.tensor(math.pi * n)).to(c.dtype)
        wave = c[:, n, None] * ((step * rate).exp() - 1) / rate
        expected = expected + 2 * (-t / 2).exp() * (wave.real * (math.pi * n * t).cos() - wave.imag * (math.pi * n * t).sin())
    torch.testing.assert_close(kernel, expected, rtol=0, atol=1e-6)  # The eigenvalues are float32's.


def test_doubling_the_output_weights_doubles_the_output():
    m, x = layer(), inputs(40)
    before = state_space(m.system(), x)[0]
    with torch.no_grad():
        m.c *= 2
    torch.testing.assert_close(state_space(m.system(), x)[0], 2 * before, rtol=0, atol=1e-12)


def test_what_the_state_costs():
    m = S4D(16, d_state=64)
    assert m.state_bytes(10**6) == 16 * 64 * 4
    assert m.no_weight_decay == ("log_step", "log_decay", "frequency", "b")
    assert all(isinstance(getattr(m, name), torch.nn.Parameter) for name in m.no_weight_decay)


def test_an_initialisation_that_there_is_not():
    with pytest.raises(ValueError, match="'legs' or 'real', not 'fourier'"):
        diagonal_start("fourier", N)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_state": 7}, "even and at least 2, got 7"),
        ({"dt_min": 0.2}, "0 < dt_min <= dt_max, got 0.2 and 0.1"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        S4D(D, **settings)
