"""The products of the expert layers against plain ones."""

from __future__ import annotations

import pytest
import torch

from gatework.ops.linear import ROWS, alignment, linear


@pytest.mark.parametrize("rows", [1, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_equals_the_plain_product_with_gradients(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 240, dtype=dtype, generator=generator, requires_grad=True)
    w = torch.randn(300, 240, dtype=dtype, generator=generator, requires_grad=True)
    upstream = torch.randn(rows, 300, dtype=dtype, generator=generator)
    got, expected = linear(x, w), (x.double() @ w.double().T)
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    mine = torch.autograd.grad(got, [x, w], upstream)
    torch.testing.assert_close(mine[0].double(), upstream.double() @ w.double(), rtol=0, atol=tolerance)
    torch.testing.assert_close(mine[1].double(), upstream.double().T @ x.double(), rtol=0, atol=tolerance)


def test_onednn_does_large_products_of_few_shapes_and_can_be_switched_off(monkeypatch):
    called = []
    real = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *args: (called.append(args[0].shape), real(*args))[1])
    w = torch.randn(300, 240, requires_grad=True)
    linear(torch.randn(64, 240, requires_grad=True), w).sum().backward()
    assert called == [(64, 240), (64, 300), (300, 64)]
    linear(torch.randn(65, 240), w)
    linear(torch.randn(32, 240), w)  # With a graph: its backward's shapes are as new as its own.
    linear(torch.randn(64, 240).double(), w.double())
    torch.backends.mkldnn.set_flags(False)
    try:
        linear(torch.randn(64, 240), w)
    finally:
        torch.backends.mkldnn.set_flags(True)
    assert len(called) == 3


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 31, 33])
def test_few_rows_without_a_graph(rows):
    generator = torch.Generator().manual_seed(rows)
    x, w = torch.randn(rows, 240, generator=generator), torch.randn(300, 240, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, w).double(), x.double() @ w.double().T, rtol=0, atol=1e-4)


def test_rows_are_filled_up_where_few_shapes_pay():
    cpu = torch.device("cpu")
    assert alignment(1024.0, 256 * 512, torch.float32, cpu) == ROWS
    assert alignment(1024.0, 256 * 512, torch.float64, cpu) == 1
    assert alignment(64.0, 256 * 512, torch.float32, cpu) == 1
    assert alignment(1024.0, 64 * 32, torch.float32, cpu) == 1


def test_linear_gradcheck():
    x, w = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 4), (2, 4)])
    assert torch.autograd.gradcheck(linear, [x, w])
