"""``quadrature_attention``: sums that are integrals."""

from __future__ import annotations

import itertools

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from gatework.core import PartError
from gatework.mixers.attention import Attention
from gatework.mixers.quadrature_attention import QuadratureAttention
from gatework.ops.quadrature import trapezoid


def layer(d_model=6, heads=2, seed=0):
    torch.manual_seed(seed)
    part = QuadratureAttention(d_model, heads).double()
    with torch.no_grad():
        for p in part.parameters():
            p.normal_(std=0.7)
    return part


def inputs(batch=2, length=5, d_model=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, d_model, dtype=torch.float64, generator=generator)
    return x, 0.1 + torch.rand(batch, length, dtype=torch.float64, generator=generator)


def reference(part, x, w, mask=None, segments=None):
    rows = []
    width = part.head_width
    for b in range(len(x)):
        for t in range(x.shape[1]):
            heads = []
            for h in range(part.heads):
                span = slice(h * width, (h + 1) * width)
                q, total, read = part.q_proj.weight[span] @ x[b, t], 0.0, 0.0
                for s in range(x.shape[1]):
                    if mask is not None and not mask[b, s] and s != t:
                        continue
                    if segments is not None and segments[b, s] != segments[b, t]:
                        continue
                    weight = w[b, s] * (q @ (part.k_proj.weight[span] @ x[b, s]) / width**0.5).exp()
                    total, read = total + weight, read + weight * (part.v_proj.weight[span] @ x[b, s])
                heads.append(read / total)
            rows.append(part.o_proj.weight @ torch.cat(heads) + part.o_proj.bias)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("limits", ["none", "mask", "segments", "both"])
def test_outputs_and_gradients_are_those_of_the_equation(limits):
    mask = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 0, 0]]).bool() if limits in ("mask", "both") else None
    segments = torch.tensor([[4, 4, 4, 2, 2], [1, 1, 1, 1, 3]]) if limits in ("segments", "both") else None
    part, results = layer(), []
    real = torch.ones(2, 5, dtype=torch.bool) if mask is None else mask
    def fast(x, w):
        return part(x, mask=mask, segments=segments, quadrature=w)

    for run in (fast, lambda x, w: reference(part, x, w, mask, segments)):
        x, w = (t.requires_grad_() for t in inputs())
        part.zero_grad()
        y = run(x, w)[real]
        y.sin().sum().backward()
        results.append([y, x.grad, w.grad, *(p.grad.clone() for p in part.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-11)


def test_equal_weights_are_standard_attention():
    part, (x, w) = layer(), inputs()
    plain = Attention(6, heads=2, rope=False, causal=False).double()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        getattr(plain, name).weight = getattr(part, name).weight
    torch.nn.init.zeros_(part.o_proj.bias)
    wanted = plain(x)
    assert_close(part(x), wanted, rtol=0, atol=1e-12)
    assert_close(part(x, quadrature=torch.full_like(w, 0.3)), wanted, rtol=0, atol=1e-12)
    assert_close(part(x, quadrature=1e-200 * w), part(x, quadrature=w), rtol=0, atol=1e-12)
    assert not torch.allclose(part(x, quadrature=w), wanted, atol=1e-3)


def test_a_point_split_in_two_halves_of_its_weight_changes_nothing():
    part, (x, w) = layer(), inputs()
    twice = torch.tensor([0, 1, 2, 2, 3, 4])
    halves = w[:, twice]
    halves[:, 2:4] /= 2
    assert_close(part(x[:, twice], quadrature=halves), part(x, quadrature=w)[:, twice], rtol=0, atol=1e-12)


def test_a_weight_of_0_hides_a_token():
    part, (x, w) = layer(), inputs()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = False
    hidden = part(x, quadrature=w.masked_fill(~mask, 0))
    assert_close(hidden[mask], part(x, mask=mask, quadrature=w)[mask], rtol=0, atol=1e-12)


def test_kept_tokens_have_the_outputs_of_all():
    part, (x, w) = layer(), inputs()
    keep = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]).bool()
    segments = torch.tensor([[4, 4, 4, 2, 2], [1, 1, 1, 1, 3]])
    y = part(x, mask=mask, segments=segments, keep=keep, quadrature=w)
    wanted = part(x, mask=mask, segments=segments, quadrature=w)
    assert_close(y, wanted.masked_fill(~keep[..., None], 0), rtol=0, atol=1e-12)


def features(points):
    """A smooth function of six values."""
    return torch.stack([(k * points + phase).sin() for k, phase in ((1, 0), (2, 1), (3, 2), (4, 0), (5, 1), (6, 3))], -1)


def on(points, part, weighted):
    """The outputs at the first and the last point, 0 and 1."""
    return part(features(points)[None], quadrature=trapezoid(points)[None] if weighted else None)[0, [0, -1]]


def grids(count):
    """Random points, and points that crowd at one end; both with 0 and 1."""
    inside = torch.rand(count - 2, dtype=torch.float64, generator=torch.Generator().manual_seed(count)).sort().values
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([ends[:1], inside, ends[1:]]), torch.linspace(0, 1, count, dtype=torch.float64) ** 2


@torch.no_grad()
def test_outputs_do_not_depend_on_the_grid_and_those_of_plain_attention_do():
    part = layer(seed=2)
    exact = on(torch.linspace(0, 1, 4097, dtype=torch.float64), part, True)
    errors = {}
    for count in (32, 64, 128):
        for kind, points in zip(("random", "crowded"), grids(count), strict=True):
            for weighted in (True, False):
                errors[kind, weighted, count] = (on(points, part, weighted) - exact).abs().max().item()
    for count in (32, 64, 128):
        assert errors["crowded", False, count] > 0.5 > 10 * errors["crowded", True, count]
        assert errors["random", True, count] < errors["random", False, count] / 3
    for count in (32, 64):
        assert errors["crowded", True, count] / errors["crowded", True, 2 * count] > 3.5
        assert errors["crowded", False, count] / errors["crowded", False, 2 * count] < 1.2
    even = [(on(torch.linspace(0, 1, n, dtype=torch.float64), part, True) - exact).abs().max().item() for n in (33, 65, 129)]
    for coarse, fine in itertools.pairwise(even):
        assert coarse / fine == pytest.approx(4, rel=0.1)  # The trapezoid rule's second order.


def test_empty_inputs():
    part = layer()
    for shape in ((0, 4), (2, 0)):
        x, w = torch.zeros(*shape, 6).double(), torch.ones(shape).double()
        for settings in ({}, {"quadrature": w}, {"keep": w.bool(), "quadrature": w}, {"mask": w.bool()}):
            assert part(x, **settings).shape == x.shape


def test_wrong_weights_and_widths_are_refused():
    with pytest.raises(ValueError, match="d_model 6 is not divisible by heads 4"):
        QuadratureAttention(6, 4)
    part, (x, w) = layer(), inputs()
    with pytest.raises(PartError, match="it has no decoding state"):
        part.init_state(2)
    with pytest.raises(PartError, match="it has no decoding state"):
        part.state_bytes(2)
    jaxtyping.config.update("jaxtyping_disable", True)  # The annotation check of the test run would come first.
    try:
        with pytest.raises(PartError, match=r"quadrature has one weight per token, shape \(2, 5\), not \(2, 4\)"):
            part(x, quadrature=w[:, 1:])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
