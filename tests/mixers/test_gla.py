"""Gated linear attention against its equations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatework.mixers import GatedLinearAttention

D, HEADS = 16, 2


def layer(**settings) -> GatedLinearAttention:
    torch.manual_seed(0)
    return GatedLinearAttention(D, heads=HEADS, **settings).double()


def inputs(length: int = 21) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference(m: GatedLinearAttention, x: torch.Tensor) -> torch.Tensor:
    """Section 4 of the paper and the output stage, one token at a time."""
    batch, length, _ = x.shape
    k_width, v_width = m.key_width // HEADS, m.value_width // HEADS

    def heads(y):
        return y.view(batch, length, HEADS, -1)

    q, k, v = heads(x @ m.q_proj.weight.T), heads(x @ m.k_proj.weight.T), heads(x @ m.v_proj.weight.T)
    logits = (x @ m.decay_in.weight.T) @ m.decay_out.weight.T + m.decay_out.bias
    alpha = heads(torch.sigmoid(logits) ** (1 / m.normalizer))
    state = x.new_zeros(batch, HEADS, k_width, v_width)
    rows = []
    for t in range(length):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        o = torch.einsum("bhk,bhkv->bhv", q[:, t], state) * k_width**-0.5
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        g = x[:, t] @ m.g_proj.weight.T
        rows.append((o.flatten(1) * (g * torch.sigmoid(g))) @ m.o_proj.weight.T)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("length", [1, 5, 63, 64, 65])
@pytest.mark.parametrize("settings", [{}, {"expand_k": 1.0, "expand_v": 2.0}, {"chunk": 16, "decay_rank": 3, "normalizer": 2.0}])
def test_equals_the_equations_with_all_gradients(length, settings):
    m, x = layer(**settings), inputs(length).requires_grad_()
    with torch.no_grad():
        m.norm.weight.uniform_(0.5, 1.5)
    got, expected = m(x), reference(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_memory_is_about_24_tokens_at_the_start():
    m = layer()
    torch.nn.init.zeros_(m.decay_out.bias)
    decay = torch.sigmoid(torch.zeros(())) ** (1 / m.normalizer)
    assert decay.item() == pytest.approx(0.9576, abs=1e-4)
    assert 1 / (1 - decay.item()) == pytest.approx(23.6, abs=0.1)


@pytest.mark.parametrize("pieces", [[21], [1] * 21, [5, 16], [2, 3, 1, 15]])
def test_pieces_equal_whole(pieces):
    m, x = layer(chunk=8), inputs()
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(21)


def test_keep_skips_projections_and_leaves_the_state_whole():
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
    torch.testing.assert_close(part.memory, whole.memory, rtol=0, atol=1e-12)
    dropped = int((~keep).sum())
    saved = dropped * 2 * D * (m.key_width + 2 * m.value_width)
    assert all_of_them.get_total_flops() - counter.get_total_flops() == saved


def test_fully_closed_gates_leave_the_present_token():
    m, x = layer(normalizer=1e-3), inputs(9)
    torch.nn.init.constant_(m.decay_out.bias, -50.0)
    together, alone = m(x), m(x.flatten(0, 1)[:, None]).view(2, 9, D)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)
    together.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "not divisible by heads 3"),
        ({"chunk": 48}, "power of two"),
        ({"decay_rank": 0}, "decay_rank must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        GatedLinearAttention(D, **({"heads": 2} | settings))


def test_segments_need_the_training_form():
    m = layer()
    with pytest.raises(ValueError, match="cannot be decoded with a state"):
        m(inputs(4), state=m.init_state(2), segments=torch.zeros(2, 4, dtype=torch.long))
