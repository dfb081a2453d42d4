"""Gated positional self-attention against its equations, its convolution, its limits and its cache."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatework.core import PartError, capability, metrics
from gatework.core.cost import count_flops
from gatework.mixers import GPSA, Attention

from ..contracts import checks
from ..contracts.parts import GRID, Case

D = 12

FORMS = [
    {"heads": 3},
    {"heads": 2, "strength": 0.3},
    {"heads": 3, "causal": False},
    {"heads": 4, "causal": False, "grid": (2, 5)},
    {"heads": 4, "causal": False, "grid": (10, 1)},
    {"heads": 1, "causal": False, "grid": (5, 2)},
]
LENGTH = 10


def layer(**settings) -> GPSA:
    """A layer with weights at which every term matters."""
    torch.manual_seed(0)
    m = GPSA(D, **settings).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.35 * torch.randn_like(p))
    return m


def inputs(length: int = LENGTH, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def offsets(m: GPSA, t: int, s: int, real: list[int]) -> list[int]:
    """(dx, dy, dx^2 + dy^2) or (d, d^2) from token t to token s."""
    if m.grid is None:
        d = real.index(s) - real.index(t)
        return [d, d * d]
    columns = m.grid[1]
    dx, dy = s % columns - t % columns, s // columns - t // columns
    return [dx, dy, dx * dx + dy * dy]


def softmax(scores: list[Tensor]) -> Tensor:
    weights = torch.stack(scores).exp()
    return weights / weights.sum()


def equations(m: GPSA, x: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    """Head by head, query by query; rows of padded tokens are 0."""
    width = D // m.heads
    rows = []
    for b in range(len(x)):
        real = [t for t in range(x.shape[1]) if mask is None or mask[b, t]]
        outputs = [torch.zeros_like(x[b, 0])] * x.shape[1]
        for t in real:
            seen = [
                s for s in real
                if (not m.causal or s <= t) and (segments is None or segments[b, s] == segments[b, t])
            ]
            heads = []
            for h in range(m.heads):
                part = slice(h * width, (h + 1) * width)
                q = m.q_proj.weight[part] @ x[b, t]
                content = softmax([q @ (m.k_proj.weight[part] @ x[b, s]) / width**0.5 for s in seen])
                position = softmax([
                    sum(w * r for w, r in zip(m.position[h], offsets(m, t, s, real), strict=True)) for s in seen
                ])
                g = 1 / (1 + (-m.gate_logit[h]).exp())
                weights = (1 - g) * content + g * position
                heads.append(sum(w * (m.v_proj.weight[part] @ x[b, s]) for w, s in zip(weights, seen, strict=True)))
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


MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 1, 1, 1, 0]], dtype=torch.bool)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_equals_the_equations_with_all_gradients(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    assert_same_with_gradients(m, x, m(x), equations(m, x))


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_padding_takes_no_part_and_on_a_line_no_position(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    y = m(x, mask=MASK)
    assert y.isfinite().all()
    assert_same_with_gradients(m, x, y, equations(m, x, MASK), MASK)


@pytest.mark.parametrize("settings", [form for form in FORMS if "grid" not in form], ids=str)
def test_segments_are_separate_sequences(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    segments = torch.tensor([[0] * 4 + [1] * 6, [7] * 2 + [3] * 7 + [5]])
    assert_same_with_gradients(m, x, m(x, segments=segments), equations(m, x, segments=segments))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_kept_tokens_with_all_gradients(settings, masked):
    m, x = layer(**settings), inputs().requires_grad_()
    keep = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    mask = MASK if masked else None
    where = keep & MASK if masked else keep
    y = m(x, mask=mask, keep=where)
    assert not y[~where].any()
    assert_same_with_gradients(m, x, y, equations(m, x, mask), where)
    assert not m(x, keep=torch.zeros_like(keep)).any()


def maps(m: GPSA, length: int) -> Tensor:
    """R (H, T, T), read off values that are unit vectors."""
    values = torch.eye(length, dtype=torch.float64).expand(1, m.heads, length, length)
    return m._positional(length, None, values, None)[0]


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_the_positional_rows_are_distributions_and_do_not_look_at_content(settings):
    m = layer(**settings)
    found = maps(m, LENGTH)
    torch.testing.assert_close(found.sum(-1), torch.ones(m.heads, LENGTH, dtype=torch.float64), rtol=0, atol=1e-13)
    assert (found >= 0).all()
    places = torch.arange(LENGTH)[None]
    one_by_one = m._positional(LENGTH, places, torch.eye(LENGTH, dtype=torch.float64).expand(1, m.heads, -1, -1), None)[0]
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-13)
    if m.causal:
        assert not found.triu(1).any()
    # With the gates wide open only values are read: queries and keys get no gradient.
    with torch.no_grad():
        m.gate_logit.fill_(torch.inf)
    m(inputs()).sum().backward()
    assert not m.q_proj.weight.grad.any()
    assert m.v_proj.weight.grad.any()


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_closed_gates_are_plain_attention(settings):
    m, x = layer(**settings), inputs()
    plain = Attention(D, heads=m.heads, rope=False, causal=m.causal).double()
    weights = {name: p for name, p in m.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict(weights)
    with torch.no_grad():
        m.gate_logit.fill_(-torch.inf)
    torch.testing.assert_close(m(x), plain(x) + m.o_proj.bias, rtol=0, atol=1e-13)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_nine_heads_that_are_wide_open_and_sharp_are_a_convolution(grid):
    torch.manual_seed(1)
    width, (rows, columns) = 2, grid
    m = GPSA(9 * width, heads=9, causal=False, grid=grid, strength=400.0).double()
    with torch.no_grad():
        m.gate_logit.fill_(torch.inf)
        m.v_proj.weight.normal_()
        m.o_proj.weight.normal_()
    # Head j + 3 i copies the value in row j - 1, column i - 1: its blocks of W_o W_v are that tap of the kernel.
    taps = [
        m.o_proj.weight[:, h * width : (h + 1) * width] @ m.v_proj.weight[h * width : (h + 1) * width] for h in range(9)
    ]
    kernel = torch.stack(taps, -1).unflatten(-1, (3, 3)).transpose(-1, -2)
    x = torch.randn(2, rows * columns, 9 * width, dtype=torch.float64)
    # At the border the sharp softmax takes the nearest token there is, which is what padding by replication reads.
    picture = F.pad(x.transpose(1, 2).unflatten(2, grid), (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(picture, kernel).flatten(2).transpose(1, 2)
    torch.testing.assert_close(m(x), expected, rtol=0, atol=1e-11)


def test_it_starts_local():
    torch.manual_seed(0)
    m = GPSA(D, heads=4, causal=False, grid=(6, 6), strength=0.7)
    assert torch.equal(m.v_proj.weight, torch.eye(D))
    assert torch.equal(m.gates(), torch.full((4,), 1.0).sigmoid())
    assert not m.o_proj.bias.any()
    for linear in (m.q_proj, m.k_proj, m.o_proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.2)
    found = maps(m.double(), 36)
    for h, (c_x, c_y) in enumerate([(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5)]):
        t = 14  # Row 2, column 2.
        wanted = torch.tensor([
            -0.7 * ((s // 6 - 2 - c_y) ** 2 + (s % 6 - 2 - c_x) ** 2) for s in range(36)
        ], dtype=torch.float64).softmax(0)
        torch.testing.assert_close(found[h, t], wanted, rtol=0, atol=1e-7)
    line = maps(GPSA(D, heads=3).double(), 9)
    assert line[:, 6].argmax(-1).tolist() == [6, 5, 4]
    both = maps(GPSA(D, heads=3, causal=False).double(), 9)
    assert both[:, 4].argmax(-1).tolist() == [3, 4, 5]
    torch.testing.assert_close(both[0, 4], both[2, 4].flip(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[10], [1] * 10, [4, 6], [2, 1, 7]])
@pytest.mark.parametrize("masked", [False, True])
def test_pieces_equal_whole(pieces, masked):
    m, x = layer(heads=3), inputs()
    state, mask = m.init_state(2), MASK if masked else None
    masks = MASK.split(pieces, 1) if masked else [None] * len(pieces)
    with torch.no_grad():
        got = torch.cat([m(some, state=state, mask=real) for some, real in zip(x.split(pieces, 1), masks, strict=True)], 1)
        where = MASK if masked else torch.ones_like(MASK)
        torch.testing.assert_close(got[where], m(x, mask=mask)[where], rtol=0, atol=1e-12)


def test_positions_on_a_grid_cost_the_two_sides_and_not_the_square():
    m, (rows, columns) = GPSA(D, heads=4, causal=False, grid=(6, 8)), (6, 8)
    tokens = rows * columns
    plain = Attention(D, heads=4, rope=False, causal=False)
    with torch.no_grad(), count_flops() as ours:
        m(inputs(tokens).float())
    with torch.no_grad(), count_flops() as theirs:
        plain(inputs(tokens).float())
    assert ours.total - theirs.total == 2 * 2 * D * tokens * (rows + columns)


def test_far_places_and_extreme_weights_stay_finite():
    m = GPSA(D, heads=2)
    with torch.no_grad():
        m.position.mul_(1e4)
        m.gate_logit.copy_(torch.tensor([200.0, -200.0]))
    x = 1e3 * inputs(700).float().requires_grad_()
    y = m(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_a_batch_or_a_line_may_be_empty():
    for settings in ({"heads": 3}, {"heads": 3, "causal": False}):
        m = layer(**settings)
        for shape in ((0, 5, D), (2, 0, D)):
            assert m(torch.zeros(shape, dtype=torch.float64)).shape == shape
            assert m(torch.zeros(shape, dtype=torch.float64), keep=torch.zeros(shape[:2], dtype=torch.bool)).shape == shape
    m = layer(heads=4, causal=False, grid=(2, 5))
    assert m(torch.zeros(0, 10, D, dtype=torch.float64)).shape == (0, 10, D)


def test_the_gates_are_a_metric():
    m = layer(heads=3)
    m(inputs())
    torch.testing.assert_close(metrics(m)["gate"], torch.tensor([1 / (1 + math.exp(-v)) for v in m.gate_logit.tolist()]).double())


def test_what_it_can_do_depends_on_the_grid():
    line, both, grid = GPSA(D, heads=4), GPSA(D, heads=4, causal=False), GPSA(D, heads=4, causal=False, grid=(2, 3))
    names = ("causal", "decodes", "packs", "any_length")
    assert [[bool(capability(m, name)) for name in names] for m in (line, both, grid)] == [
        [True] * 4, [False, False, True, True], [False] * 4,
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "d_model 12 is not divisible by heads 5"),
        ({"heads": 4, "grid": (2, 3)}, "a grid has no order: give causal=False"),
        ({"heads": 3, "causal": False, "grid": (2, 3)}, "a square such as 4 or 9, not 3"),
        ({"heads": 4, "causal": False, "grid": (2, 0)}, r"both at least 1, not \(2, 0\)"),
        ({"heads": 4, "strength": 0.0}, "strength must be positive, got 0"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        GPSA(D, **settings)


def test_wrong_calls_meet_one_sentence():
    m, x = layer(heads=4, causal=False, grid=(2, 5)), inputs()
    with pytest.raises(PartError, match="2 x 5 = 10 tokens, not 9"):
        m(x[:, 1:])
    with pytest.raises(PartError, match=r"gpsa takes no segments \(no: a grid holds one picture\)"):
        m(x, segments=torch.zeros(2, 10, dtype=torch.long))
    with pytest.raises(PartError, match="cannot decode with a state"):
        m(x, state=m.init_state(2))


def test_a_classifier_gives_it_its_grid():
    from gatework.models import Classifier

    model = Classifier((1, 8, 4), 3, backbone="vit", d_model=16, heads=4, mixer="gpsa(causal=false)")
    assert [block.mixer.grid for block in model.blocks] == [(4, 2)] * 2
    y = model(torch.randn(2, 1, 8, 4))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if isinstance(p, nn.Parameter))


def test_contracts_on_a_grid():
    for check in (*checks.MODULE_CHECKS, checks.check_keep, checks.check_wrong_calls):
        check(Case(GPSA, {"heads": 4, "causal": False, "grid": GRID}))
