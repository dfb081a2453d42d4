"""SiLU (Swish with slope 1): ``y = x * sigmoid(x)``.

Elfwing et al. 2017 (arXiv 1702.03118), Ramachandran et al. 2017 (arXiv 1710.05941).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gatework.activations.base import SelfGated
from gatework.core.registry import register


@register("silu")
class SiLU(SelfGated):
    """x * sigmoid(x)."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return F.silu(x)

    def gated(self, halves: Float[Tensor, "*B H2"]) -> Float[Tensor, "*B H"]:
        """``silu(a) * b`` of the halves ``(a, b)``, with a backward that saves the halves alone. No double backward."""
        out: Tensor = _Gated.apply(halves) if torch.is_grad_enabled() else _gated(halves)
        return out

    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``sigmoid(x)``."""
        return torch.sigmoid(x)


def _gated(halves: Tensor) -> Tensor:
    gate, value = halves.chunk(2, -1)
    return F.silu(gate).mul_(value)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        return _gated(halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        (halves,) = ctx.saved_tensors
        d_halves = torch.empty_like(halves)
        (gate, value), (d_gate, d_value) = halves.chunk(2, -1), d_halves.chunk(2, -1)
        torch.mul(d_out, F.silu(gate), out=d_value)
        torch.ops.aten.silu_backward.grad_input(d_out * value, gate, grad_input=d_gate)
        return d_halves
