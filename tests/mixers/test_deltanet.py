"""The delta rule's mixer against its equations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatework.core.cost import count_flops
from gatework.mixers import DeltaNet

D, HEADS = 16, 2


def layer(**settings) -> DeltaNet:
    torch.manual_seed(0)
    return DeltaNet(D, **({"heads": HEADS} | settings)).double()


def inputs(length: int = 21) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def reference(m: DeltaNet, x: torch.Tensor) -> torch.Tensor:
    """The equations of the module's docstring, one token at a time."""
    batch, length, _ = x.shape
    taps = m.conv.weight.shape[1]
    k_width, v_width = m.key_width // m.heads, m.value_width // m.heads
    projected = torch.cat([x.new_zeros(batch, taps - 1, m.conv.weight.shape[0]), x @ m.qkv_proj.weight.T], 1)
    state = x.new_zeros(batch, m.heads, k_width, v_width)
    rows = []
    for t in range(length):
        seen = silu((projected[:, t : t + taps] * m.conv.weight.T).sum(1))
        q, k, v = (y.view(batch, m.heads, -1) for y in seen.split([m.key_width, m.key_width, m.value_width], 1))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        beta = torch.sigmoid(x[:, t] @ m.b_proj.weight.T) * (2 if m.allow_neg_eigval else 1)
        error = v - torch.einsum("bhk,bhkv->bhv", k, state)
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta, k, error)
        o = torch.einsum("bhk,bhkv->bhv", q, state) * k_width**-0.5
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        rows.append(o.flatten(1) @ m.o_proj.weight.T)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("length", [1, 5, 32, 65])
@pytest.mark.parametrize(
    "settings", [{}, {"expand_k": 0.5, "expand_v": 2.0, "allow_neg_eigval": True}, {"chunk": 4, "conv_width": 2, "heads": 4}]
)
def test_equals_the_equations_with_all_gradients(length, settings):
    m, x = layer(**settings), inputs(length).requires_grad_()
    with torch.no_grad():
        m.norm.weight.uniform_(0.5, 1.5)
    got, expected = m(x), reference(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pieces", [[21], [1] * 21, [5, 16], [2, 3, 1, 15]])
def test_pieces_equal_whole(pieces):
    m, x = layer(chunk=8), inputs()
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(21)


def test_state_bytes_are_the_memory_and_three_rows_of_the_convolution():
    m = layer().float()
    assert m.state_bytes(1) == m.state_bytes(10**6) == 4 * (HEADS * 8 * 8 + 3 * 3 * D)
    half = layer().bfloat16()
    assert half.state_bytes(1) == 4 * HEADS * 8 * 8 + 2 * 3 * 3 * D
    state = half.init_state(2)
    assert (state.memory.dtype, state.tail.dtype) == (torch.float32, torch.bfloat16)


def test_keep_skips_the_output_stage_and_leaves_the_state_whole():
    m, x = layer(), inputs(32)
    keep = torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    whole, part = m.init_state(2), m.init_state(2)
    with torch.no_grad():
        full = m(x, state=whole)
        with FlopCounterMode(display=False) as counter:
            kept = m(x, state=part, keep=keep)
        with FlopCounterMode(display=False) as all_of_them:
            m(x, state=m.init_state(2))
    torch.testing.assert_close(kept[keep], full[keep], rtol=0, atol=1e-12)
    assert not kept[~keep].any()
    for name in ("memory", "tail"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=0, atol=1e-12)
    saved = int((~keep).sum()) * 2 * D * m.value_width
    assert all_of_them.get_total_flops() - counter.get_total_flops() == saved


def test_a_later_write_replaces_an_earlier_one():
    """Of two writes under one key with beta 1 the memory holds the second, whatever stood between them under other keys."""
    m = layer(conv_width=1, heads=1, expand_k=1.0)
    with torch.no_grad():
        m.b_proj.weight.fill_(1e3)  # beta 1 for inputs with a positive sum.
        m.qkv_proj.weight.normal_()
        x = inputs(3).abs()
        x[:, 2] = x[:, 0]
        first, other, both = m.init_state(2), m.init_state(2), m.init_state(2)
        m(x[:, :1], state=first)
        m(x[:, 1:], state=other)
        m(x, state=both)
    key = torch.nn.functional.normalize(silu(x[:, 0] @ m.qkv_proj.weight[D : 2 * D].T * m.conv.weight[D : 2 * D, 0]), dim=-1)
    read = [torch.einsum("bk,bhkv->bv", key, state.memory) for state in (first, other, both)]
    torch.testing.assert_close(read[2], read[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read[2], read[1], rtol=1e-5, atol=1e-5)


def test_negative_eigenvalues_keep_a_parity():
    """beta 2 reflects the memory along the key: after n equal tokens it holds v (1 - (-1)^n) / 2, which beta 1 cannot tell."""
    reads = {}
    for allowed in (True, False):
        m = layer(conv_width=1, heads=1, allow_neg_eigval=allowed)
        with torch.no_grad():
            m.b_proj.weight.fill_(1e3)
            x = inputs(1).abs().expand(-1, 7, -1)
            state, norms = m.init_state(2), []
            for token in x.split(1, 1):
                m(token, state=state)
                norms.append(float(state.memory.norm()))
        reads[allowed] = torch.tensor(norms)
    odd = torch.arange(7) % 2 == 0
    assert (reads[True][~odd] < 1e-4 * reads[True][0]).all()
    assert (reads[True][odd] > 0.99 * reads[True][0]).all()
    torch.testing.assert_close(reads[False], reads[False][:1].expand(7), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("d_model", "heads"), [(16, 2), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4)])
def test_common_widths_fit(d_model, heads):
    m = DeltaNet(d_model, heads=heads)
    assert m(torch.zeros(1, 2, d_model)).shape == (1, 2, d_model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "the key width 16 and value width 16 are not divisible by heads 3"),
        ({"heads": 0}, "not divisible by heads 0"),
        ({"expand_v": 0.01}, "leave the keys or the values no width"),
        ({"chunk": 48}, "chunk must be a power of two, got 48"),
        ({"conv_width": 0}, "must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        DeltaNet(D, **({"heads": HEADS} | settings))


def test_flops_of_a_decoded_token_and_of_sequences():
    """A token costs its weights and two reads of each head's memory, by its key and by its query; a sequence grows by what it
    grows."""
    m = layer()
    weights = sum(p.numel() for p in m.parameters() if p.dim() == 2) - m.conv.weight.numel()
    with torch.no_grad():
        with count_flops() as one:
            m(inputs(1), state=m.init_state(2))
        totals = []
        for length in (64, 128, 192):
            with count_flops() as some:
                m(inputs(length))
            totals.append(some.total)
    assert one.total == 2 * 2 * (weights + 2 * m.key_width * m.value_width // HEADS)
    assert totals[2] - totals[1] == totals[1] - totals[0] > 64 * one.total
