"""Ternary weights against the equations, element by element, and what follows from them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gatework import weights
from gatework.weights import Ternary


def half(x: float) -> float:
    return float(torch.tensor(min(x, 65504.0), dtype=torch.float64).half())


def reference(weight: torch.Tensor, per: str) -> torch.Tensor:
    """s clip(round(W / s), -1, 1) over one matrix, in plain numbers; s in float16, as it is stored."""
    rows = weight.tolist()
    groups = [[abs(x) for row in rows for x in row]] * len(rows) if per == "tensor" else [[abs(x) for x in row] for row in rows]
    out = []
    for row, group in zip(rows, groups, strict=True):
        s = sum(group) / len(group)
        out.append([half(s) * max(-1, min(1, round(x / s))) if s else 0.0 for x in row])
    return torch.tensor(out, dtype=weight.dtype)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("shape", [(6, 10), (1, 7), (9, 1), (4, 33)])
def test_values_equal_the_equations(per, shape):
    weight = torch.randn(shape, dtype=torch.float64) * torch.rand(shape[0], 1, dtype=torch.float64)
    if shape[1] == 1 and per == "row":
        weight[0] = 0  # A row of zeros stays one.
    found = Ternary(per)(weight)
    torch.testing.assert_close(found, reference(weight, per), rtol=1e-15, atol=0)
    groups = [found.flatten()] if per == "tensor" else list(found)
    for group in groups:
        size = group.abs()
        assert len(group.unique()) <= 3
        assert set(size.unique().tolist()) <= {0.0, size.max().item()}


def test_a_convolution_is_one_matrix_and_a_stack_has_one_scale_for_each():
    torch.manual_seed(0)
    conv, stack = nn.Conv2d(3, 4, 2).double(), nn.Module()
    stack.w = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64) * torch.tensor([1.0, 10.0, 100.0])[:, None, None])
    kernel, experts = conv.weight.detach().clone(), stack.w.detach().clone()
    for per in ("tensor", "row"):
        for module, name in ((conv, "weight"), (stack, "w")):
            other = copy.deepcopy(module)
            weights.apply(other, name, Ternary(per))
            found = getattr(other, name)
            if name == "weight":
                wanted = reference(kernel.flatten(1), per).view_as(kernel)
            else:
                wanted = torch.stack([reference(matrix, per) for matrix in experts])
            torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0)
    assert not torch.equal(Ternary()(kernel.flatten(1)), Ternary("row")(kernel.flatten(1)))


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_the_gradient_passes_unchanged_also_where_the_clip_cuts(per):
    layer = nn.Linear(8, 5).double()
    with torch.no_grad():
        layer.weight[0, 0] = 40.0  # Far beyond the clip.
    x, upstream = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    wanted = upstream.t() @ x
    weights.apply(layer, "weight", Ternary(per))
    layer(x).backward(upstream)
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, wanted, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_idempotent(per, dtype):
    """What is ternary stays what it is, so a folded model can be made ternary and packed again."""
    once = Ternary(per)(torch.randn(12, 30, dtype=dtype))
    assert (once == 0).any()
    assert torch.equal(Ternary(per)(once), once)
    assert torch.equal(Ternary("row")(Ternary("tensor")(once)), Ternary("tensor")(once))


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_a_factor_leaves_the_trits(per):
    weight = torch.randn(20, 30, dtype=torch.float64)
    part = Ternary(per)
    trits, scale = part.quantize(weight)
    for factor in (0.37, 3.0, 1000.0):
        scaled, other = part.quantize(factor * weight)
        assert torch.equal(scaled, trits)
        torch.testing.assert_close(other, factor * scale, rtol=2**-10, atol=0)
    assert torch.equal(part.quantize(-weight)[0], -trits)


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_packed_is_what_was_trained_and_has_1_6_bits_and_a_scale(per):
    layer = nn.Linear(40, 24, bias=False)
    weights.apply(layer, "weight", Ternary(per))
    used, x = layer.weight.detach().clone(), torch.randn(5, 40)
    y = layer(x)
    weights.pack(layer)
    assert torch.equal(layer.weight, used)
    assert torch.equal(layer(x), y)
    group = 40 * 24 if per == "tensor" else 40
    assert weights.stored_bytes(layer) * 8 == 40 * 24 * (1.6 + 16 / group)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)  # The packed numbers stay what they are.
        assert layer.weight.dtype == dtype
        assert torch.equal(layer.weight, used.to(dtype))
        assert weights.stored_bytes(layer) * 8 == 40 * 24 * (1.6 + 16 / group)


def test_a_large_layer_unpacks_in_blocks(monkeypatch):
    """As many rows at a time as the limit allows; the same product up to its rounding, and less memory."""
    from gatework.core.cost import peak_bytes
    from gatework.weights import base

    layer = nn.Linear(64, 500).double()
    weights.apply(layer, "weight", Ternary("row"))
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    y = layer(x)
    weights.pack(layer)
    with torch.no_grad():
        with peak_bytes(layer, x) as whole:
            assert torch.equal(layer(x), y)
        monkeypatch.setattr(base, "BLOCK", 64 * 32)
        with peak_bytes(layer, x) as blocks:
            torch.testing.assert_close(layer(x), y, rtol=1e-13, atol=1e-13)
    assert blocks.total < whole.total / 4, (blocks.total, whole.total)
    monkeypatch.setattr(base, "BLOCK", 1)
    torch.testing.assert_close(layer(x), y, rtol=1e-13, atol=1e-13)


def test_an_embedding_unpacks_the_rows_it_looks_up():
    from gatework.core.cost import peak_bytes

    table = nn.Embedding(5000, 20, padding_idx=1)
    weights.apply(table, "*", "ternary(per='row')")
    tokens = torch.tensor([[3, 1, 4999], [3, 0, 7]])
    y = table(tokens)
    weights.pack(table)
    with torch.no_grad(), peak_bytes(table) as used:
        assert torch.equal(table(tokens), y)
    assert used.total < 40_000  # 400,000 for the whole.
    assert table(tokens[:0]).shape == (0, 3, 20)
    bounded = nn.Embedding(6, 4, max_norm=1.0)
    weights.apply(bounded, "*", Ternary())
    y = bounded(torch.tensor([2, 3]))
    weights.pack(bounded)
    assert torch.equal(bounded(torch.tensor([2, 3])), y)


def test_scales_at_the_ends_of_float16():
    for size, wanted in ((1e6, 65504.0), (3e-8, 2.0**-24), (1e-12, 0.0), (0.0, 0.0)):
        weight = torch.tensor([[size, -size, size, size]])
        found = Ternary()(weight)
        assert torch.equal(found, weight.sign() * wanted), (size, found)
        layer = nn.Linear(4, 1, bias=False)
        layer.weight = nn.Parameter(weight)
        weights.apply(layer, "weight", Ternary())
        weights.pack(layer)
        assert torch.equal(layer.weight, found)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")  # torch's own, of nn.Linear.
def test_empty_weights(shape):
    layer = nn.Linear(shape[1], shape[0], bias=False)
    x = torch.randn(2, shape[1])
    for per in ("tensor", "row"):
        other = copy.deepcopy(layer)
        weights.apply(other, "*", Ternary(per))
        assert other(x).shape == (2, shape[0])
        weights.pack(other)
        assert other(x).shape == (2, shape[0])


def test_bfloat16_computes_in_float32():
    weight = torch.randn(64, 1024).bfloat16()
    trits, scale = Ternary().quantize(weight)
    wide, exact = Ternary().quantize(weight.double())
    assert torch.equal(trits.double(), wide)
    torch.testing.assert_close(scale.double(), exact, rtol=2**-10, atol=0)


def test_refusals():
    with pytest.raises(ValueError, match=r"^ternary: per must be one of 'tensor', 'row', got 'column'$"):
        weights.apply(nn.Linear(3, 3), "*", "ternary(per=column)")
