"""xATLU, xGELU and xSiLU: one shared implementation, three gates."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from gatework.activations import xATLU, xGELU, xSiLU
from gatework.core import build

GATES = {
    xATLU: lambda v: math.atan2(1, -v) / math.pi,
    xGELU: lambda v: math.erfc(-v / math.sqrt(2)) / 2,
    xSiLU: lambda v: 1 / (1 + math.exp(-v)) if v > -700 else 0.0,
}
SLOPES = {
    xATLU: lambda v: 1 / (math.pi * (1 + v * v)),
    xGELU: lambda v: math.exp(-v * v / 2) / math.sqrt(2 * math.pi),
    xSiLU: lambda v: 1 / (2 + math.exp(v) + math.exp(-v)),
}


def table(f, x):
    return torch.tensor([f(v) for v in x.flatten().tolist()], dtype=torch.float64).view(x.shape)


def make(cls, alpha=0.0, dtype=torch.float64):
    m = cls().to(dtype)
    m.alpha.data.fill_(alpha)
    return m


@pytest.fixture(params=[xATLU, xGELU, xSiLU], ids=lambda c: c.__name__)
def cls(request):
    return request.param


@pytest.fixture
def x():
    return torch.linspace(-12, 12, 241, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [0.0, 0.37, -0.2])
def test_value_and_gradients_equal_the_formula(cls, x, alpha):
    m = make(cls, alpha)
    g, slope = table(GATES[cls], x), table(SLOPES[cls], x)
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = x.clone().requires_grad_()
    y = m(v)
    torch.testing.assert_close(y, x * ((1 + 2 * alpha) * g - alpha), rtol=1e-13, atol=1e-15)
    (y * weight).sum().backward()
    torch.testing.assert_close(v.grad, weight * ((1 + 2 * alpha) * (g + x * slope) - alpha), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(m.alpha.grad, (weight * x * (2 * g - 1)).sum(), rtol=1e-12, atol=0)
    m.alpha.grad = v.grad = None
    gate = m.gate(v)
    torch.testing.assert_close(gate, (1 + 2 * alpha) * g - alpha, rtol=1e-13, atol=1e-15)
    (gate * weight).sum().backward()
    torch.testing.assert_close(v.grad, weight * (1 + 2 * alpha) * slope, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(m.alpha.grad, (weight * (2 * g - 1)).sum(), rtol=1e-12, atol=0)


def test_alpha_0_is_the_plain_activation(x):
    torch.testing.assert_close(make(xGELU)(x), F.gelu(x), rtol=1e-11, atol=1e-15)
    torch.testing.assert_close(make(xSiLU)(x), F.silu(x), rtol=1e-14, atol=0)
    torch.testing.assert_close(make(xATLU)(x), x * (torch.arctan(x) + math.pi / 2) / math.pi, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.3, 2.0])
def test_point_symmetry(cls, x, alpha):
    m = make(cls, alpha)
    torch.testing.assert_close(m.gate(x) + m.gate(-x), torch.ones_like(x), rtol=0, atol=1e-14)
    torch.testing.assert_close(m(x) - m(-x), x, rtol=0, atol=1e-13)


def test_range_is_expanded_on_both_sides(cls):
    ends = make(cls, 0.25).gate(torch.tensor([-1e9, 1e9], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([-0.25, 1.25], dtype=torch.float64), rtol=0, atol=1e-8)


def test_atlu_slope_rises_from_0_to_1_and_value_falls_to_minus_1_over_pi():
    x = torch.cat([-torch.logspace(4, -3, 300), torch.logspace(-3, 4, 300)]).double().requires_grad_()
    (slope,) = torch.autograd.grad(make(xATLU)(x).sum(), x)
    assert (slope.diff() > 0).all()
    assert 0 < slope[0] < 1e-10
    assert 1 - 1e-10 < slope[-1] < 1
    for dtype in (torch.float64, torch.float32):
        y = make(xATLU, dtype=dtype)(torch.tensor(-1e4, dtype=dtype)).item()
        assert abs(y * math.pi + 1) < 1e-6  # Relative; (arctan(x) + pi/2) / pi in float32 is wrong by 1e-3 here.


def test_gelu_tail_does_not_cancel():
    y = make(xGELU, dtype=torch.float32)(torch.tensor(-6.0)).double()
    assert abs(y / (-6 * GATES[xGELU](-6.0)) - 1) < 1e-5


@pytest.mark.parametrize("method", ["forward", "gate"])
def test_gradcheck_twice(cls, method):
    m = make(cls, 0.3)
    v = torch.tensor([[-30.0, -2.0, -0.4, 0.0], [0.3, 1.0, 3.0, 30.0]], dtype=torch.float64, requires_grad=True)

    def f(x, alpha):
        return getattr(m, method)(x)

    assert torch.autograd.gradcheck(f, (v, m.alpha))
    assert torch.autograd.gradgradcheck(f, (v, m.alpha))


def test_one_scalar_per_instance_and_no_weight_decay(cls):
    m = cls()
    assert {name: p.shape for name, p in m.named_parameters()} == {"alpha": torch.Size([])}
    assert m.alpha.item() == 0
    assert m.no_weight_decay == ("alpha",)
    plain = build("mlp", d_model=4)
    gated = build("mlp", d_model=4, activation=cls)
    assert sum(p.numel() for p in gated.parameters()) == sum(p.numel() for p in plain.parameters()) + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_input_is_computed_in_float32_with_a_float32_alpha(cls, dtype):
    m = make(cls, 0.3, torch.float32)
    x = torch.linspace(-5, 5, 101).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = m(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert (m.alpha.dtype, m.alpha.grad.dtype) == (torch.float32, torch.float32)
    wide = copy.deepcopy(m)
    wide.alpha.grad = None
    v = x.detach().float().requires_grad_()
    out = wide(v)
    assert torch.equal(y, out.to(dtype))
    out.sum().backward()
    assert torch.equal(x.grad, v.grad.to(dtype))
    assert torch.equal(m.alpha.grad, wide.alpha.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extreme_inputs_stay_finite(cls, dtype):
    top = 3e4 if dtype == torch.float16 else 1e30
    m = make(cls, 0.1, torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.tensor([-top, -1e3, -100, 0, 100, 1e3, top]).to(dtype).requires_grad_()
    y = m(x)
    (dy,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert dy.isfinite().all()


def test_saves_x_and_alpha_only(cls):
    kept, m = [], cls()
    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        m(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr(), m.alpha.data_ptr()]


def test_frozen_alpha_or_input(cls, x):
    m = make(cls, 0.2)
    m(x).sum().backward()
    assert m.alpha.grad is not None
    m.requires_grad_(False)
    v = x.clone().requires_grad_()
    m(v).sum().backward()
    assert v.grad.isfinite().all()


@pytest.mark.parametrize("order", [1, 2])
def test_as_the_gate_of_a_glu(cls, order):
    glu = build(f"glu(d_ff=6, order={order})", "feedforward", d_model=4, activation=cls).double()
    glu.activation.alpha.data.fill_(0.4)
    x = torch.randn(5, 4, dtype=torch.float64)
    v = x @ glu.gate.weight.T
    gate = 1.8 * table(GATES[cls], v) - 0.4
    want = ((x @ glu.up.weight.T) * (gate if order == 1 else v * gate)) @ glu.down.weight.T
    torch.testing.assert_close(glu(x), want, rtol=1e-10, atol=1e-12)


@pytest.mark.compile
def test_compiled_equals_eager(cls):
    m = make(cls, 0.3, torch.float32)
    x = torch.randn(16, 32) * 3
    results = []
    for f in (m, torch.compile(m, fullgraph=True)):
        v = x.clone().requires_grad_()
        m.alpha.grad = None
        y = f(v)
        y.square().mean().backward()
        results.append((y.detach(), v.grad, m.alpha.grad.clone()))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
