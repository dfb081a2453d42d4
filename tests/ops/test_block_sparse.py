"""Block-sparse attention against dense attention under the same mask."""

from __future__ import annotations

import pytest
import torch

from gatework.core.cost import count_flops
from gatework.ops import block_sparse
from gatework.ops.block_sparse import block_sparse_attention


def inputs(length: int, heads: int = 4, groups: int = 2, width: int = 6, values: int = 5):
    generator = torch.Generator().manual_seed(length)
    shapes = (heads, width), (groups, width), (groups, values)
    return [torch.randn(2, h, length, w, dtype=torch.float64, generator=generator).requires_grad_() for h, w in shapes]


def choice(choosers: int, blocks: int, share: float = 0.4) -> torch.Tensor:
    return torch.rand(2, choosers, blocks, blocks, generator=torch.Generator().manual_seed(7)) < share


def reference(q, k, v, kept, block, seen=None):
    """Query by query: softmax over the tokens that it may see."""
    heads, length, groups, choosers = q.shape[1], q.shape[2], k.shape[1], kept.shape[1]
    batches = []
    for b in range(len(q)):
        rows = []
        for h in range(heads):
            n, g = h // (heads // choosers), h // (heads // groups)
            for t in range(length):
                own = t // block
                if not kept[b, n, own, : own + 1].any():
                    rows.append(torch.zeros_like(v[b, g, 0]))
                    continue
                read = [
                    s for s in range(t + 1)
                    if s // block == own or (kept[b, n, own, s // block] and (seen is None or seen[b, n, t, s // block]))
                ]
                scores = k[b, g, read] @ q[b, h, t] / q.shape[3] ** 0.5
                rows.append(scores.softmax(0) @ v[b, g, read])
        batches.append(torch.stack(rows).view(heads, length, -1))
    return torch.stack(batches)


@pytest.mark.parametrize("gathered", [1, 1 << 19])
@pytest.mark.parametrize("choosers", [2, 4])
@pytest.mark.parametrize(("length", "block"), [(1, 4), (4, 4), (13, 4), (16, 1), (10, 16), (23, 3)])
def test_equals_masked_attention_with_all_gradients(monkeypatch, length, block, choosers, gathered):
    monkeypatch.setattr(block_sparse, "GATHERED", gathered)
    leaves = inputs(length)
    kept = choice(choosers, -(-length // block))
    seen = torch.rand(2, choosers, length, kept.shape[-1], generator=torch.Generator().manual_seed(8)) < 0.5
    for some in (None, seen):
        got, expected = (function(*leaves, kept, block, some) for function in (block_sparse_attention, reference))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
        upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        if not expected.requires_grad or not kept.tril().any():
            continue
        for ours, theirs in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_one_key_head_and_choosers_between():
    q, k, v = inputs(11, groups=1)
    for choosers in (1, 2, 4):
        kept = choice(choosers, 4)
        torch.testing.assert_close(block_sparse_attention(q, k, v, kept, 3), reference(q, k, v, kept, 3), rtol=0, atol=1e-12)


def test_everything_kept_is_causal_attention_and_nothing_kept_is_0():
    q, k, v = inputs(20, groups=4)
    kept = torch.ones(2, 4, 5, 5, dtype=torch.bool)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(block_sparse_attention(q, k, v, kept, 4), dense, rtol=0, atol=1e-12)
    assert not block_sparse_attention(q, k, v, ~kept, 4).any()


@pytest.mark.parametrize("choosers", [2, 4])
def test_what_is_not_kept_is_not_computed(choosers):
    q, k, v = inputs(64)
    kept = choice(choosers, 16).tril()
    kept |= torch.eye(16, dtype=torch.bool) & kept.any(-1, keepdim=True)
    with count_flops() as count, torch.no_grad():
        block_sparse_attention(q, k, v, kept, 4)
    pairs = int(kept.sum()) * (4 // choosers) * 4 * 4
    assert count.total == 2 * pairs * (q.shape[3] + v.shape[3])


@pytest.mark.parametrize(("batch", "length"), [(0, 8), (2, 0)])
def test_empty(batch, length):
    q, k, v = (torch.randn(batch, 2, length, 3) for _ in range(3))
    n = length // 4
    assert block_sparse_attention(q, k, v, torch.ones(batch, 2, n, n, dtype=torch.bool), 4).shape == (batch, 2, length, 3)


def test_wrong_sizes():
    q, k, v = inputs(8)
    with pytest.raises(ValueError, match="3 choosers are no multiple of the 2 key heads"):
        block_sparse_attention(q, k, v, choice(3, 2), 4)
    with pytest.raises(ValueError, match=r"8 tokens have ceil\(8 / 4\) blocks of 4, not the 3"):
        block_sparse_attention(q, k, v, choice(2, 3), 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": (1, 2, 7, 3)}, r"got \(1, 4, 8, 3\), \(1, 2, 7, 3\) and"),
        ({"k": (1, 2, 8, 4)}, r"got \(1, 4, 8, 3\), \(1, 2, 8, 4\) and"),
        ({"v": (1, 1, 8, 3)}, r"and \(1, 1, 8, 3\)"),
        ({"k": (1, 0, 8, 3), "v": (1, 0, 8, 3)}, "4 choosers are no multiple of the 0 key heads"),
        ({"kept": (2, 4, 2, 2)}, r"kept is \(1, 4, 2, 2\), not \(2, 4, 2, 2\)"),
        ({"kept": (1, 4, 2, 1)}, r"kept is \(1, 4, 2, 2\), not \(1, 4, 2, 1\)"),
        ({"seen": (1, 4, 8, 1)}, r"seen is \(1, 4, 8, 2\), not \(1, 4, 8, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_each_other(unchecked, wrong, message):
    shapes = {"q": (1, 4, 8, 3), "k": (1, 2, 8, 3), "v": (1, 2, 8, 3), "kept": (1, 4, 2, 2), "seen": (1, 4, 8, 2)} | wrong
    given = {name: torch.ones(shape, dtype=torch.bool if name in ("kept", "seen") else None) for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**given, block=4)
