"""``Ternary``: weights of three values.

Ma et al., The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits, 2024, arXiv 2402.17764, equations 1 to 3 (the
weights; activations keep their dtype here):

    s = mean |W|        W_q = s * clip(round(W / s), -1, 1)        dL/dW = dL/dW_q

over a whole matrix (as in the paper) or over each of its rows. The gradient passes unchanged, also where the clip cuts.

Differences: the scale is used rounded to float16, as it is stored (by at most 2^-11 of its value), so that the packed model is
bitwise the trained one; the trits are those of the exact scale. Where the paper keeps s from 0 by an epsilon, a group of zeros
is simply zeros. A group that holds -a, 0 and a alone keeps its scale a (the mean would shrink it by the share of zeros): what was
folded can be made ternary again without a change.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gatework.core.contracts import Weight
from gatework.core.registry import register
from gatework.ops.estimators import straight_through
from gatework.ops.packing import pack_trits, unpack_trits
from gatework.weights.base import Packed, matrices


@register("ternary", paper="ternary")
class Ternary(Weight):
    """Three values -s, 0, s in each group of weights, straight-through gradient.

    ``s = mean |W|`` over the group, ``W_q = s clip(round(W / s), -1, 1)``; the stored W stays a full-precision parameter that the
    optimizer moves with the gradient of ``W_q``. The scale is rounded to float16: weights of a group with a mean below 3e-8 are
    0, and a mean above 65504 counts as that.

    Packed: five trits in a byte, each row beginning at a new byte, and a float16 scale for each group: 1.6 + 16 / group bits per
    weight where the row's length is divisible by 5.

    Args:
        per: the group that shares a scale: ``tensor`` (a matrix; each matrix of an expert stack has its own) or ``row`` (of a
            matrix, along its first axis: an output of a linear layer, an output channel, a token of an embedding).

    Example:
        >>> Ternary()(torch.tensor([[0.5, -1.5], [0.25, 0.75]]))
        tensor([[ 0.7500, -0.7500],
                [ 0.0000,  0.7500]])
    """

    def __init__(self, per: Literal["tensor", "row"] = "tensor") -> None:
        super().__init__()
        if per not in ("tensor", "row"):
            raise ValueError(f"per must be 'tensor' or 'row', got {per!r}")
        self.per = per

    def extra_repr(self) -> str:
        """The group."""
        return f"per={self.per!r}"

    def forward(self, stored: Tensor) -> Tensor:
        """The ternary weight."""
        with torch.no_grad():
            trits, scale = self.quantize(stored)
            hard = (trits * scale).to(stored.dtype).view(stored.shape)
        return straight_through(hard, stored)

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Trits (S, R, I), in float32 or wider, of S matrices of R rows, and scales (S, 1 or R, 1) that float16 holds exactly."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        wide = weight.detach().reshape(matrices(weight.shape, self.stacked)).to(dtype)
        axes = (-2, -1) if self.per == "tensor" else (-1,)
        size = wide.abs()
        if not wide.numel():
            return wide, wide.sum(axes, keepdim=True)
        mean, largest = size.mean(axes, keepdim=True), size.amax(axes, keepdim=True)
        already = ((size == largest) | (size == 0)).all(-1, keepdim=True).all(axes[0], keepdim=True)
        scale = torch.where(already, largest, mean)
        trits = torch.where(scale > 0, wide / scale, 0).round().clamp(-1, 1)
        return trits, _half(scale).to(dtype)

    def pack(self, stored: Tensor) -> tuple[nn.Module, Tensor]:
        """Trits in bytes and scales; what it is called with is empty and says the dtype."""
        trits, scale = self.quantize(stored)
        return TernaryPacked(trits.to(torch.int8), scale, stored.shape), stored.new_empty(0)


class TernaryPacked(Packed):
    """A ternary weight as bytes of five trits and float16 scales.

    Args:
        trits: (S, R, I) of S matrices of R rows.
        scale: (S, 1 or R, 1); kept as the bits of float16, so that ``model.to(dtype)`` leaves it alone.
        shape: of the weight.
    """

    trits: Tensor
    scale: Tensor

    def __init__(self, trits: Tensor, scale: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape
        self.length = trits.shape[-1]
        self.register_buffer("trits", pack_trits(trits))
        self.register_buffer("scale", scale.to(torch.float16).view(torch.int16))

    def extra_repr(self) -> str:
        """The shape."""
        return f"shape={tuple(self.shape)}"

    def forward(self, stored: Tensor) -> Tensor:
        """The whole weight in the dtype of ``stored``."""
        return self._weights(self.trits, self.scale, stored.dtype).view(self.shape)

    def rows(self, stored: Tensor, rows: Tensor) -> Tensor:
        """Some rows of the only matrix."""
        scale = self.scale[0] if self.scale.shape[1] == 1 else self.scale[0].index_select(0, rows)
        return self._weights(self.trits[0].index_select(0, rows), scale, stored.dtype)

    def _weights(self, trits: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return unpack_trits(trits, self.length, dtype) * scale.view(torch.float16).to(dtype)


def _half(x: Tensor) -> Tensor:
    """Rounded to what float16 holds, in float32; ``torch.compile`` takes a conversion there and back for nothing."""
    x = x.to(torch.float32).clamp(max=torch.finfo(torch.float16).max)
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # The power of two below.
    step = power.clamp(min=2.0**-14) * 2.0**-10
    return (x / step).round() * step
