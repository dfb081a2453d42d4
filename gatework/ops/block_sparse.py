"""Causal softmax attention over chosen blocks of keys: what is not chosen is not computed.

Queries and keys are cut into blocks of b tokens. With a set J(i) of key blocks for each query block i, which holds i itself,

    o_t = sum_s softmax_s(q_t . k_s / sqrt(K)) v_s    over s <= t with block(s) in J(block(t))

The rows (query blocks) with equally many key blocks are one batched attention: their key blocks are gathered side by side, the own
block, the only one that the triangle cuts, last. No list is filled up, so the work is that of the chosen pairs of blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

#: Numbers of gathered keys that one attention call reads, about: few enough to stay in the caches.
GATHERED = 1 << 20


def block_sparse_attention(
    q: Float[Tensor, "B H T K"],
    k: Float[Tensor, "B G T K"],
    v: Float[Tensor, "B G T V"],
    kept: Bool[Tensor, "B N n n"],
    block: int,
    seen: Bool[Tensor, "B N T n"] | None = None,
) -> Float[Tensor, "B H T V"]:
    """Causal attention in which each block of queries reads the blocks of keys that it keeps.

    Args:
        q: queries of H heads.
        k, v: keys and values of G heads; query head h reads the head ``h // (H / G)`` of them.
        kept: for each of the N choosers and each of the ``n = ceil(T / block)`` blocks of queries the blocks of keys that it reads.
            N is H, or G where the query heads of a group choose together, or between them. Blocks above the diagonal do not
            count, the own block counts where any block is kept; a row that keeps none is not computed, and is 0.
        block: tokens in a block.
        seen: which blocks each query reads, of those that its block keeps; None is all. The own block is always read.

    Raises:
        ValueError: where the head counts do not divide, the number of blocks is another, or other sizes do not fit.
    """
    batch, heads, length, width = q.shape
    groups, choosers, count = k.shape[1], kept.shape[1], kept.shape[2]
    if k.shape != (batch, groups, length, width) or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "queries, keys and values have as many sequences and tokens, queries and keys as many channels, keys and values as "
            f"many heads; got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not groups or not choosers or choosers % groups or heads % choosers:
        raise ValueError(f"{choosers} choosers are no multiple of the {groups} key heads, or no divisor of the {heads} query heads")
    if block < 1 or count != -(-length // block):
        raise ValueError(f"{length} tokens have ceil({length} / {block}) blocks of {block}, not the {count} that kept is for")
    if kept.shape != (batch, choosers, count, count):
        raise ValueError(f"kept is {(batch, choosers, count, count)}, not {tuple(kept.shape)}")
    if seen is not None and seen.shape != (batch, choosers, length, count):
        raise ValueError(f"seen is {(batch, choosers, length, count)}, not {tuple(seen.shape)}")
    kept = kept.tril()
    kept = kept | (kept.any(-1, keepdim=True) & torch.eye(count, dtype=torch.bool, device=kept.device))
    missing = count * block - length
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, missing)) for x in (q, k, v))
    # Rows are the query blocks of all sequences and choosers; the query heads that choose together stand in one row.
    rows = q.unflatten(1, (choosers, -1)).unflatten(3, (count, block)).permute(0, 1, 3, 2, 4, 5).flatten(0, 2)
    key_blocks, value_blocks = (x.unflatten(2, (count, block)).flatten(0, 2) for x in (k, v))
    sizes = kept.sum(-1).flatten()
    starts = sizes.cumsum(0) - sizes
    sequence, chooser, _, chosen = kept.nonzero().unbind(1)
    source = (sequence * groups + chooser // (choosers // groups)) * count + chosen
    if seen is not None:
        seen = F.pad(seen, (0, 0, 0, missing)).unflatten(2, (count, block)).flatten(0, 2)

    done, places = [], []
    for size in sizes.unique().tolist():
        if not size:
            continue
        group = (sizes == size).nonzero()[:, 0]
        triangle = torch.ones(block, size * block, dtype=torch.bool, device=q.device).tril((size - 1) * block)
        for some in group.split(max(1, GATHERED // (size * block * k.shape[3]))):
            entry = starts[some, None] + torch.arange(size, device=q.device)
            blocks = source[entry].flatten()
            shape = len(some), 1, size * block, -1
            keys, values = (x.index_select(0, blocks).view(shape) for x in (key_blocks, value_blocks))
            allowed = triangle
            if seen is not None:
                reads = seen[some].gather(2, chosen[entry][:, None].expand(-1, block, -1))
                reads[..., -1] = True
                allowed = reads.repeat_interleave(block, 2)[:, None] & triangle
            done.append(_attention(rows[some], keys, values, allowed))
            places.append(some)
    out = q.new_zeros(len(rows), *rows.shape[1:3], v.shape[3])
    if done:
        out = out.index_copy(0, torch.cat(places), torch.cat(done))
    out = out.unflatten(0, (batch, choosers, count)).permute(0, 1, 3, 2, 4, 5)
    return out.flatten(3, 4).flatten(1, 2)[:, :, :length]


def _attention(queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Attention of rows (N, R, b, K) over their own keys (N, 1, S, K)."""
    heads = queries.shape[1]
    if heads > 1:  # All heads of a row read the same keys: one head with R b queries.
        queries = queries.flatten(1, 2)[:, None]
        allowed = allowed.repeat(*[1] * (allowed.dim() - 2), heads, 1)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    return out if heads == 1 else out[:, 0].unflatten(1, (heads, -1))
