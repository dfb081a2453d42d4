"""Matrix products of the stacked-weight layers: ``linear(x, w) = x w^T``, by the fastest exact kernel at hand.

In float32 on a CPU, oneDNN's product runs up to twice as fast as the BLAS behind ``torch.mm`` on some processors
(those whose widest vector unit the BLAS does not use) and no slower on others; it takes transposed operands without a
copy, so the backward pass gains alike. But it compiles a kernel for each shape that it has not seen, which takes as long
as a product of a few hundred rows, and an expert's number of rows is new in every step. So it is used for whole multiples
of :data:`ROWS` rows alone, of which there are few; :func:`alignment` tells who sorts the rows whether to fill up to that.
``torch.backends.mkldnn.set_flags(False)`` switches it off.

Without a graph, as in decoding, few rows go to the product that reads the weight fastest. Everything else goes to
``torch.nn.functional.linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Rows come in whole multiples of this, so that few shapes occur.
ROWS = 32
#: Multiply-adds from which on oneDNN's set-up pays.
_LEAST_WORK = 2**22
#: Elements of a weight that does not stay in the innermost caches.
_LEAST_WEIGHT = 2**16
#: Elements of a weight that one row meets faster by BLAS, on one thread.
_SMALL_WEIGHT = 2**17
_AVAILABLE = torch.backends.mkldnn.is_available()


def alignment(rows: float, width: int, dtype: torch.dtype, device: torch.device) -> int:
    """The multiple to which each expert's rows are best filled up: :data:`ROWS`, or 1 for leaving them as they are.

    Args:
        rows: mean number of rows of an expert.
        width: product of the two widths of its weight.
        dtype: of rows and weight.
        device: where they are.
    """
    # From four times as many rows on at most an eighth of them is filled in, on average.
    pays = rows >= 4 * ROWS and rows * width >= 2 * _LEAST_WORK
    return ROWS if pays and device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and _onednn() else 1


def _fast(x: Tensor, weight: Tensor) -> bool:
    rows = x.shape[0]
    fits = rows % ROWS == 0 and rows * weight.numel() >= _LEAST_WORK
    return fits and x.dtype == torch.float32 and x.device.type == "cpu" and _onednn()


def _onednn() -> bool:
    return _AVAILABLE and bool(torch._C._get_mkldnn_enabled())  # What torch.backends.mkldnn.enabled reads, ten times as slowly.


def linear(x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M O"]:
    """``x weight^T`` with gradients. Double backward is not supported."""
    if torch.is_grad_enabled():
        if _fast(x, weight) or _places(weight) is not None:
            out: Tensor = _Linear.apply(x, weight)
            return out
        return F.linear(x, weight)
    if _fast(x, weight):
        return _product(x, weight)
    return _few_rows(x, weight) if x.shape[0] <= ROWS else F.linear(x, weight)


def _few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """A product with at most :data:`ROWS` rows: few shapes, of which oneDNN soon knows all."""
    if weight.numel() < _LEAST_WEIGHT or x.dtype != torch.float32 or x.device.type != "cpu" or not _onednn():
        return F.linear(x, weight)
    if x.shape[0] == 1 and weight.numel() <= _SMALL_WEIGHT:
        return F.linear(x, weight)
    if 2 <= x.shape[0] <= 4:
        return torch.mm(weight, x.t()).t().contiguous()  # BLAS shares out the weight's rows among threads, not the few rows of x.
    return _product(x, weight)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` by oneDNN; either operand may be a transposed view."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out


class GradientPlaces:
    """One tensor for the gradients of all slices of a stack, into which the products write them.

    A product's own tensor per slice would be copied once more, and be as large as the weights until then.
    """

    def __init__(self, stack: Tensor) -> None:
        self.like = stack.shape, stack.dtype, stack.device
        self.stack: Tensor | None = None
        self.free: set[int] = set()

    def mark(self, weight: Tensor, index: int) -> None:
        """Say on a slice where its gradient goes."""
        weight._gradient_place = self, index  # type: ignore[attr-defined]

    def take(self, index: int) -> Tensor | None:
        """The place of a slice's gradient, once in each backward pass; None when it is taken."""
        if self.stack is None:
            shape, dtype, device = self.like
            self.stack = torch.empty(shape, dtype=dtype, device=device)
            self.free = set(range(shape[0]))
        if index not in self.free:
            return None
        self.free.remove(index)
        return self.stack[index]

    def collect(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradient of the stack: what is not in its place is copied there, zeros for a slice without any."""
        shape, dtype, device = self.like
        stack = torch.empty(shape, dtype=dtype, device=device) if self.stack is None else self.stack
        self.stack = None  # Another backward pass through the same graph gets another tensor.
        for place, gradient in zip(stack.unbind(0), gradients, strict=True):
            if gradient is None:
                place.zero_()
            elif gradient.data_ptr() != place.data_ptr():
                place.copy_(gradient)
        return stack


def _places(weight: Tensor) -> tuple[GradientPlaces, int] | None:
    found: tuple[GradientPlaces, int] | None = getattr(weight, "_gradient_place", None)
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.places = _places(weight)
        ctx.fast = _fast(x, weight)
        return _product(x, weight) if ctx.fast else F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = _product(d_y, weight.t()) if ctx.fast else d_y @ weight
        if ctx.needs_input_grad[1]:
            place = ctx.places[0].take(ctx.places[1]) if ctx.places is not None else None
            if not ctx.fast:
                d_weight = torch.mm(d_y.t(), x, out=place) if place is not None else d_y.t() @ x
            else:
                d_weight = _product(d_y.t(), x.t())
                d_weight = d_weight if place is None else place.copy_(d_weight)
        return d_x, d_weight
