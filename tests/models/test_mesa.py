"""One layer of linear self-attention, the step of gradient descent that it takes, and the rate that it learns."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.core import PartError
from gatework.models.mesa import MesaOptimizer, one_gradient_step, optimal_rate


def rows(start, count=6, length=12, dimensions=3, scale=1.0, seed=0):
    task = make_task("in_context_ar", start=start, length=length, dimensions=dimensions, scale=scale, pairs=False)
    x, y = task.rows(count, torch.Generator().manual_seed(seed))
    return x.double(), y.double()


def layer(a, b, width=6, complex=True):
    model = MesaOptimizer(width, complex=complex).double()
    torch.nn.init.zeros_(model.attention.kq)
    torch.nn.init.zeros_(model.attention.pv)
    d = width // 2 if complex else width
    for j in range(d):
        place = (0,) if complex else ()
        with torch.no_grad():
            model.attention.kq[(2 * d + j, d + j, *place)] = a
            model.attention.pv[(j, d + j, *place)] = b
    return model


@pytest.mark.parametrize("complex", [True, False])
def test_with_the_papers_blocks_it_takes_one_step_of_gradient_descent(complex):
    """The step by autograd, on 1/2 sum |x_{i+1} - W x_i|^2 at W = 0."""
    x, _ = rows("gaussian")
    model = layer(0.7, 0.4, complex=complex)
    y = model(x)
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if complex else x
    for b in range(len(x)):
        for t in range(2, 12):
            w = torch.zeros(z.shape[-1], z.shape[-1], dtype=z.dtype, requires_grad=True)
            loss = sum(0.5 * (z[b, i] - w @ z[b, i - 1]).abs().square().sum() for i in range(1, t))
            (gradient,) = torch.autograd.grad(loss, w)
            said = -0.7 * 0.4 / (t - 1) * gradient @ z[b, t - 1]
            expected = torch.view_as_real(said).flatten() if complex else said
            torch.testing.assert_close(y[b, t - 1], expected, rtol=0, atol=1e-12)
    assert not y[:, 0].any()
    torch.testing.assert_close(y, one_gradient_step(x, 0.28, complex=complex), rtol=0, atol=1e-12)
    assert model.rate() == pytest.approx(0.28)
    fresh = MesaOptimizer(6, a=0.5, b=0.25, complex=complex)
    torch.testing.assert_close(dict(layer(0.5, 0.25, complex=complex).float().state_dict()), dict(fresh.state_dict()))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_sparse_start_is_predicted_exactly_at_the_optimal_rate(scale):
    x, y = rows("sparse", scale=scale)
    rate = optimal_rate("sparse", 3, 12, scale)
    assert rate == pytest.approx(scale**-2)
    torch.testing.assert_close(layer(rate, 1.0)(x)[:, 1:], y[:, 1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("start", "scale"), [("gaussian", 1.0), ("gaussian", 0.5), ("sparse", 2.0), ("sign", 1.0), ("sign", 0.7)])
def test_the_formula_minimises_the_population_loss(start, scale):
    """The loss is quadratic in the rate: its minimum over 20,000 sequences is <u, x> / <u, u>, u the step at rate 1."""
    x, y = rows(start, count=20_000, scale=scale)
    u = one_gradient_step(x, 1.0)[:, 1:]
    best = (u * y[:, 1:]).sum() / u.square().sum()
    assert optimal_rate(start, 3, 12, scale) == pytest.approx(best.item(), rel=0.02)


def test_long_gaussian_sequences_stay_biased():
    """y_t,j tends to ab |x_1j|^2 x_{t+1,j}."""
    x, y = rows("gaussian", length=4000, dimensions=2)
    said = one_gradient_step(x, 0.3)[:, -1].unflatten(-1, (-1, 2))
    first = x[:, 0].unflatten(-1, (-1, 2)).square().sum(-1, keepdim=True)
    torch.testing.assert_close(said, 0.3 * first * y[:, -1].unflatten(-1, (-1, 2)), rtol=0, atol=0.02)


def test_gradient_descent_keeps_the_form_and_finds_the_rate():
    x, y = rows("sparse", count=128, length=10, dimensions=2)
    model = MesaOptimizer(4, a=0.3, b=0.3).double()
    before = {name: p.detach() != 0 for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        (0.5 * (model(x)[:, 1:] - y[:, 1:]).square().sum((1, 2)).mean()).backward()
        optimizer.step()
    assert model.rate() == pytest.approx(1, abs=0.01)
    assert optimal_rate("sparse", 2, 10) == 1
    inside = max(p.detach()[before[name]].abs().max().item() for name, p in model.named_parameters())
    outside = max(p.detach()[~before[name]].abs().max().item() for name, p in model.named_parameters())
    assert outside < 0.1 * inside


def test_wrong_use_meets_one_sentence():
    with pytest.raises(PartError, match="width must be at least 1, and even where its channels are pairs, got 5"):
        MesaOptimizer(5)
    with pytest.raises(PartError, match="this model was built for vectors of width 6, not 4"):
        MesaOptimizer(6)(torch.zeros(1, 2, 4))
    with pytest.raises(PartError, match="length must be at least 3 and dimensions at least 1, got 2 and 5"):
        optimal_rate("gaussian", 5, 2)
    with pytest.raises(PartError, match="the laws of the start are gaussian, sparse, sign, not 'uniform'"):
        optimal_rate("uniform", 5, 5)
