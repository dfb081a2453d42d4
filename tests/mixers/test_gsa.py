"""Gated slot attention against its equations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatework.mixers import GatedSlotAttention

D, HEADS = 16, 2
K = D // HEADS


def layer(**settings) -> GatedSlotAttention:
    torch.manual_seed(0)
    return GatedSlotAttention(D, **({"heads": HEADS} | settings)).double()


def inputs(length: int = 21) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def slots(q, k, v, a):
    """The two memories and the softmax over slots, for one head: q, k, v (T, K), gates a (T, M); returns (T, K), memories."""
    memory_k, memory_v, outputs = q.new_zeros(a.shape[1], K), q.new_zeros(a.shape[1], K), []
    for t in range(len(q)):
        memory_k = a[t][:, None] * memory_k + (1 - a[t])[:, None] * k[t]
        memory_v = a[t][:, None] * memory_v + (1 - a[t])[:, None] * v[t]
        weights = (memory_k @ q[t]).exp()
        outputs.append((weights / weights.sum()) @ memory_v)
    return torch.stack(outputs), memory_k, memory_v


def gates(m, x):
    return torch.sigmoid((x @ m.f_proj.weight.T).unflatten(-1, (m.kv_heads, -1))) ** (1 / m.normalizer)


def reference(m: GatedSlotAttention, x: torch.Tensor) -> torch.Tensor:
    def features(w):
        y = (x @ w.T).unflatten(-1, (-1, K))
        return silu(y) if m.feature is None else (y @ m.feature.weight.T).clamp(min=0)

    q, k, a = features(m.q_proj.weight), features(m.k_proj.weight), gates(m, x)
    v = silu(x @ m.v_proj.weight.T).unflatten(-1, (-1, K))
    rows = []
    for b in range(len(x)):
        group = m.heads // m.kv_heads
        heads = [slots(q[b, :, h], k[b, :, h // group], v[b, :, h // group], a[b, :, h // group])[0] for h in range(m.heads)]
        o = silu(torch.cat(heads, -1))
        rows.append(o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight)
    return torch.stack(rows) @ m.o_proj.weight.T


@pytest.mark.parametrize("length", [1, 5, 63, 65])
@pytest.mark.parametrize("settings", [{}, {"slots": 5, "kv_heads": 1, "normalizer": 2.0}, {"feature_map": "t2r", "chunk": 16}])
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


def with_gates(closed: torch.Tensor, x: torch.Tensor) -> GatedSlotAttention:
    """A layer of one head whose gate of slot m at token t is 0 where ``closed`` (T, M), else 1, on the tokens ``x`` (1, T, D)."""
    torch.manual_seed(0)
    m = GatedSlotAttention(D, heads=1, slots=closed.shape[1]).double()
    wanted = torch.where(closed, -1e5, 1e5).double()  # Logits; tokens are independent, so that some matrix gives each.
    with torch.no_grad():
        m.f_proj.weight.copy_(torch.linalg.lstsq(x[0], wanted).solution.T)
    return m


def test_slots_written_one_by_one_are_softmax_attention():
    """Slot m takes token m and keeps it: after M tokens this is softmax attention, with scale 1, over them."""
    count = 6
    x = inputs(count)[:1]
    m = with_gates(torch.eye(count, dtype=torch.bool), x)
    q, k, v = (silu(linear(x)) for linear in (m.q_proj, m.k_proj, m.v_proj))
    weights = (q @ k.mT).softmax(-1)
    o = (weights @ v)[:, -1]
    torch.testing.assert_close(m(x)[:, -1], m.output(o[:, None], x[:, -1]), rtol=0, atol=1e-10)
    # Before, the empty slots stand in the softmax with logit 0 and value 0.
    t = 2
    logits = torch.cat([(q[0, t] @ k[0, : t + 1].T), x.new_zeros(count - t - 1)])
    o = logits.softmax(0)[: t + 1] @ v[0, : t + 1]
    torch.testing.assert_close(m(x)[0, t], m.output(o[None], x[0, t]), rtol=0, atol=1e-10)


def test_gates_that_stay_open_write_nothing():
    x = inputs(7)[:1]
    m = with_gates(torch.zeros(7, 4, dtype=torch.bool), x)
    state = m.init_state(1)
    with torch.no_grad():
        y = m(x, state=state)
    assert not state.keys.any()
    assert not state.values.any()
    assert not y.any()


def test_slots_are_averages():
    """Of tokens that are all the same key and value, a slot holds 1 - prod_t a_t."""
    m = layer()
    x = inputs(1).expand(2, 30, D).clone()
    x[..., :2] += 0.3 * inputs(30)[..., :2]
    with torch.no_grad():
        m.k_proj.weight[:, :2] = 0
        m.v_proj.weight[:, :2] = 0
        state = m.init_state(2)
        m(x, state=state)
        share = 1 - gates(m, x).prod(1)
        key = silu(m.k_proj(x[:, 0])).unflatten(-1, (HEADS, K))
        value = silu(m.v_proj(x[:, 0])).unflatten(-1, (HEADS, K))
    torch.testing.assert_close(state.keys, key[..., None] * share[..., None, :], rtol=0, atol=1e-12)
    torch.testing.assert_close(state.values, share[..., None] * value[..., None, :], rtol=0, atol=1e-12)


def test_slots_that_hardly_forget_are_written_exactly():
    """1 - a is 1e-9 here: in float32 a is 1, and 1 - a would be 0."""
    m, x = layer().float(), torch.ones(1, 1, D)
    with torch.no_grad():
        m.f_proj.weight.fill_(-torch.tensor(8e-9).log() / D)
        state = m.init_state(1)
        m(x, state=state)
        written = state.values / silu(m.v_proj(x)).view(1, HEADS, 1, K)
    torch.testing.assert_close(written, torch.full_like(written, 1e-9), rtol=1e-4, atol=0)


def test_memory_is_about_12_tokens_at_the_start():
    decay = 0.5 ** (1 / layer().normalizer)
    assert 1 / (1 - decay) == pytest.approx(12.0, abs=0.1)


@pytest.mark.parametrize("settings", [{}, {"kv_heads": 1, "slots": 3}])
@pytest.mark.parametrize("pieces", [[21], [1] * 21, [5, 16], [2, 3, 1, 15]])
def test_pieces_equal_whole(pieces, settings):
    m, x = layer(chunk=8, **settings), inputs()
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(21)


def test_the_state_holds_the_memories():
    m, x = layer(slots=5), inputs(11)
    state = m.init_state(2)
    with torch.no_grad():
        m(x, state=state)
        k, v = (silu(linear(x)).unflatten(-1, (HEADS, K)) for linear in (m.k_proj, m.v_proj))
        a = gates(m, x)
        for b in range(2):
            for h in range(HEADS):
                _, memory_k, memory_v = slots(k[b, :, h], k[b, :, h], v[b, :, h], a[b, :, h])
                torch.testing.assert_close(state.keys[b, h], memory_k.T, rtol=0, atol=1e-12)
                torch.testing.assert_close(state.values[b, h], memory_v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_extreme_gates_are_finite(logit):
    m, x = layer(), inputs(70)
    x[..., 0] = 1
    with torch.no_grad():
        m.f_proj.weight.zero_()
        m.f_proj.weight[:, 0] = logit
    x.requires_grad_()
    y = m(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in m.parameters())
    if logit < 0:  # Every slot holds the present token: the output is a function of it alone.
        alone = m(x.flatten(0, 1)[:, None]).view(2, 70, D)
        torch.testing.assert_close(y, alone, rtol=0, atol=1e-11)


def test_keep_skips_projections_and_leaves_the_state_whole():
    m, x = layer(), inputs(32)
    keep = torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    whole, part = m.init_state(2), m.init_state(2)
    with torch.no_grad():
        full = m(x, state=whole)
        with FlopCounterMode(display=False) as counter:
            kept = m(x, state=part, keep=keep)
        with FlopCounterMode(display=False) as every:
            m(x, state=m.init_state(2))
    torch.testing.assert_close(kept, full * keep[..., None], rtol=0, atol=1e-12)
    torch.testing.assert_close(part.values, whole.values, rtol=0, atol=1e-12)
    assert every.get_total_flops() - counter.get_total_flops() == int((~keep).sum()) * 2 * 2 * D * D


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "not divisible by heads 3"),
        ({"kv_heads": 3}, "not divisible by kv_heads 3"),
        ({"slots": 1}, "slots must be at least 2"),
        ({"chunk": 48}, "power of two"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)
