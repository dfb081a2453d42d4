"""Block-sparse attention against dense causal attention, and SeerAttention's two forms as layers; forward, without gradients.

H 4, K 64, blocks of 64, float32, 1 thread. At T = 8192 with three quarters of the causal pairs of blocks left out, the operation
is to take at most half of the time of ``scaled_dot_product_attention(is_causal=True)``. The chosen blocks are random, as many in
each row as its share of the triangle. The layers have random weights; the token form reads, for each block of queries, what any of
its tokens chose, and random tokens agree on little, so it is timed with a budget too and for one decoded token.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor

from gatework.core import metrics
from gatework.mixers import Attention, SeerAttention
from gatework.ops.block_sparse import block_sparse_attention

HEADS, WIDTH, BLOCK = 4, 64, 64
LENGTHS = [2048, 4096, 8192]


def inputs(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, HEADS, length, WIDTH, generator=generator, dtype=dtype) for _ in range(3)]


def choose(length: int, share: float) -> Tensor:
    """A share of each row's causal blocks at random, its own among them."""
    blocks = length // BLOCK
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, HEADS, blocks, blocks, generator=generator).tril() + 2 * torch.eye(blocks)
    rank = scores.argsort(-1, descending=True).argsort(-1)
    most = (share * torch.arange(1, blocks + 1)).round().clamp(min=1)
    return (rank < most[:, None]).tril()


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check() -> None:
    q, k, v = inputs(512, torch.float64)
    kept = choose(512, 0.4)
    mask = kept.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3).tril()
    masked = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(block_sparse_attention(q, k, v, kept, BLOCK), masked, rtol=0, atol=1e-12)
    print("correct: equal to dense attention under the same mask (float64 within 1e-12)")


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check()
    for length in LENGTHS:
        q, k, v = inputs(length)
        for share in (0.5, 0.25, 0.1):
            kept = choose(length, share)
            sparse = partial(block_sparse_attention, q, k, v, kept, BLOCK)
            ours, theirs = interleaved(sparse, partial(dense, q, k, v), repeats=max(5, 24576 // length), warmup=1)
            share = float(kept.sum()) / (HEADS * kept.shape[2] * (kept.shape[2] + 1) / 2)
            asked = length == LENGTHS[-1] and 0.2 < share < 0.3
            what = f"block sparse T={length}, {100 * (1 - share):.0f}% left out"
            row(what, ours, theirs, "sparse", "dense", ">= 2" if asked else "", theirs / ours >= 2 if asked else None)

    length, width = LENGTHS[-1], HEADS * WIDTH
    x = torch.randn(1, length, width)
    plain = Attention(width, HEADS).eval()
    for settings in ({"choice": "block", "ratio": 0.25}, {"ratio": 0.25}, {"budget": 256}):
        layer = SeerAttention(width, HEADS, block=BLOCK, **settings).eval()
        ours, theirs = interleaved(partial(layer, x), partial(plain, x), repeats=3, warmup=1)
        row(f"layer {settings}, kept {float(metrics(layer)['kept']):.2f}", ours, theirs, "seer", "attention")
    layer = SeerAttention(width, HEADS, block=BLOCK, budget=1024).eval()
    states = layer.init_state(1), plain.init_state(1)
    for part, state in zip((layer, plain), states, strict=True):
        state.make_room(length + 256)
        part(x, state=state)
    steps = [partial(part, x[:, :1], state=state) for part, state in zip((layer, plain), states, strict=True)]
    ours, theirs = interleaved(*steps, repeats=41)
    row(f"one token behind {length}, budget 1024", ours, theirs, "seer", "attention")


if __name__ == "__main__":
    main()
