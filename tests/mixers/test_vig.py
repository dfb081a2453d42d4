"""Bidirectional gated linear attention against its equations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatework.core import PartError, capability
from gatework.mixers import BidirectionalGLA2d
from gatework.models import Classifier

D, HEADS, GRID = 16, 2, (4, 5)


def layer(**settings) -> BidirectionalGLA2d:
    torch.manual_seed(0)
    m = BidirectionalGLA2d(D, **({"heads": HEADS} | settings)).double()
    with torch.no_grad():  # The start's gain is small, and its biases are 0.
        for p in m.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return m


def inputs(length: int = 20) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def local(m, x):
    """The convolution, tap by tap."""
    batch, length, _ = x.shape
    y = torch.zeros_like(x)
    if m.grid is None:
        for t in range(length):
            for tap in range(3):
                if 0 <= t + tap - 1 < length:
                    y[:, t] += m.convolution[:, 0, tap] * x[:, t + tap - 1]
    else:
        rows, columns = m.grid
        picture, y = x.view(batch, rows, columns, D), y.view(batch, rows, columns, D)
        for i in range(rows):
            for j in range(columns):
                for di in range(3):
                    for dj in range(3):
                        if 0 <= i + di - 1 < rows and 0 <= j + dj - 1 < columns:
                            y[:, i, j] += m.convolution[:, 0, di, dj] * picture[:, i + di - 1, j + dj - 1]
        y = y.view(batch, length, D)
    return y * torch.sigmoid(y)


def one_way(q, k, v, decay, order):
    state, outputs = q.new_zeros(*q.shape[:1], HEADS, k.shape[-1], v.shape[-1]), {}
    for t in order:
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs[t] = torch.einsum("bhk,bhkv->bhv", q[:, t], state) * k.shape[-1] ** -0.5
    return torch.stack([outputs[t] for t in range(q.shape[1])], 1)


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def reference(m: BidirectionalGLA2d, x: torch.Tensor) -> torch.Tensor:
    def heads(y):
        return y.unflatten(-1, (HEADS, -1))

    c = local(m, x)
    q, k, v = (heads(c @ linear.weight.T) for linear in (m.q_proj, m.k_proj, m.v_proj))
    logits = (c @ m.decay_in.weight.T) @ m.decay_out.weight.T + m.decay_out.bias
    forth, back = (heads(a) for a in (torch.sigmoid(logits) ** (1 / m.normalizer)).chunk(2, -1))
    length = range(x.shape[1])
    o = (one_way(q, k, v, forth, length) + one_way(q, k, v, back, reversed(length))) / 2
    g = heads(torch.sigmoid(c @ m.g_proj.weight.T + m.g_proj.bias))
    y = g * rms_norm(o, m.norm.weight) + (1 - g) * rms_norm(heads(c), m.local_norm.weight)
    return y.flatten(2) @ m.o_proj.weight.T


CASES = [({}, 1), ({}, 2), ({}, 21), ({}, 65), ({"expand_k": 1.0, "normalizer": 2.0, "chunk": 8}, 20), ({"grid": GRID}, 20),
         ({"grid": (1, 7)}, 7), ({"grid": (7, 1)}, 7)]


@pytest.mark.parametrize(("settings", "length"), CASES)
def test_equals_the_equations_with_all_gradients(settings, length):
    m, x = layer(**settings), inputs(length).requires_grad_()
    got, expected = m(x), reference(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"grid": GRID}])
def test_reversed_with_the_decays_exchanged_is_the_reverse(settings):
    m, other, x = layer(**settings), layer(**settings), inputs()
    with torch.no_grad():
        half = len(m.decay_out.bias) // 2
        other.convolution.copy_(m.convolution.flip(*range(2, m.convolution.dim())))
        other.decay_out.weight.copy_(m.decay_out.weight.roll(half, 0))
        other.decay_out.bias.copy_(m.decay_out.bias.roll(half, 0))
    torch.testing.assert_close(other(x.flip(1)).flip(1), m(x), rtol=0, atol=1e-12)


def test_a_gate_of_one_half_averages_the_normed_branches():
    m, x = layer(), inputs()
    with torch.no_grad():
        m.g_proj.weight.zero_()
        m.g_proj.bias.zero_()
        half = m(x)
        m.g_proj.bias.fill_(1e3)
        read = m(x)
        m.g_proj.bias.fill_(-1e3)
        own = m(x)
    torch.testing.assert_close(half, (read + own) / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        own, m.o_proj(rms_norm(local(m, x).unflatten(-1, (HEADS, -1)), m.local_norm.weight).flatten(2)), rtol=0, atol=1e-12
    )


def test_without_decay_every_token_reads_the_whole_and_itself_once_more():
    m, x = layer(), inputs()
    with torch.no_grad():
        m.decay_out.weight.zero_()
        m.decay_out.bias.fill_(1e4)
        m.g_proj.bias.fill_(1e4)  # Only what the recurrences have read.
    c = local(m, x)
    q, k, v = (linear(c).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (m.q_proj, m.k_proj, m.v_proj))
    scores = q @ k.mT * k.shape[-1] ** -0.5
    o = (scores + scores * torch.eye(20, dtype=torch.float64)) @ v / 2
    wanted = m.o_proj(rms_norm(o.transpose(1, 2), m.norm.weight).flatten(2))
    torch.testing.assert_close(m(x), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("settings", [{}, {"grid": GRID}])
def test_every_token_sees_every_token(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    y = m(x)
    for t in (0, 7, 19):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad.abs().amax(-1) > 0).all()


def test_padding_takes_no_place_in_a_sequence():
    m, x = layer(), inputs(9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)
    y = m(x, mask=mask)
    for i in range(2):
        torch.testing.assert_close(y[i][mask[i]], m(x[i][mask[i]][None])[0], rtol=0, atol=1e-12)


def test_padding_on_a_grid_keeps_its_place_and_is_nothing():
    m, x = layer(grid=GRID), inputs()
    mask = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) < 0.7
    y = m(x, mask=mask)
    torch.testing.assert_close(m(torch.where(mask[..., None], x, 1e3), mask=mask)[mask], y[mask], rtol=0, atol=0)
    # The same by zeroing the convolution's output there, which leaves neither key nor value, and the decay by hand.
    c = local(m, x * mask[..., None]) * mask[..., None]
    q, k, v = (linear(c).unflatten(-1, (HEADS, -1)) for linear in (m.q_proj, m.k_proj, m.v_proj))
    decays = torch.sigmoid(m.decay_out(m.decay_in(c))) ** (1 / m.normalizer)
    forth, back = (a.unflatten(-1, (HEADS, -1)) for a in torch.where(mask[..., None], decays, 1).chunk(2, -1))
    o = (one_way(q, k, v, forth, range(20)) + one_way(q, k, v, back, reversed(range(20)))) / 2
    torch.testing.assert_close(m.output(o, c)[mask], y[mask], rtol=0, atol=1e-11)


def test_packed_documents_equal_separate():
    m, x = layer(), inputs(20)
    segments = torch.tensor([[4] * 1 + [2] * 12 + [3] * 7]).expand(2, -1)
    packed = m(x, segments=segments)
    for start, end in ((0, 1), (1, 13), (13, 20)):
        torch.testing.assert_close(packed[:, start:end], m(x[:, start:end]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"grid": GRID}])
def test_keep_skips_queries_gates_and_outputs(settings):
    m, x = layer(**settings), inputs(20)
    keep = torch.rand(2, 20, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        full = m(x)
        with FlopCounterMode(display=False) as counter:
            kept = m(x, keep=keep)
        with FlopCounterMode(display=False) as every:
            m(x)
    torch.testing.assert_close(kept, full * keep[..., None], rtol=0, atol=1e-12)
    assert every.get_total_flops() - counter.get_total_flops() == int((~keep).sum()) * 2 * D * (D // 2 + 2 * D)


def test_the_start():
    torch.manual_seed(0)
    m = BidirectionalGLA2d(64, heads=4, grid=(8, 8))
    gain = 2**-2.5
    for linear in (m.q_proj, m.v_proj, m.g_proj, m.decay_out, m.o_proj):
        bound = gain * (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    bound = gain * (6 / (9 + 9 * 64)) ** 0.5
    assert 0.95 * bound < m.convolution.abs().max() <= bound
    assert not m.decay_out.bias.any()
    assert not m.g_proj.bias.any()


@pytest.mark.parametrize("settings", [{}, {"grid": GRID}])
def test_autocast_is_finite_and_near(settings):
    m, x = layer(**settings).float(), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    torch.testing.assert_close(y.float(), m(x), rtol=0.1, atol=0.1)


def test_a_grid_fixes_the_length():
    m = layer(grid=GRID)
    assert not capability(m, "any_length")
    assert not capability(m, "packs")
    assert capability(layer(), "any_length")
    with pytest.raises(PartError, match="built for 20 tokens, a grid of 4 x 5, not for 19"):
        m(inputs(19))
    with pytest.raises(PartError, match="takes no segments"):
        m(inputs(20), segments=torch.zeros(2, 20, dtype=torch.long))


def test_it_cannot_decode():
    m = layer()
    for ask in (lambda: m.init_state(2), lambda: m.state_bytes(100)):
        with pytest.raises(PartError, match="vig sees later tokens: it has no decoding state"):
            ask()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "not divisible by heads 3"),
        ({"expand_k": 0.05}, "expand_k 0.05"),
        ({"grid": (0, 4)}, "rows, columns"),
        ({"chunk": 48}, "power of two"),
        ({"normalizer": 0.0}, "normalizer positive"),
    ],
)
def test_sizes_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 12)])
def test_a_classifier_gives_it_the_grid_and_learns(shape):
    torch.manual_seed(0)
    model = Classifier(shape, 4, backbone="vit", d_model=16, heads=2, mixer="vig")
    assert model.blocks[0].mixer.grid == ((4, 4) if len(shape) == 3 else None)
    x, y = torch.randn(8, *shape), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(-1) == y).all()
