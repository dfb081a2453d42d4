"""``mgno`` against loops over places and taps."""

from __future__ import annotations

import itertools

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from gatework.core import PartError, capability
from gatework.core.cost import count_flops
from gatework.mixers.mgno import MgNO

PADDINGS = ("dirichlet", "periodic", "neumann")
COARSE = ("restricted", "residual", "correction")


def layer(seed=0, **settings):
    torch.manual_seed(seed)
    return MgNO(**({"d_model": 2} | settings)).double()


def place(index, side, padding):
    """The place whose value stands at ``index``, up to one place outside; None is 0."""
    if 0 <= index < side:
        return index
    if padding == "periodic":
        return index % side
    if padding == "neumann":
        return min(1, side - 1) if index < 0 else max(side - 2, 0)
    return None


def convolved(weight, u, padding, stride=1):
    """A convolution of (C, *sides), place by place."""
    sides = u.shape[1:]
    out = [-(-side // stride) for side in sides]
    y = {}
    for at in itertools.product(*map(range, out)):
        total = torch.zeros(len(weight), dtype=u.dtype)
        for tap in itertools.product(range(3), repeat=len(sides)):
            seen = [place(stride * a + t - 1, side, padding) for a, t, side in zip(at, tap, sides, strict=True)]
            if None not in seen:
                total = total + weight[(slice(None), slice(None), *tap)] @ u[(slice(None), *seen)]
        y[at] = total
    return torch.stack([y[at] for at in itertools.product(*map(range, out))], 1).view(-1, *out)


def prolonged(weight, u, padding, sides):
    """The transposed convolution: coarse place i adds to the fine places 2 i - 1 .. 2 i + 2."""
    coarse = u.shape[1:]
    y = {at: torch.zeros(weight.shape[1], dtype=u.dtype) for at in itertools.product(*map(range, sides))}
    for at in itertools.product(*(range(-1, side + 1) for side in coarse)):
        source = [place(a, side, padding) for a, side in zip(at, coarse, strict=True)]
        if None in source:
            continue
        for tap in itertools.product(range(4), repeat=len(coarse)):
            fine = tuple(2 * a - 1 + t for a, t in zip(at, tap, strict=True))
            if fine in y:
                y[fine] = y[fine] + weight[(slice(None), slice(None), *tap)].t() @ u[(slice(None), *source)]
    return torch.stack([y[at] for at in itertools.product(*map(range, sides))], 1).view(-1, *sides)


def reference(part, f):
    """The V-cycle of one grid function (C, *sides)."""

    def smooth(pairs, u, f):
        for pair in pairs:
            rest = f if u is None else f - convolved(pair["a"].weight, u, part.padding)
            step = convolved(pair["s"].weight, rest, part.padding)
            u = step if u is None else u + step
        return u

    u, kept = None, []
    for level in range(part.levels):
        u = smooth(part.down[level], u, f)
        if level + 1 < part.levels:
            kept.append((u, f))
            rest = f if part.coarse == "restricted" else f - convolved(part.a[level].weight, u, part.padding)
            f = convolved(part.r[level].weight, rest, part.padding, 2)
            u = None if part.coarse == "correction" else convolved(part.pi[level].weight, u, part.padding, 2)
    for level in reversed(range(part.levels - 1)):
        fine, f = kept[level]
        u = smooth(part.up[level], fine + prolonged(part.p[level].weight, u, part.padding, fine.shape[1:]), f)
    return u


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("coarse", COARSE)
@pytest.mark.parametrize(
    ("length", "levels", "pre", "post"), [(8, 3, 1, 1), (7, 3, 2, 0), (5, 2, 1, 2), (1, 3, 1, 1), (2, 3, 1, 1)]
)
def test_outputs_and_gradients_on_a_line(padding, coarse, length, levels, pre, post):
    part = layer(levels=levels, pre=pre, post=post, padding=padding, coarse=coarse)
    results = []
    for run in (part, lambda x: torch.stack([reference(part, row.t()).t() for row in x])):
        x = torch.randn(2, length, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        part.zero_grad()
        y = run(x)
        y.sin().sum().backward()
        results.append([y, x.grad, *(p.grad.clone() for p in part.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("coarse", COARSE)
def test_outputs_on_a_grid(padding, coarse):
    part = layer(grid=(4, 5), levels=2, padding=padding, coarse=coarse)
    x = torch.randn(1, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = reference(part, x[0].t().reshape(2, 4, 5)).flatten(1).t()
    assert_close(part(x)[0], wanted, rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDINGS)
def test_it_is_linear(padding):
    part = layer(padding=padding)
    x, z = torch.randn(2, 3, 16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(part(2 * x - 3 * z), 2 * part(x) - 3 * part(z), rtol=0, atol=1e-11)
    assert not part(torch.zeros_like(x)).any()


@torch.no_grad()
def test_a_periodic_layer_commutes_with_shifts_of_its_coarsest_grid():
    part = layer(padding="periodic", levels=3)
    x = torch.randn(1, 16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = part(x)
    for shift in (4, 8):
        assert_close(part(x.roll(shift, 1)), y.roll(shift, 1), rtol=0, atol=1e-12)
    assert not torch.allclose(part(x.roll(1, 1)), y.roll(1, 1), atol=1e-3)
    part = layer(grid=(8, 8), padding="periodic", levels=2)
    x = torch.randn(1, 64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = part(x).view(8, 8, 2)
    shifted = part(x.view(1, 8, 8, 2).roll((2, 4), (1, 2)).flatten(1, 2)).view(8, 8, 2)
    assert_close(shifted, y.roll((2, 4), (0, 1)), rtol=0, atol=1e-12)


def poisson(levels, pre):
    """The classical cycle for -u'' = f on a circle: damped Jacobi, full weighting, linear interpolation."""
    part = layer(d_model=1, levels=levels, pre=pre, post=pre, padding="periodic", coarse="correction")
    laplace = torch.tensor([-1.0, 2.0, -1.0]).double()
    with torch.no_grad():
        for level in range(levels):
            for pair in (*part.down[level], *(part.up[level] if level < levels - 1 else ())):
                pair["s"].weight.copy_(torch.tensor([0.0, 4.0**level / 3, 0.0]))
                if "a" in pair:
                    pair["a"].weight.copy_(laplace / 4**level)
            if level < levels - 1:
                part.a[level].weight.copy_(laplace / 4**level)
                part.r[level].weight.copy_(torch.tensor([0.25, 0.5, 0.25]))
                part.p[level].weight.copy_(torch.tensor([0.5, 1.0, 0.5, 0.0]))
    return part


@torch.no_grad()
def test_with_the_classical_weights_it_is_the_classical_cycle():
    f = torch.randn(1, 64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f -= f.mean()

    def left(u):
        return f - (2 * u - u.roll(1, 1) - u.roll(-1, 1))

    rates = {}
    for levels in (1, 5):
        part, u = poisson(levels, 2), torch.zeros_like(f)
        for _ in range(6):
            u = u + part(left(u))
        rates[levels] = (left(u).norm() / f.norm()).item() ** (1 / 6)
    assert rates[5] < 0.2  # Whatever the grid; smoothing alone hardly moves the long waves.
    assert rates[1] > 0.6


def test_parameters_do_not_depend_on_the_grid_and_cost_is_linear_in_it():
    counts = {sum(p.numel() for p in layer(grid=grid).parameters()) for grid in ((4, 4), (16, 8))}
    assert len(counts) == 1
    part, totals = layer(), []
    for length in (64, 128):
        with count_flops() as flops, torch.no_grad():
            part(torch.zeros(1, length, 2).double())
        totals.append(flops.total)
    assert totals[1] / totals[0] == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_of_a_line_takes_no_place(padding):
    part = layer(padding=padding)
    x = torch.randn(4, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor(
        [[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1, 0, 0, 0], [0] * 9]
    ).bool()
    y = part(x, mask=mask)
    for row, real, said in zip(x, mask, y, strict=True):
        assert_close(said[real], part(row[real][None])[0], rtol=0, atol=1e-12)


def test_padding_of_a_grid_is_0():
    part = layer(grid=(3, 3))
    x = torch.randn(2, 9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) < 0.6
    assert torch.equal(part(x, mask=mask), part(x * mask[..., None]))
    assert not capability(part, "any_length")


def test_wrong_settings_and_calls_are_refused():
    for settings, message in (
        ({"levels": 0}, "d_model, levels and pre must be at least 1 and post at least 0, got 2, 0, 1 and 1"),
        ({"post": -1}, "got 2, 3, 1 and -1"),
        ({"grid": (3, 0)}, r"grid is \(rows, columns\), both at least 1, not \(3, 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(**settings)
    jaxtyping.config.update("jaxtyping_disable", True)  # The annotation check of the test run would come first.
    try:
        with pytest.raises(ValueError, match="no padding 'none'"):
            layer(padding="none")
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    x = torch.zeros(1, 10, 2).double()
    with pytest.raises(PartError, match="a grid of 3 x 3 = 9 tokens, not 10"):
        layer(grid=(3, 3))(x)
    with pytest.raises(PartError, match="takes no segments"):
        layer()(x, segments=torch.zeros(1, 10, dtype=torch.long))
    for refused in (lambda: layer().init_state(1), lambda: layer().state_bytes(3)):
        with pytest.raises(PartError, match="it has no decoding state"):
            refused()
