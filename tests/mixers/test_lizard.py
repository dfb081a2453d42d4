"""Lizard against its equations: the gated part, the window with sinks, and what each is in the limit."""

from __future__ import annotations

import pytest
import torch

from gatework.core.cost import count_flops
from gatework.mixers import Attention, Lizard
from gatework.mixers.lizard import _peaks

D, HEADS = 16, 2
SETTINGS = [
    {}, {"window": 1}, {"window": 70, "rope": False, "chunk": 4},
    {"kv_heads": 1, "features": 3, "window": 4, "gates": "head", "sinks": 0},
]


def layer(**settings) -> Lizard:
    torch.manual_seed(0)
    m = Lizard(D, **({"heads": HEADS, "window": 6} | settings)).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


def inputs(length: int = 21) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def heads_of(m: Lizard, x: torch.Tensor):
    q, k, v = ((x @ p.weight.T).unflatten(-1, (-1, m.head_width)).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj))
    return q, *(y.repeat_interleave(HEADS // m.kv_heads, 1) for y in (k, v))


def gated_part(m: Lizard, x: torch.Tensor) -> torch.Tensor:
    """y (B, H, T, K): the sums over the past, weight by weight."""
    q, k, v = heads_of(m, x)
    phi_q, phi_k = (y @ w for y, w in ((q, m.q_features), (k, m.k_features)))
    phi_q, phi_k = (torch.cat([y.exp(), (-y).exp()], -1) for y in (phi_q, phi_k))
    gates = torch.sigmoid(x @ m.gate_proj.weight.T).expand(-1, -1, HEADS).transpose(1, 2)
    rows = []
    for t in range(x.shape[1]):
        kept = torch.stack([gates[:, :, j + 1 : t + 1].prod(-1) for j in range(t + 1)], -1)
        weights = kept * torch.einsum("bhf,bhjf->bhj", phi_q[:, :, t], phi_k[:, :, : t + 1])
        rows.append((weights / weights.sum(-1, keepdim=True))[:, :, None] @ v[:, :, : t + 1])
    return torch.cat(rows, 2)


def window_part(m: Lizard, x: torch.Tensor) -> torch.Tensor:
    """a (B, H, T, K): exponentials of the window's scores over theirs and the sinks'."""
    q, k, v = heads_of(m, x)
    length, half = x.shape[1], m.head_width // 2
    if m.rope:
        angles = torch.arange(length).double()[:, None] * m.rope_base ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angles), angles)
        turned = [torch.complex(y[..., :half], y[..., half:]) * turn for y in (q, k)]
        q, k = (torch.cat([y.real, y.imag], -1) for y in turned)
    rows = []
    for t in range(length):
        near = slice(max(0, t - m.window + 1), t + 1)
        weights = (torch.einsum("bhk,bhjk->bhj", q[:, :, t], k[:, :, near]) / m.head_width**0.5).exp()
        sinks = 0 if m.sinks is None else m.sinks.exp().sum(-1)[:, None]
        rows.append((weights / (weights.sum(-1, keepdim=True) + sinks))[:, :, None] @ v[:, :, near])
    return torch.cat(rows, 2)


def reference(m: Lizard, x: torch.Tensor) -> torch.Tensor:
    return (gated_part(m, x) + m.alpha * window_part(m, x)).transpose(1, 2).flatten(2) @ m.o_proj.weight.T


@pytest.mark.parametrize("length", [1, 5, 21, 66])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_the_equations_with_all_gradients(length, settings):
    m, x = layer(**settings), inputs(length).requires_grad_()
    got, expected = m(x), reference(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("pieces", [[1] * 21, [5, 16], [2, 3, 1, 15]])
def test_pieces_equal_whole(pieces, settings):
    m, x = layer(**settings), inputs()
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
    torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(21)


def test_decoding_keeps_as_much_whatever_the_length():
    m = layer()
    assert m.state_bytes(6) == m.state_bytes(6000) == 8 * (HEADS * 16 * 10 + 2 * HEADS * 6 * 8)


def test_without_sinks_a_window_over_everything_is_softmax_attention():
    m, x = layer(sinks=0, window=64), inputs()
    attention = Attention(D, HEADS).double()
    attention.load_state_dict({name: p for name, p in m.state_dict().items() if name in attention.state_dict()})
    with torch.no_grad():
        plain = m(x)
        m.alpha.mul_(2)
        torch.testing.assert_close((m(x) - plain) * (1 / (m.alpha / 2)), attention(x), rtol=0, atol=1e-11)
        # Sinks that are far down are none.
        sunk = layer(sinks=3, window=64)
        sunk.load_state_dict(m.state_dict(), strict=False)
        sunk.sinks.fill_(-200.0)
        torch.testing.assert_close(sunk(x), m(x), rtol=0, atol=1e-12)


def test_the_gated_part_is_a_mean_of_values_and_the_window_less_than_one():
    m, x = layer(), inputs(40)
    with torch.no_grad():
        m.v_proj.weight.zero_()
        values = torch.ones(2, 40, HEADS, 8).double()
        q, k = (torch.randn(2, 40, HEADS, 8, dtype=torch.float64) for _ in range(2))
        gates = -torch.rand(2, 40, HEADS).double()
        torch.testing.assert_close(m._past(q, k, values, gates, None, None, None), values, rtol=0, atol=1e-12)
        near = m._window(q, k, values, None, None, None)
        assert (near < 1).all()
        assert (near > 0).all()
    assert not m(x).any()


def test_open_gates_are_plain_linear_attention_and_closed_ones_the_token_itself():
    m = layer(gates="head")
    q, k, v = (torch.randn(2, 12, HEADS, 8, dtype=torch.float64) for _ in range(3))
    phi_q, phi_k = (torch.einsum("bthk,hkf->bhtf", y, w) for y, w in ((q, m.q_features), (k, m.k_features)))
    scores = 2 * (torch.cosh(phi_q[:, :, :, None] + phi_k[:, :, None]).sum(-1)).tril()
    linear = (scores / scores.sum(-1, keepdim=True)) @ v.transpose(1, 2)
    got = m._past(q, k, v, torch.zeros(2, 12, HEADS).double(), None, None, None)
    torch.testing.assert_close(got.transpose(1, 2), linear, rtol=0, atol=1e-11)
    got = m._past(q, k, v, torch.full((2, 12, HEADS), -800.0).double(), None, None, None)
    torch.testing.assert_close(got, v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_features_of_any_size_and_extreme_gates(size):
    """In float32, where exp would overflow at 89 and underflow at -104."""
    m = layer(gates="head").float()
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 50, HEADS, 8, generator=generator) for _ in range(3))
    gates, closed = (torch.rand(2, 50, HEADS, generator=generator) for _ in range(2))
    gates = torch.where(closed < 0.3, -size, -1e-3 * gates)
    q, k, gates = (y.requires_grad_() for y in (size * q, size * k, gates))
    got = m._past(q, k, v, gates, None, None, None)
    exact = m.double()
    # The logarithms of all weights, in float64: softmax over the past.
    phi_q, phi_k = (torch.einsum("bthk,hkf->bhtf", y.double(), w) for y, w in ((q, exact.q_features), (k, exact.k_features)))
    pairs = phi_q[:, :, :, None] + phi_k[:, :, None]
    logs = torch.cat([pairs, -pairs], -1).logsumexp(-1)
    fall = gates.double().cumsum(1).transpose(1, 2)
    logs = logs + fall[..., :, None] - fall[..., None, :]
    future = torch.ones(50, 50, dtype=torch.bool).triu(1)
    expected = (logs.masked_fill(future, float("-inf")).softmax(-1) @ v.double().transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-6 * size)
    got.square().sum().backward()
    assert all(y.grad.isfinite().all() for y in (q, k, gates))


def test_running_maxima():
    keys, gates = torch.randn(2, 9, 3, 4, dtype=torch.float64), -torch.rand(2, 9, 3).double()
    segments = torch.tensor([[1, 1, 1, 5, 5, 5, 5, 2, 2], [0] * 9])
    before = torch.randn(2, 3, 4, dtype=torch.float64)
    for ids, first in ((None, None), (None, before), (segments, None)):
        peak, decay = _peaks(keys, gates, first, ids)
        last = torch.full_like(before, float("-inf")) if first is None else first
        for t in range(9):
            if ids is not None and t:
                last = torch.where((ids[:, t] == ids[:, t - 1])[:, None, None], last, float("-inf"))
            now = torch.maximum(last + gates[:, t, :, None], keys[:, t])
            wanted = torch.where(last == float("-inf"), 0, gates[:, t, :, None] + last - now)
            torch.testing.assert_close(peak[:, t], now, rtol=0, atol=1e-12)
            torch.testing.assert_close(decay[:, t], wanted, rtol=0, atol=1e-12)
            last = now
        assert (decay <= 0).all()


def test_keep_skips_queries_and_outputs_and_leaves_the_state_whole():
    m, x = layer(), inputs(32)
    keep = torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    whole, part = m.init_state(2), m.init_state(2)
    with torch.no_grad():
        with count_flops() as every:
            full = m(x, state=whole)
        with count_flops() as some:
            kept = m(x, state=part, keep=keep)
    torch.testing.assert_close(kept[keep], full[keep], rtol=0, atol=1e-12)
    assert not kept[~keep].any()
    torch.testing.assert_close(part.memory, whole.memory, rtol=0, atol=1e-12)
    assert every.total - some.total == int((~keep).sum()) * 2 * 2 * D * D


def test_its_count_is_the_analytic_one():
    m, x, heads, width = layer(features=5), inputs(128), HEADS, D // HEADS
    with count_flops() as count, torch.no_grad():
        m(x)
    tokens, keys, values = 2 * 128, 2 * 5, width + 1
    # By chunk of 64: halves meet halves, down to blocks of 4; scores by values; the state is read and written.
    halves = sum(2 * (64 // block) * (block // 2) ** 2 * keys for block in (64, 32, 16, 8))
    recurrence = 2 * heads * 2 * (halves + 2 * 64 * 64 * values + 2 * 2 * 64 * keys * values)
    # Blocks of 64 queries: their own keys and the 5 before them.
    window = 2 * heads * 2 * 2 * 2 * 64 * (64 + 5) * width
    maps = 2 * tokens * (4 * D * D + D + 2 * heads * width * 5)
    assert count.total == maps + recurrence + window


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "not divisible by heads 3"), ({"kv_heads": 3}, "not divisible by kv_heads 3"), ({"window": 0}, "at least 1"),
        ({"features": 0}, "at least 1"), ({"sinks": -1}, "sinks at least 0"), ({"rope_base": 0.0}, "rope_base must be positive"),
        ({"heads": 16}, "an even head width"), ({"chunk": 48}, "power of two"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Lizard(D, **({"heads": HEADS} | settings))
