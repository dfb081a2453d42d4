"""Subspace self-attention against its equations, its symmetry, its cache of one projection, and the coding rate."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from gatework.core import PartError
from gatework.core.cost import count_flops
from gatework.mixers import Attention, CrateMSSA
from gatework.mixers.crate_mssa import coding_rate

D = 12
FORMS = [{"heads": 3}, {"heads": 12}, {"heads": 2, "causal": False}, {"heads": 1, "causal": False}]
CAUSAL = FORMS[:2]
LENGTH = 8
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1, 0]], dtype=torch.bool)


def layer(**settings) -> CrateMSSA:
    torch.manual_seed(0)
    m = CrateMSSA(D, **settings).double()
    for p in m.parameters():
        nn.init.normal_(p, std=0.4)
    return m


def inputs(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def equations(m: CrateMSSA, x: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    width = D // m.heads
    rows = []
    for b in range(len(x)):
        real = [t for t in range(x.shape[1]) if mask is None or mask[b, t]]
        w = {t: (m.subspaces.weight @ x[b, t]).view(m.heads, width) for t in real}
        outputs = [torch.zeros_like(x[b, 0])] * x.shape[1]
        for t in real:
            seen = [
                s for s in real if (not m.causal or s <= t) and (segments is None or segments[b, s] == segments[b, t])
            ]
            heads = []
            for h in range(m.heads):
                weights = torch.stack([w[t][h] @ w[s][h] / math.sqrt(width) for s in seen]).exp()
                heads.append(sum(a * w[s][h] for a, s in zip(weights / weights.sum(), seen, strict=True)))
            outputs[t] = m.o_proj.weight @ torch.cat(heads) + m.o_proj.bias
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


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
def test_equals_the_equations_with_all_gradients(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    assert_same_with_gradients(m, x, m(x), equations(m, x))
    assert_same_with_gradients(m, x, m(x, mask=MASK), equations(m, x, MASK), MASK)
    segments = torch.tensor([[0] * 3 + [1] * 5, [7] * 2 + [3] * 5 + [5]])
    assert_same_with_gradients(m, x, m(x, segments=segments), equations(m, x, segments=segments))


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_kept_tokens_with_all_gradients(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    keep = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 1, 0]], dtype=torch.bool)
    for mask in (None, MASK):
        where = keep if mask is None else keep & mask
        y = m(x, mask=mask, keep=where)
        assert not y[~where].any()
        assert_same_with_gradients(m, x, y, equations(m, x, mask), where)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_it_is_attention_whose_three_projections_are_one(settings):
    m, x = layer(**settings), inputs()
    plain = Attention(D, heads=m.heads, rope=False, causal=m.causal).double()
    with torch.no_grad():
        for linear in (plain.q_proj, plain.k_proj, plain.v_proj):
            linear.weight.copy_(m.subspaces.weight)
        plain.o_proj.weight.copy_(m.o_proj.weight)
    torch.testing.assert_close(m(x), plain(x) + m.o_proj.bias, rtol=0, atol=1e-13)
    assert sum(p.numel() for p in m.parameters()) == 2 * D * D + D
    ours = 2 * LENGTH * 2 * 2 * D * D
    with torch.no_grad(), count_flops() as count:
        m(x)
    with torch.no_grad(), count_flops() as theirs:
        plain(x)
    assert theirs.total - count.total == ours


def test_permuted_tokens_give_permuted_outputs():
    m, x = layer(heads=3, causal=False), inputs()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(m(x[:, order]), m(x)[:, order], rtol=0, atol=1e-13)


def test_its_scores_are_symmetric():
    """The scores of two tokens for each other are one number."""
    m, x = layer(heads=3, causal=False), inputs()
    w = m.projected(x)
    scores = w @ w.transpose(-1, -2) / math.sqrt(D // 3)
    torch.testing.assert_close(scores, scores.transpose(-1, -2), rtol=0, atol=1e-14)
    heads = (scores.exp() / scores.exp().sum(-1, keepdim=True)) @ w
    torch.testing.assert_close(m.o_proj(heads.transpose(1, 2).flatten(2)), m(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[8], [1] * 8, [3, 5], [2, 1, 5]])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", CAUSAL, ids=str)
def test_pieces_equal_whole_with_a_cache_of_one_projection(settings, masked, pieces):
    m, x = layer(**settings), inputs()
    where = MASK if masked else torch.ones_like(MASK)
    masks = MASK.split(pieces, 1) if masked else [None] * len(pieces)
    for grad in (False, True):
        state = m.init_state(2)
        with torch.set_grad_enabled(grad):
            got = [m(some, state=state, mask=real) for some, real in zip(x.split(pieces, 1), masks, strict=True)]
        torch.testing.assert_close(torch.cat(got, 1)[where], m(x, mask=MASK if masked else None)[where], rtol=0, atol=1e-12)
        assert state.values is state.keys
        if not masked:
            assert state.nbytes == 2 * m.state_bytes(LENGTH)


def test_the_cache_is_half_of_attentions_and_stays_one_tensor():
    m = layer(heads=3)
    assert 2 * m.state_bytes(5) == Attention(D, heads=3, rope=False).double().state_bytes(5)
    state = m.init_state(2)
    with torch.no_grad():
        m(inputs(5), state=state)
        m(inputs(1), state=state, mask=torch.tensor([[True], [False]]))
        wanted = m(inputs(2), state=copy.deepcopy(state))
        for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
            assert other.values is other.keys
            torch.testing.assert_close(m(inputs(2), state=other), wanted, rtol=0, atol=0)
        state.reorder(torch.tensor([1, 0, 0]))
        assert state.values is state.keys
        assert state.batch_size == 3
        swapped = inputs(2)[torch.tensor([1, 0, 0])]
        torch.testing.assert_close(m(swapped, state=state), wanted[torch.tensor([1, 0, 0])], rtol=0, atol=1e-13)
        state.make_room(100)
        assert state.values is state.keys


@pytest.mark.parametrize(("count", "width"), [(7, 4), (4, 7), (5, 5)])
def test_the_coding_rate_is_its_formula(count, width):
    z = torch.randn(3, count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for eps in (0.1, 0.7):
        for tokens, rate in zip(z, coding_rate(z, eps), strict=True):
            singular = torch.linalg.svdvals(tokens)
            wanted = 0.5 * torch.log1p(width / (count * eps**2) * singular.square()).sum()
            assert rate.item() == pytest.approx(wanted.item(), abs=1e-11)
    turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(6))).Q
    torch.testing.assert_close(coding_rate(z @ turn), coding_rate(z), rtol=0, atol=1e-11)
    torch.testing.assert_close(coding_rate(z.flip(1)), coding_rate(z), rtol=0, atol=1e-11)
    same = z[:, :1].expand_as(z)
    assert (coding_rate(same) < coding_rate(z)).all()
    assert not coding_rate(0 * z).any()


def test_a_layers_coding_rate_is_the_sum_over_its_subspaces():
    m, x = layer(heads=3), inputs()
    w = (x @ m.subspaces.weight.T).unflatten(-1, (3, 4))
    wanted = sum(coding_rate(w[:, :, h] / w[:, :, h].norm(dim=-1, keepdim=True), 0.2) for h in range(3))
    torch.testing.assert_close(m.coding_rate(x, 0.2), wanted, rtol=0, atol=1e-11)


def test_with_its_own_subspaces_behind_it_a_step_compresses():
    """As derived: with W_o = U^T, orthogonal subspaces and tokens near a few directions of each, x + y has a lower rate."""
    torch.manual_seed(0)
    m = CrateMSSA(D, heads=3, causal=False).double()
    with torch.no_grad():
        m.subspaces.weight.copy_(torch.linalg.qr(torch.randn(D, D, dtype=torch.float64)).Q)
        m.o_proj.weight.copy_(m.subspaces.weight.T)
        codes = torch.zeros(2, 40, D, dtype=torch.float64)
        codes[..., ::4] = 3 * torch.randn(2, 40, 3, dtype=torch.float64).sign()
        x = (codes + 0.3 * torch.randn_like(codes)) @ m.subspaces.weight
        assert (m.coding_rate(x + m(x), 0.3) < m.coding_rate(x, 0.3)).all()


def test_its_start():
    torch.manual_seed(0)
    m = CrateMSSA(64, heads=4)
    for linear in (m.subspaces, m.o_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not m.o_proj.bias.any()


def test_wrong_calls_meet_one_sentence():
    with pytest.raises(ValueError, match="d_model 12 is not divisible by heads 5"):
        CrateMSSA(D, heads=5)
    m = layer(heads=3, causal=False)
    with pytest.raises(PartError, match="cannot decode with a state"):
        m(inputs(), state=m.init_state(2))
    with pytest.raises(PartError, match="own init_state"):
        layer(heads=3)(inputs(), state=Attention(D, heads=3).double().init_state(2))
