import math

import pytest
import torch
from torch.nn import functional as F

from gatework.activations import GoLU
from gatework.core import build


def reference(x):
    """x exp(-exp(-x)) and its derivative, number by number in Python floats."""
    def value(v):
        return 0.0 if v < -20 else v * math.exp(-math.exp(-v))

    def derivative(v):
        return 0.0 if v < -20 else math.exp(-math.exp(-v)) + v * math.exp(-v - math.exp(-v))

    flat = x.flatten().tolist()
    return tuple(torch.tensor([f(v) for v in flat], dtype=torch.float64).view(x.shape) for f in (value, derivative))


def grad_of(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    y.sum().backward()
    return y.detach(), x.grad


def test_value_and_derivative_equal_the_formula():
    x = torch.linspace(-9, 40, 1001, dtype=torch.float64)
    value, derivative = reference(x)
    y, dy = grad_of(GoLU(), x)
    torch.testing.assert_close(y, value, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(dy, derivative, rtol=1e-12, atol=1e-15)


def test_named_points():
    x = torch.tensor([0.0, -0.5671432904097838], dtype=torch.float64)
    y, dy = grad_of(GoLU(), x)
    assert y[0] == 0
    assert abs(dy[0].item() - 1 / math.e) < 1e-15
    assert abs(y[1].item() + 0.0972601312276394) < 1e-15  # The minimum, at -W(1): -W(1) exp(-1 / W(1)).
    assert abs(dy[1].item()) < 1e-15


def test_the_minimum_is_the_only_one():
    _, dy = grad_of(GoLU(), torch.linspace(-6, 30, 4001, dtype=torch.float64))
    assert (dy.sign().diff() != 0).sum() == 1


def test_gate_is_asymmetric_and_forward_is_x_times_gate():
    m, x = GoLU(), torch.linspace(-5, 5, 100, dtype=torch.float64)
    assert (m.gate(x) + m.gate(-x) - 1).abs().max() > 0.1
    assert torch.equal(m(x), x * m.gate(x))


@pytest.mark.parametrize("method", ["forward", "gate"])
def test_gradcheck_twice(method):
    f = getattr(GoLU(), method)
    x = torch.tensor([-300.0, -8.5, -7.5, -3.0, -0.5, 0.0, 0.7, 4.0, 30.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_nan_anywhere(dtype):
    top = 6e4 if dtype == torch.float16 else 1e30
    x = torch.tensor([-top, -1e3, -100, -89, -20, -11, -8, -1, 0, 1, 10, 1e3, top]).to(dtype).requires_grad_()
    y = GoLU()(x)
    assert y.dtype == dtype
    (dy,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (ddy,) = torch.autograd.grad(dy.sum(), x)
    for value in (y, dy, ddy):
        assert value.isfinite().all()
    assert dy[0] == 0
    assert dy[-1] == 1


def test_differentiating_the_composition_is_what_fails():
    x = torch.tensor([-100.0], requires_grad=True)
    (x * torch.exp(-torch.exp(-x))).backward()
    assert x.grad.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = torch.linspace(-6, 6, 301).to(dtype)
    y, dy = grad_of(GoLU(), x)
    wide, dwide = grad_of(GoLU(), x.float())
    assert torch.equal(y, wide.to(dtype))
    assert torch.equal(dy, dwide.to(dtype))


def test_saves_x_only():
    kept = []
    x = torch.randn(64, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        GoLU()(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_variance_on_gaussian_inputs_is_lowest():
    x = torch.linspace(-10, 10, 20_001, dtype=torch.float64)  # The trapezoid rule: exact to the last digit for a Gaussian.
    density = torch.exp(-x.square() / 2)
    density /= density.sum()

    def variance(f):
        return round(((density * f(x).square()).sum() - (density * f(x)).sum().square()).item(), 3)

    assert (variance(GoLU()), variance(F.silu), variance(F.gelu)) == (0.253, 0.313, 0.346)


def test_transforms_of_torch_func():
    x = torch.randn(6, 5, dtype=torch.float64)
    m = GoLU()
    per_row = torch.func.vmap(torch.func.grad(lambda row: m(row).sum()))(x)
    torch.testing.assert_close(per_row, grad_of(m, x)[1])


def test_expanded_incoming_gradient_and_empty_input():
    x = torch.randn(3, 4, requires_grad=True)
    (dy,) = torch.autograd.grad(GoLU()(x), x, torch.ones(1, 1).expand(3, 4))
    torch.testing.assert_close(dy, grad_of(GoLU(), x.detach())[1])
    assert GoLU()(torch.empty(0, 3)).shape == (0, 3)


def test_order_1_glu_takes_the_gate():
    glu = build("glu(d_ff=6, activation=golu, order=1)", "feedforward", d_model=4).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    want = (torch.exp(-torch.exp(-x @ glu.gate.weight.T)) * (x @ glu.up.weight.T)) @ glu.down.weight.T
    torch.testing.assert_close(glu(x), want)


@pytest.mark.compile
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager(dtype):
    m, x = GoLU(), (torch.randn(16, 32) * 4).to(dtype)
    compiled = torch.compile(m, fullgraph=True)
    for got, want in zip(grad_of(compiled, x), grad_of(m, x), strict=True):
        torch.testing.assert_close(got, want)
