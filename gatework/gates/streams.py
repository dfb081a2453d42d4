"""What ``cross_gate`` and ``pyramid_gate`` share: layers of two streams, as pictures (B, C, H, W) or as tokens (B, T, D)."""

from __future__ import annotations

from torch import Tensor, nn

from gatework.core.errors import PartError


def pointwise(d_in: int, d_out: int, tokens: bool, bias: bool = True) -> nn.Module:
    """A linear map of each position's channels."""
    return nn.Linear(d_in, d_out, bias=bias) if tokens else nn.Conv2d(d_in, d_out, 1, bias=bias)


def norm(d: int, tokens: bool) -> nn.Module:
    """Batch norm of pictures; layer norm of tokens, which needs no statistics of the batch."""
    return nn.LayerNorm(d) if tokens else nn.BatchNorm2d(d)


def check_streams(a: Tensor, b: Tensor, channels: int, tokens: bool) -> None:
    """Two streams of one shape, in the form that was asked for.

    Raises:
        PartError: they are not.
    """
    form = f"(B, T, {channels})" if tokens else f"(B, {channels}, H, W)"
    if a.shape != b.shape:
        raise PartError(f"the two streams have one shape {form}, not {tuple(a.shape)} and {tuple(b.shape)}")
    if a.dim() != (3 if tokens else 4) or a.shape[-1 if tokens else 1] != channels:
        raise PartError(f"a stream has shape {form}, not {tuple(a.shape)}")
