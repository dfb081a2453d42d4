"""Gated positional attention on a grid against the same formulas written out, forward and backward.

8 pictures of 14 x 14 and of 28 x 28 tokens, width 192, 4 heads, float32, 2 threads. Written out, both softmaxes are T x T matrices
that are mixed and multiplied with the values; ours has the fused kernel for one and two small matrices for the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.mixers import GPSA

WIDTH = 192


def heads_of(x: Tensor, linear: nn.Linear, heads: int) -> Tensor:
    return linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)


def dense(m: GPSA, x: Tensor) -> Tensor:
    rows, columns = m.grid
    q, k, v = (heads_of(x, linear, m.heads) for linear in (m.q_proj, m.k_proj, m.v_proj))
    place = torch.arange(rows * columns)
    d_x = (place[None] % columns - place[:, None] % columns).to(x.dtype)
    d_y = (place[None] // columns - place[:, None] // columns).to(x.dtype)
    relative = torch.stack([d_x, d_y, d_x.square() + d_y.square()], -1)
    position = (relative @ m.position.T).permute(2, 0, 1).softmax(-1)
    content = (q @ k.transpose(-1, -2) * m.head_width**-0.5).softmax(-1)
    gate = m.gates()[:, None, None]
    weights = (1 - gate) * content + gate * position
    return m.o_proj((weights @ v).transpose(1, 2).flatten(2))


def both_ways(function: Callable[[Tensor], Tensor], m: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def run() -> tuple[Tensor, ...]:
        y = function(x)
        return y, *torch.autograd.grad(y, [x, *m.parameters()], upstream)

    return run


def compare(what: str, m: nn.Module, written: Callable[[Tensor], Tensor], x: Tensor, want: float) -> None:
    """Equal in float64, then timed in float32."""
    m.double()
    exact = x[:1].double().requires_grad_()
    for ours, theirs in zip(both_ways(m, m, exact)(), both_ways(written, m, exact)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    m.float()
    x = x.requires_grad_()
    ours, theirs = interleaved(both_ways(m, m, x), both_ways(written, m, x), repeats=9, warmup=2)
    row(what, ours, theirs, "ours", "written out", f">= {want}", theirs / ours >= want)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for side, want in ((14, 1.1), (28, 1.5)):
        m = GPSA(WIDTH, heads=4, causal=False, grid=(side, side))
        compare(f"gpsa {side} x {side} tokens", m, lambda x, m=m: dense(m, x), torch.randn(8, side * side, WIDTH), want)


if __name__ == "__main__":
    main()
