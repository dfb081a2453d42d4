"""Projections structured by head against dense ones, forward and backward.

2048 tokens of width 512, 8 heads, float32, 2 threads; at equal mathematics a dense projection holds the structured one's matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.mixers.channelized_attention import ChannelProjection

TOKENS, WIDTH, HEADS = 2048, 512, 8


def both_ways(m: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def run() -> tuple[Tensor, ...]:
        y = m(x)
        return y, *torch.autograd.grad(y, [x, *m.parameters()], upstream)

    return run


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for name, mixes in (("independent", False), ("kronecker", True)):
        m = ChannelProjection(HEADS, WIDTH // HEADS, mixes).double()
        exact = torch.randn(3, 5, WIDTH, dtype=torch.float64).requires_grad_()
        upstream = torch.randn(exact.shape, dtype=torch.float64)
        leaves = [exact, *m.parameters()]
        ours = torch.autograd.grad(m(exact), leaves, upstream)
        theirs = torch.autograd.grad(F.linear(exact, m.dense()), leaves, upstream)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        x = torch.randn(TOKENS, WIDTH).requires_grad_()
        sides = [both_ways(some, x) for some in (m.float(), nn.Linear(WIDTH, WIDTH, bias=False))]
        structured, dense = interleaved(*sides, repeats=15)
        row(f"{name} projection", structured, dense, name, "dense", ">= 2", dense / structured >= 2)


if __name__ == "__main__":
    main()
