"""Matrix products of the stacked-weight layers: ``linear(x, w) = x w^T``, by the fastest exact kernel at hand.

In float32 on a CPU, oneDNN's product runs up to twice as fast as the BLAS behind ``torch.mm`` on some processors
(those whose widest vector unit the BLAS does not use) and no slower on others; it takes transposed operands without a
copy, so the backward pass gains alike. ``torch.backends.mkldnn.enabled = False`` switches it off. Everything else
goes to ``torch.mm``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

#: From this many rows on oneDNN's set-up pays.
_FEWEST_ROWS = 8


def product(a: Float[Tensor, "M K"], b: Float[Tensor, "N K"]) -> Float[Tensor, "M N"]:
    """``a b^T``, without a graph; either operand may be a transposed view."""
    if (
        a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.shape[0] >= _FEWEST_ROWS
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.t()


def linear(x: Float[Tensor, "M I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M O"]:
    """``x weight^T`` with gradients. Double backward is not supported."""
    if not torch.is_grad_enabled():
        return product(x, weight)
    out: Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        d_y = d_y.contiguous()
        d_x = product(d_y, weight.t()) if ctx.needs_input_grad[0] else None
        d_weight = product(d_y.t(), x.t()) if ctx.needs_input_grad[1] else None
        return d_x, d_weight
