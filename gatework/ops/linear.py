"""Matrix products of the stacked-weight layers: ``linear(x, w) = x w^T``, by the fastest exact kernel at hand.

In float32 on a CPU, oneDNN's product runs up to twice as fast as the BLAS behind ``torch.mm`` on some processors
(those whose widest vector unit the BLAS does not use) and no slower on others; it takes transposed operands without a
copy, so the backward pass gains alike. But it compiles a kernel for each shape that it has not seen, which takes as long
as a product of a few hundred rows, and an expert's number of rows is new in every step. So it is used for whole multiples
of :data:`ROWS` rows alone, of which there are few; :func:`alignment` tells who sorts the rows whether to fill up to that.
``torch.backends.mkldnn.set_flags(False)`` switches it off. Everything else goes to ``torch.nn.functional.linear``.
"""

from __future__ import annotations

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
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def linear(x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M O"]:
    """``x weight^T`` with gradients. Double backward is not supported."""
    if not _fast(x, weight):
        return F.linear(x, weight)
    out: Tensor = _Linear.apply(x, weight) if torch.is_grad_enabled() else _product(x, weight)
    return out


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a b^T`` by oneDNN; either operand may be a transposed view."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_x = _product(d_y, weight.t()) if ctx.needs_input_grad[0] else None
        d_weight = _product(d_y.t(), x.t()) if ctx.needs_input_grad[1] else None
        return d_x, d_weight
