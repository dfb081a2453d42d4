"""A CRATE layer against a transformer layer of the same width, and what decoding keeps of each, forward and backward.

8 pictures of 196 tokens, width 192, 3 heads, float32, 2 threads: subspace attention and a step of sparse coding against
attention and a gated linear unit, each in a block with its norms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.depth.base import Block
from gatework.feedforward import GLU, CrateISTA
from gatework.mixers import Attention, CrateMSSA

BATCH, LENGTH, WIDTH, HEADS = 8, 196, 192, 3


def both_ways(m: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def run() -> tuple[Tensor, ...]:
        y = m(x)
        return y, *torch.autograd.grad(y, [x, *parameters], upstream)

    return run


def written_out(block: Block, x: Tensor) -> Tensor:
    mixer, ista = block.mixer, block.feedforward
    w = mixer.subspaces(block.mixer_norm(x)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    heads = (w @ w.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ w
    y = ista.norm(x + mixer.o_proj(heads.transpose(1, 2).flatten(2)))
    d = ista.dictionary
    step = F.linear(y, d.t()) - F.linear(F.linear(y, d), d.t())
    return F.relu(y + ista.step * step - ista.step * ista.threshold)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    crate = Block(CrateMSSA(WIDTH, HEADS, causal=False), CrateISTA(WIDTH), WIDTH).double()
    exact = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64).requires_grad_()
    parameters = list(crate.parameters())
    pairs = zip(
        both_ways(crate, parameters, exact)(), both_ways(lambda x: written_out(crate, x), parameters, exact)(), strict=True
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    print("correct: outputs and all gradients are those of the formulas (float64 within 1e-10)")
    crate.float()
    x = torch.randn(BATCH, LENGTH, WIDTH).requires_grad_()
    plain = Block(Attention(WIDTH, HEADS, rope=False, causal=False), GLU(WIDTH), WIDTH)
    sides = [both_ways(block, list(block.parameters()), x) for block in (crate, plain)]
    ours, theirs = interleaved(*sides, repeats=15)
    row("crate layer", ours, theirs, "crate", "transformer", ">= 2", theirs / ours >= 2)
    sizes = [sum(p.numel() for p in block.parameters()) for block in (crate, plain)]
    cached = [mixer.state_bytes(1) for mixer in (CrateMSSA(WIDTH, HEADS), Attention(WIDTH, HEADS, rope=False))]
    print(f"parameters {sizes[0]:,} and {sizes[1]:,}; decoding keeps {cached[0]} and {cached[1]} bytes per token")


if __name__ == "__main__":
    main()
