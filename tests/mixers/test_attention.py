"""Attention against its equations, its cache against the parallel form, and what it really computes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gatework.core.cost import count_flops
from gatework.mixers import GatedLinearAttention
from gatework.mixers.attention import KEPT_CHUNK, Attention
from gatework.mixers.base import rotary_angles, rotate

D, HEADS = 16, 4

FORMS = [
    {},
    {"kv_heads": 2},
    {"kv_heads": 1, "window": 3},
    {"window": 1},
    {"window": 5, "qk_norm": True},
    {"qk_norm": True, "rope_base": 50.0},
    {"rope": False},
    {"causal": False},
    {"causal": False, "window": 2, "kv_heads": 2},
]
CAUSAL = [form for form in FORMS if form.get("causal", True)]


def layer(**settings) -> Attention:
    torch.manual_seed(0)
    m = Attention(D, **({"heads": HEADS} | settings)).double()
    for name, p in m.named_parameters():
        # Scores of order 1: at 0.02 all softmaxes are flat and no error in the scores would show.
        nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else nn.init.normal_(p, std=0.35)
    return m


def inputs(length: int = 9, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_same_with_gradients(m, x, got, expected, where=None):
    where = torch.ones(x.shape[:2], dtype=torch.bool) if where is None else where
    torch.testing.assert_close(got[where], expected[where], rtol=0, atol=1e-12)
    upstream = torch.randn(got[where].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    mine = torch.autograd.grad(got[where], leaves, upstream)
    theirs = torch.autograd.grad(expected[where], leaves, upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_equals_the_equations_with_all_gradients(settings, attention_equations):
    m, x = layer(**settings), inputs().requires_grad_()
    assert_same_with_gradients(m, x, m(x), attention_equations(m, x))


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_padding_on_either_side_and_inside_takes_no_position(settings, attention_equations):
    m, x = layer(**settings), inputs().requires_grad_()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    y = m(x, mask=mask)
    assert torch.isfinite(y).all()
    assert_same_with_gradients(m, x, y, attention_equations(m, x, mask), mask)
    alone = m(x[:1, 3:])
    torch.testing.assert_close(y[:1, 3:], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_segments_are_separate_sequences(settings, attention_equations):
    m, x = layer(**settings), inputs().requires_grad_()
    segments = torch.tensor([[0] * 4 + [1] * 5, [7] * 2 + [3] * 6 + [5]])
    y = m(x, segments=segments)
    assert_same_with_gradients(m, x, y, attention_equations(m, x, segments=segments))
    torch.testing.assert_close(y[1:, 2:8], m(x[1:, 2:8]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [1, 7, 63, 64, 65, 100])
@pytest.mark.parametrize("length", [64, 65, 128, 131, 200])
def test_the_blockwise_window_equals_the_band(window, length):
    m, x = layer(window=window, kv_heads=2), inputs(length, 1).requires_grad_()
    q = rotate(m.q_proj(x).unflatten(-1, (HEADS, -1)), *rotary_angles(torch.arange(length), D // HEADS, 1e4, x.dtype))
    k = rotate(m.k_proj(x).unflatten(-1, (2, -1)), *rotary_angles(torch.arange(length), D // HEADS, 1e4, x.dtype))
    v = m.v_proj(x).unflatten(-1, (2, -1))
    age = torch.arange(length)[:, None] - torch.arange(length)
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / math.sqrt(D // HEADS)
    weights = scores.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1)
    expected = m.o_proj(torch.einsum("bhts,bshk->bthk", weights, v.repeat_interleave(2, 2)).flatten(2))
    assert_same_with_gradients(m, x, m(x), expected)


def test_the_parallel_window_costs_what_its_blocks_hold():
    m, window = layer(window=64), 64

    def scores(length: int) -> int:
        with torch.no_grad(), count_flops() as count:
            m(inputs(length, 1))
        return count.total - length * 2 * 4 * D * D

    # Block 0 sees itself, every later block itself and the one before: two products of D channels in all.
    assert scores(64 * 8) == 4 * D * (window * window + 7 * window * 2 * window)
    assert scores(64 * 16) - scores(64 * 8) == 4 * D * 8 * window * 2 * window


def test_rotation_turns_the_pairs_i_and_i_plus_half():
    x = torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    positions = torch.tensor([0, 1, 17])
    cos, sin = rotary_angles(positions, 6, 100.0, x.dtype)
    y = rotate(x, cos, sin)
    for t, position in enumerate(positions.tolist()):
        for i in range(3):
            turn = complex(math.cos(position * 100 ** (-i / 3)), math.sin(position * 100 ** (-i / 3)))
            for h in range(2):
                z = complex(x[t, h, i], x[t, h, i + 3]) * turn
                assert y[t, h, i].item() == pytest.approx(z.real, abs=1e-14)
                assert y[t, h, i + 3].item() == pytest.approx(z.imag, abs=1e-14)
    assert torch.equal(y[0], x[0])


def test_scores_depend_on_the_distance_only():
    q, k = torch.randn(2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def score(t: int, s: int) -> float:
        placed = [rotate(x[None], *rotary_angles(torch.tensor([p]), 8, 1e4, x.dtype)) for x, p in ((q, t), (k, s))]
        return float((placed[0] * placed[1]).sum())

    assert score(13, 9) == pytest.approx(score(1004, 1000), abs=1e-11)
    assert score(13, 9) == pytest.approx(score(0, -4), abs=1e-12)
    assert abs(score(13, 9) - score(9, 13)) > 1e-3


def test_without_positions_the_order_of_the_past_does_not_matter():
    x = inputs()
    swapped = x[:, [3, 1, 2, 0, *range(4, 9)]]
    unplaced, placed = layer(rope=False), layer()
    torch.testing.assert_close(unplaced(swapped)[:, 4:], unplaced(x)[:, 4:], rtol=0, atol=1e-13)
    assert (placed(swapped)[:, 4:] - placed(x)[:, 4:]).abs().max() > 1e-3


def test_positions_of_a_half_precision_model_are_exact_to_float32():
    m, x = layer().float(), inputs(4).float()
    cos, _ = rotary_angles(torch.tensor([4097]), 4, 1e4, torch.bfloat16)
    assert cos.dtype == torch.float32
    assert cos[0, 0].item() == pytest.approx(math.cos(4097), abs=1e-6)
    y = m.bfloat16()(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert m.init_state(1).keys.dtype == torch.bfloat16


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [2, 1, 6], [1, 8]])
@pytest.mark.parametrize("settings", CAUSAL, ids=str)
def test_pieces_equal_whole(settings, pieces):
    m, x = layer(**settings), inputs()
    state = m.init_state(2)
    with torch.no_grad():
        got = [m(piece, state=state) for piece in x.split(pieces, 1)]
        torch.testing.assert_close(torch.cat(got, 1), m(x), rtol=0, atol=1e-12)
    assert state.nbytes == 2 * m.state_bytes(9)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5], [2, 1, 6]])
@pytest.mark.parametrize("settings", CAUSAL, ids=str)
def test_padded_pieces_equal_whole(settings, pieces):
    m, x = layer(**settings), inputs()
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1, 0]], dtype=torch.bool)
    state, got = m.init_state(2), []
    with torch.no_grad():
        for piece, real in zip(x.split(pieces, 1), mask.split(pieces, 1), strict=True):
            got.append(m(piece, state=state, mask=real))
        got = torch.cat(got, 1)
        torch.testing.assert_close(got[mask], m(x, mask=mask)[mask], rtol=0, atol=1e-12)
        assert torch.isfinite(got).all()
        # Real tokens alone may follow: each row goes on from its own position.
        more = inputs(12)[:, 9:]
        after = torch.cat([m(more[:, :1], state=state), m(more[:, 1:], state=state)], 1)
        for b in range(2):
            row = torch.cat([x[b : b + 1, mask[b]], more[b : b + 1]], 1)
            torch.testing.assert_close(after[b : b + 1], m(row)[:, -3:], rtol=0, atol=1e-12)


def test_left_padded_prompt_then_single_tokens():
    m, x = layer(kv_heads=2), inputs(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :5] = False
    state = m.init_state(2)
    with torch.no_grad():
        m(x[:, :9], state=state, mask=mask[:, :9])
        got = torch.cat([m(x[:, t : t + 1], state=state) for t in range(9, 12)], 1)
        torch.testing.assert_close(got[:1], m(x[:1, 5:])[:, -3:], rtol=0, atol=1e-12)
        torch.testing.assert_close(got[1:], m(x[1:])[:, -3:], rtol=0, atol=1e-12)


def test_a_windows_state_stops_growing():
    m, x = layer(window=4, kv_heads=2), inputs(200, 1)
    state, sizes, rooms = m.init_state(1), [], []
    with torch.no_grad():
        for t in range(200):
            m(x[:, t : t + 1], state=state)
            sizes.append(state.nbytes)
            rooms.append(state.keys.shape[2])
    entry = 2 * 2 * (D // HEADS) * 8
    assert sizes == [entry * min(t + 1, 4) for t in range(200)] == [m.state_bytes(t + 1) for t in range(200)]
    assert max(rooms) <= 16


def test_a_windows_state_stops_growing_with_padding_too():
    m, x = layer(window=4), inputs(40)
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(7)) < 0.5
    state = m.init_state(2)
    with torch.no_grad():
        for t in range(40):
            m(x[:, t : t + 1], state=state, mask=mask[:, t : t + 1])
    counts = 2 * 8
    assert state.nbytes == 2 * m.state_bytes(40) + counts
    assert state.real.tolist() == mask.sum(1).tolist()


def test_feeding_one_by_one_copies_a_bounded_number_of_times():
    m, x = layer(), inputs(300, 1)
    state, buffers = m.init_state(1), set()
    with torch.no_grad():
        for t in range(300):
            m(x[:, t : t + 1], state=state)
            buffers.add((state.keys.data_ptr(), state.keys.shape[2]))
    assert len(buffers) <= 2 + math.log2(300 / 16)


@pytest.mark.parametrize("learns", ["q_proj", "k_proj", "v_proj", "all"])
def test_pieces_with_gradients_equal_whole(learns):
    m, x = layer(window=5), inputs()
    if learns != "all":
        m.requires_grad_(False)
        getattr(m, learns).requires_grad_(True)
    leaves = [p for p in m.parameters() if p.requires_grad]
    state = m.init_state(2)
    with torch.no_grad():
        prompt = m(x[:, :2], state=state)
    y = torch.cat([m(x[:, t : t + 1], state=state) for t in range(2, 9)], 1)
    mine = torch.autograd.grad(y.square().sum(), leaves)
    # The prompt's keys and values carry no gradient: in the whole form they come from a frozen twin.
    frozen = copy.deepcopy(m).requires_grad_(False)
    m.key = lambda z: torch.cat([frozen_key(z[:, :2]), Attention.key(m, z[:, 2:])], 1)
    m.value = lambda z: torch.cat([frozen_value(z[:, :2]), Attention.value(m, z[:, 2:])], 1)
    frozen_key, frozen_value = frozen.key, frozen.value
    whole = m(x)
    torch.testing.assert_close(torch.cat([prompt, y], 1), whole, rtol=0, atol=1e-12)
    for a, b in zip(mine, torch.autograd.grad(whole[:, 2:].square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_rows_can_be_reordered_and_dropped():
    m, x = layer(), inputs(9, 3)
    state, picked = m.init_state(3), torch.tensor([2, 0])
    with torch.no_grad():
        m(x[:, :6], state=state)
        state.reorder(picked)
        got = m(x[picked, 6:], state=state)
        torch.testing.assert_close(got, m(x)[picked, 6:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", FORMS, ids=str)
@pytest.mark.parametrize("around", ["plain", "mask", "segments"])
def test_kept_tokens_equal_all_tokens(settings, around):
    m, x = layer(**settings), inputs().requires_grad_()
    keep = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    with_what = {
        "plain": {},
        "mask": {"mask": torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)},
        "segments": {"segments": torch.tensor([[0] * 5 + [1] * 4, [2] * 9])},
    }[around]
    y = m(x, keep=keep, **with_what)
    assert not y[~keep].any()
    assert_same_with_gradients(m, x, y, m(x, **with_what), keep)
    assert not m(x, keep=torch.zeros_like(keep), **with_what).any()


@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("causal", [True, False])
def test_many_kept_tokens_go_in_chunks(window, causal):
    length = 3 * KEPT_CHUNK + 20
    m, x = layer(window=window, causal=causal, kv_heads=2), inputs(length).requires_grad_()
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(6)) < torch.tensor([[0.8], [0.2]])
    assert keep[0].sum() > 2 * KEPT_CHUNK > keep[1].sum()
    assert_same_with_gradients(m, x, m(x, keep=keep), m(x), keep)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5]])
@pytest.mark.parametrize("settings", CAUSAL, ids=str)
def test_pieces_of_kept_tokens_equal_whole(settings, pieces):
    m, x = layer(**settings), inputs()
    keep = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    for masks in (None, mask):
        state, got = m.init_state(2), []
        parts = [None] * len(pieces) if masks is None else masks.split(pieces, 1)
        with torch.no_grad():
            for piece, kept, real in zip(x.split(pieces, 1), keep.split(pieces, 1), parts, strict=True):
                got.append(m(piece, state=state, keep=kept, mask=real))
            torch.testing.assert_close(torch.cat(got, 1)[keep], m(x, mask=masks)[keep], rtol=0, atol=1e-12)
        assert not torch.cat(got, 1)[~keep].any()


@pytest.mark.parametrize("window", [None, 8])
def test_skipped_tokens_cost_keys_and_values_only(window):
    length = 2 * KEPT_CHUNK
    m, x = layer(window=window, kv_heads=2), inputs(length, 1)
    keep = torch.zeros(1, length, dtype=torch.bool)
    keep[0, KEPT_CHUNK + 50 : KEPT_CHUNK + 80] = True
    with torch.no_grad(), count_flops() as count:
        m(x, keep=keep)
    keys_and_values = length * 2 * (D * D // 2) * 2
    queries_and_output = 30 * 2 * D * D * 2
    # From the first kept token's window (or the start) to the last kept token.
    entries = KEPT_CHUNK + 80 if window is None else 30 + window - 1
    assert count.total == keys_and_values + queries_and_output + 2 * 2 * D * 30 * entries


def test_grouped_heads_are_shared_heads():
    grouped, full = layer(kv_heads=2), layer()
    with torch.no_grad():
        full.q_proj.weight.copy_(grouped.q_proj.weight)
        full.o_proj.weight.copy_(grouped.o_proj.weight)
        for theirs, ours in ((full.k_proj, grouped.k_proj), (full.v_proj, grouped.v_proj)):
            theirs.weight.copy_(ours.weight.view(2, D // HEADS, D).repeat_interleave(2, 0).flatten(0, 1))
    torch.testing.assert_close(grouped(inputs()), full(inputs()), rtol=0, atol=1e-13)


def test_qk_norm_makes_the_scale_of_the_keys_irrelevant():
    m, x = layer(qk_norm=True), inputs()
    before = m(x)
    with torch.no_grad():
        m.k_proj.weight.mul_(1000)
    # The norm's eps of 1e-6 is all that is left of the scale.
    torch.testing.assert_close(m(x), before, rtol=0, atol=1e-4)
    torch.testing.assert_close(m.q_norm.eps, 1e-6)


def test_initialisation_and_parameters():
    torch.manual_seed(0)
    m = Attention(128, heads=8, kv_heads=2, qk_norm=True)
    assert sum(p.numel() for p in m.parameters()) == 2 * 128 * 128 + 2 * 128 * 32 + 2 * 16
    assert not any("bias" in name for name, _ in m.named_parameters())
    for linear in (m.q_proj, m.k_proj, m.v_proj, m.o_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.weight.abs().max() > 0.06  # Normal, not uniform within 0.035.
    assert torch.equal(m.q_norm.weight, torch.ones(16))
    assert torch.equal(m.k_norm.weight, torch.ones(16))


def test_state_bytes_by_hand():
    m = Attention(32, heads=4, kv_heads=2, window=10)
    assert m.state_bytes(0) == 0
    assert m.state_bytes(7) == 2 * 2 * 8 * 7 * 4
    assert m.state_bytes(1000) == 2 * 2 * 8 * 10 * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "d_model 16 is not divisible by heads 3"),
        ({"heads": 0}, "d_model 16 is not divisible by heads 0"),
        ({"kv_heads": 3}, "heads 4 is not divisible by kv_heads 3"),
        ({"kv_heads": 0}, "heads 4 is not divisible by kv_heads 0"),
        ({"heads": 16}, "rotary positions need an even head width, not d_model / heads = 1"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"rope_base": 0.0}, "rope_base must be positive, got 0.0"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match="^" + message + "$"):
        layer(**settings)


def test_odd_heads_are_fine_without_rotation():
    assert layer(heads=16, rope=False)(inputs()).shape == (2, 9, D)


def test_what_a_state_refuses():
    m, x = layer(), inputs(4)
    with pytest.raises(ValueError, match="packed documents cannot be decoded"):
        m(x, state=m.init_state(2), segments=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="continues from its own init_state, not from a"):
        m(x, state=GatedLinearAttention(D, heads=2).init_state(2))
    both = layer(causal=False)
    with pytest.raises(ValueError, match="attention sees later tokens: it cannot decode with a state"):
        both(x, state=both.init_state(2))
