"""ParaGRU against its equations and ``nn.GRU``; what the layer adds to the cell is ParaLSTM's too, and tested for both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gatework.mixers import ParaGRU, ParaLSTM
from gatework.ops import newton

D, HEADS = 12, 3
BOTH = pytest.mark.parametrize("method", [ParaGRU, ParaLSTM])


def layer(method=ParaGRU, **settings):
    torch.manual_seed(0)
    m = method(D, **({"heads": HEADS} | settings)).double().eval()
    with torch.no_grad():
        m.recurrent_weight.normal_(0, 0.7)
        m.bias.add_(0.3 * torch.randn_like(m.bias))
        m.norm.weight.uniform_(0.5, 1.5)
    return m


def inputs(length: int = 21, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gates_of(m, x: Tensor) -> Tensor:
    """Projection, convolution over 4 tokens, SiLU, and the input weights of every head: (B, T, G, D)."""
    u, width = x @ m.x_proj.weight.T, D // HEADS
    rows = []
    for t in range(x.shape[1]):
        seen = sum(m.convolution.weight[:, 3 - back] * u[:, t - back] for back in range(4) if back <= t)
        rows.append(seen * torch.sigmoid(seen))
    u = torch.stack(rows, 1)
    gates = torch.zeros(*x.shape[:2], 3, D, dtype=x.dtype)
    for h in range(HEADS):
        own = slice(h * width, (h + 1) * width)
        for g in range(3):
            gates[:, :, g, own] = u[:, :, own] @ m.input_weight[h][:, g * width : (g + 1) * width]
    return gates + m.bias


def output_of(m, x: Tensor, h: Tensor) -> Tensor:
    gate = x @ m.g_proj.weight.T
    normed = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() * m.norm.weight
    return (normed * gate * torch.sigmoid(gate)) @ m.o_proj.weight.T


def reference(m: ParaGRU, x: Tensor) -> Tensor:
    gates, (a_z, a_r, a_c) = gates_of(m, x), m.recurrent_weight
    h, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        z = torch.sigmoid(a_z * h + gates[:, t, 0])
        r = torch.sigmoid(a_r * h + gates[:, t, 1])
        h = (1 - z) * h + z * torch.tanh(a_c * h * r + gates[:, t, 2])
        rows.append(h)
    return output_of(m, x, torch.stack(rows, 1))


def equal(m, x: Tensor, expected: Tensor) -> None:
    """The layer's output is ``expected``, and so are all gradients."""
    got = m(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [1, 3, 40, 150])
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_equals_the_equations_with_all_gradients(length, chunk):
    m, x = layer(chunk=chunk), inputs(length).requires_grad_()
    equal(m, x, reference(m, x))


def test_the_cell_is_a_gru_with_diagonal_weights():
    m, x = layer(), inputs(50)
    gru = nn.GRU(3 * D, D, batch_first=True).double()
    a_z, a_r, a_c = m.recurrent_weight
    with torch.no_grad():  # PyTorch's order is r, z, n, and its z keeps what ours lets go.
        gates = gates_of(m, x)
        gates[:, :, 0] *= -1
        for p in gru.parameters():
            p.zero_()
        for place, (gate, a) in enumerate(((1, a_r), (0, -a_z), (2, a_c))):
            own = slice(place * D, (place + 1) * D)
            gru.weight_ih_l0[own, gate * D : (gate + 1) * D] = torch.eye(D)
            gru.weight_hh_l0[own] = a.diag()
        expected = output_of(m, x, gru(gates.flatten(2))[0])
    torch.testing.assert_close(m(x), expected, rtol=0, atol=1e-11)


def test_initial_values():
    torch.manual_seed(0)
    m = ParaGRU(400, heads=2)
    assert m.recurrent_weight.std().item() == pytest.approx(2 / 2000**0.5, rel=0.05)
    assert m.input_weight.abs().max().item() == pytest.approx((6 / 600) ** 0.5, rel=1e-3)
    torch.testing.assert_close(m.bias[0], -torch.linspace(0, 1, 400), rtol=0, atol=0)
    assert not m.bias[1:].any()


@BOTH
@pytest.mark.parametrize("pieces", [[150], [1] * 150, [5, 0, 145], [129, 1, 20]])
@pytest.mark.parametrize("chunk", [None, 4])
def test_pieces_equal_whole(method, pieces, chunk):
    m, x = layer(method, chunk=chunk), inputs(150)
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(150)


@BOTH
def test_padding_and_documents_in_chunks(method):
    """Longer than the contract tests, so that there are chunks, with borders inside documents and padding."""
    m, x = layer(method), inputs(160, batch=3)
    real = torch.ones(3, 160, dtype=torch.bool)
    real[0, :50], real[1, 90:], real[2, ::3] = False, False, False
    segments = (torch.arange(160) // 71).expand(3, -1)
    got = m(x, mask=real, segments=segments)
    for row, seen, ids, y in zip(x, real, segments, got, strict=True):
        for document in range(3):
            own = seen & (ids == document)
            torch.testing.assert_close(y[own], m(row[own][None])[0], rtol=0, atol=1e-11)


@BOTH
def test_padding_alone_leaves_the_state(method):
    m, x = layer(method), inputs(9)
    state = m.init_state(2)
    with torch.no_grad():
        m(x, state=state)
        states, tail = state.states.clone(), state.tail.clone()
        m(x, state=state, mask=torch.zeros(2, 9, dtype=torch.bool))
    torch.testing.assert_close(state.states, states, rtol=0, atol=0)
    torch.testing.assert_close(state.tail, tail, rtol=0, atol=0)


@BOTH
def test_keep_skips_projections_and_leaves_the_state_whole(method):
    m, x = layer(method), inputs(32)
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
    torch.testing.assert_close(part.states, whole.states, rtol=0, atol=0)
    assert all_of_them.get_total_flops() - counter.get_total_flops() == int((~keep).sum()) * 2 * 2 * D * D


@BOTH
def test_flops_are_linear_in_length(method):
    m = layer(method)
    per_token = 2 * D * D * 3 + 2 * D * 3 * D // HEADS
    for length in (10, 300):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            m(inputs(length))
        assert counter.get_total_flops() == 2 * length * per_token


@BOTH
def test_a_fixed_number_of_iterations_is_for_training(method):
    m, exact, x = layer(method, iterations=1), layer(method), inputs(60)
    torch.testing.assert_close(m(x), exact(x), rtol=0, atol=1e-11)
    assert m.metrics.keys() == {"iterations"}
    m.train()
    y = m(x)
    assert m.metrics["iterations"] == 1
    assert m.metrics["residual"] > 1e-4
    assert (y - exact(x)).abs().max() > 1e-4
    torch.testing.assert_close(m(x, state=m.init_state(2)), exact(x), rtol=0, atol=1e-11)
    m.iterations = 10
    torch.testing.assert_close(m(x), exact(x), rtol=0, atol=1e-11)
    assert m.metrics["residual"] < 1e-14


@BOTH
def test_iterations_are_reported(method):
    m, x = layer(method, chunk=2), inputs(60)
    m(x)
    assert 1 <= m.metrics["iterations"] < newton.LIMIT
    with torch.no_grad():
        m.recurrent_weight.mul_(60)
    m(x)
    assert m.metrics["iterations"] == newton.LIMIT
    m.chunk = None
    m(x)
    assert m.metrics["iterations"] == 0


@BOTH
def test_extreme_weights_stay_finite(method):
    m, x = layer(method, chunk=4).float().train(), inputs(60).float().requires_grad_()
    with torch.no_grad():
        m.recurrent_weight.mul_(1e3)
        m.input_weight.mul_(1e3)
    for iterations in (None, 3):
        m.iterations = iterations
        y = m(x)
        assert y.isfinite().all()
        for p in torch.autograd.grad(y.sum(), [x, *m.parameters()]):
            assert p.isfinite().all()


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "d_model 12 is not divisible by heads 5"),
        ({"heads": 0}, "not divisible by heads 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"iterations": -1}, "iterations at least 0"),
        ({"conv_width": 0}, "width of a short convolution"),
    ],
)
def test_sizes_that_do_not_fit(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(D, **settings)


def test_learns_what_a_state_must_count():
    """The parity of 8 bits, which no step-free rule and no positive linear recurrence can keep."""
    torch.manual_seed(0)
    m, embed, head = ParaGRU(16), nn.Embedding(2, 16), nn.Linear(16, 2)
    optimizer = torch.optim.Adam([*m.parameters(), *embed.parameters(), *head.parameters()], 1e-2)
    for _ in range(300):
        bits = torch.randint(0, 2, (64, 8))
        loss = F.cross_entropy(head(m(embed(bits))).flatten(0, 1), (bits.cumsum(1) % 2).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
