"""Recurrences solved by Newton's method against the loop, for both cells."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gatework.mixers.paragru import GRUCell
from gatework.mixers.paralstm import LSTMCell
from gatework.ops import newton
from gatework.ops.newton import newton_recurrence

CELLS = pytest.mark.parametrize("cell", [GRUCell, LSTMCell], ids=["gru", "lstm"])


def gru_step(state: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    (h,), (a_z, a_r, a_c) = state, weight
    z = torch.sigmoid(a_z * h + gates[:, 0])
    r = torch.sigmoid(a_r * h + gates[:, 1])
    c = torch.tanh(a_c * h * r + gates[:, 2])
    return ((1 - z) * h + z * c)[None]


def lstm_step(state: Tensor, gates: Tensor, weight: Tensor) -> Tensor:
    (c, h), (a_f, a_g, a_o, p_f, p_o) = state, weight
    f = torch.sigmoid(a_f * h + p_f * c + gates[:, 0])
    g = torch.tanh(a_g * h + gates[:, 1])
    c = f * c + (1 - f) * g
    o = torch.sigmoid(a_o * h + p_o * c + gates[:, 2])
    return torch.stack([c, o * torch.tanh(c)])


STEPS = {GRUCell: gru_step, LSTMCell: lstm_step}


def loop(cell, gates: Tensor, weight: Tensor, state: Tensor, segments: Tensor | None = None) -> Tensor:
    rows = []
    for t in range(gates.shape[1]):
        if segments is not None and t:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None]
        state = STEPS[cell](state, gates[:, t], weight)
        rows.append(state)
    return torch.stack(rows, 2)


def inputs(cell, length: int, scale: float = 1.0, batch: int = 2, width: int = 3, dtype=torch.float64) -> list[Tensor]:
    """Gates, weight, state, with their gradients recorded."""
    torch.manual_seed(length)
    gates = torch.randn(batch, length, 3, width, dtype=dtype)
    weight = scale * torch.randn(cell.weights, width, dtype=dtype)
    return [x.requires_grad_() for x in (gates, weight, torch.rand(cell.states, batch, width, dtype=dtype) - 0.5)]


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@CELLS
@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 8, 200])
@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("packed", [False, True])
def test_equals_the_loop_with_all_gradients(cell, chunk, length, scale, packed):
    xs = inputs(cell, length, scale)
    segments = torch.randint(0, 4, (2, length)).sort(1)[0] if packed else None
    expected = loop(cell, *xs, segments)
    got, _, residual = newton_recurrence(cell, *xs, segments=segments, chunk=chunk)
    close(got, expected)
    assert residual < 1e-14
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, xs, upstream)
    for a, b in zip(torch.autograd.grad(got, xs, upstream), wanted, strict=True):
        close(a, b, 1e-10)


@CELLS
@pytest.mark.parametrize("chunk", [1, 3])
def test_many_borders_and_short_stretches(cell, chunk, monkeypatch):
    """Above 128 borders these are scanned in parallel; element-wise work takes some steps at once, the last time fewer."""
    monkeypatch.setattr(newton, "STRETCH", 2 * 6 * 200)
    xs = inputs(cell, 500 if chunk == 3 else 170, 0.8)
    expected, (got, _, _) = loop(cell, *xs), newton_recurrence(cell, *xs, chunk=chunk)
    close(got, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, xs, upstream)
    for a, b in zip(torch.autograd.grad(got, xs, upstream), wanted, strict=True):
        close(a, b, 1e-10)
    monkeypatch.setattr(newton, "STRETCH", 5 * xs[0][:, 0, 0].numel())
    got, _, _ = newton_recurrence(cell, *xs, chunk=len(xs[0][0]))
    for a, b in zip(torch.autograd.grad(got, xs, upstream), wanted, strict=True):
        close(a, b, 1e-10)


@CELLS
@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_chunks_longer_than_the_first_guess_looks_back(cell, scale):
    xs = inputs(cell, 230, scale)
    segments = torch.stack([torch.arange(230) // 97, torch.arange(230) // 140])
    expected = loop(cell, *xs, segments)
    got, _, _ = newton_recurrence(cell, *xs, segments=segments, chunk=newton.WARM + 9)
    close(got, expected)
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, xs, upstream)
    for a, b in zip(torch.autograd.grad(got, xs, upstream), wanted, strict=True):
        close(a, b, 1e-10)


@CELLS
@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_gradcheck(cell, chunk):
    xs = inputs(cell, 6, width=1)
    segments = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, 4, 4]])
    assert torch.autograd.gradcheck(lambda *xs: newton_recurrence(cell, *xs, segments=segments, chunk=chunk)[0], xs)


@CELLS
def test_jacobians_are_those_of_autograd(cell):
    gates, weight, state = (x.detach() for x in inputs(cell, 1, batch=1, width=4))
    wanted = torch.func.jacrev(lambda s: STEPS[cell](s[:, None], gates[:, 0], weight)[:, 0])(state[:, 0])
    states, values, _, _ = newton._solve(cell.name, gates, weight, state, None, 1, -1)
    after = states.permute(2, 0, 1, 3)[:, :, None]
    ((_, jacobian, _),) = newton._linearised(cell, weight, state[None, :, None], after, values, None)
    for i in range(cell.states):
        for j in range(cell.states):
            close(jacobian[0, i, j, 0, 0].diag(), wanted[i, :, j])  # Diagonal in the channels, and these are its entries.


@CELLS
def test_each_iteration_makes_one_more_step_exact(cell):
    """Whatever the weights: after k iterations of the paper's method the first k + 2 states, the evaluation at the end included."""
    xs = [x.detach() for x in inputs(cell, 24, scale=4.0)]
    expected = loop(cell, *xs)
    for k in (0, 1, 3, 6):
        got, done, residual = newton_recurrence(cell, *xs, chunk=1, iterations=k)
        assert done == k
        close(got[:, :, : k + 2], expected[:, :, : k + 2])
        assert (got - expected).abs().max() > 1e-6
        assert residual > 1e-6
    close(newton_recurrence(cell, *xs, chunk=1, iterations=22)[0], expected)


@CELLS
def test_the_error_is_squared_by_every_iteration(cell):
    xs = [x.detach() for x in inputs(cell, 24, scale=0.8, width=16)]
    expected = loop(cell, *xs)
    errors = [(newton_recurrence(cell, *xs, chunk=1, iterations=k)[0] - expected).abs().max().item() for k in range(6)]
    assert errors[0] > 0.1
    assert errors[-1] < 1e-10
    assert all(after <= max(10 * before**2, 1e-13) for before, after in pairwise(errors))


def newton_by_hand(cell, gates: Tensor, weight: Tensor, state: Tensor, iterations: int) -> Tensor:
    """The paper's method with the whole system of equations as one matrix; one sequence of one channel."""
    length, states = gates.shape[1], cell.states

    def stepped(before: Tensor) -> Tensor:
        return torch.stack([STEPS[cell](b[:, None, None], gates[:, t], weight)[:, 0, 0] for t, b in enumerate(before)])

    def residual(flat: Tensor) -> Tensor:
        s = flat.view(length, states)
        return (s - stepped(torch.cat([state[None, :, 0, 0], s[:-1]]))).flatten()

    first = torch.cat([state[None, :, 0, 0], state.new_zeros(length - 1, states)])
    s = stepped(first).flatten()
    for _ in range(iterations):
        s = s - torch.linalg.solve(torch.autograd.functional.jacobian(residual, s), residual(s))
    return s - residual(s)


@CELLS
@pytest.mark.parametrize("iterations", [0, 1, 2, 3])
def test_chunks_of_one_step_are_the_papers_method(cell, iterations):
    xs = [x.detach() for x in inputs(cell, 12, 0.8, batch=1, width=1)]
    got, _, _ = newton_recurrence(cell, *xs, chunk=1, iterations=iterations)
    wanted = newton_by_hand(cell, *xs, iterations)
    close(got[:, 0, :, 0].T.flatten(), wanted)


@CELLS
def test_without_recurrent_weights_one_iteration_is_exact(cell):
    gates, weight, state = (x.detach() for x in inputs(cell, 20))
    weight = weight * 0
    expected = loop(cell, gates, weight, state)
    close(newton_recurrence(cell, gates, weight, state, chunk=1, iterations=1)[0], expected, 1e-14)
    assert (newton_recurrence(cell, gates, weight, state, chunk=1, iterations=0)[0] - expected).abs().max() > 1e-2
    _, done, _ = newton_recurrence(cell, gates, weight, state, chunk=1)
    assert done == cell.states  # h = o tanh(c) is not linear in c before the last evaluation.


@CELLS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_newton_cannot_solve_is_stepped(cell, dtype):
    """Weights of 40 make Jacobians whose products overflow float32, and a chaotic system."""
    xs = inputs(cell, 60, scale=40.0, width=8, dtype=dtype)
    got, done, residual = newton_recurrence(cell, *xs, chunk=2)
    stepped, none, _ = newton_recurrence(cell, *xs, chunk=60)
    rounding = 100 * torch.finfo(dtype).eps
    assert done == newton.LIMIT
    assert none == 0
    assert residual < rounding
    close(got, stepped, rounding)
    for x in torch.autograd.grad(got.square().sum(), xs):
        assert x.isfinite().all()


@CELLS
def test_extreme_gates(cell):
    gates, weight, state = inputs(cell, 40)
    gates = (1e4 * gates.detach()).requires_grad_()
    got, _, _ = newton_recurrence(cell, gates, weight, state, chunk=4)
    close(got, loop(cell, gates, weight, state))
    for x in torch.autograd.grad(got.sum(), (gates, weight, state)):
        assert x.isfinite().all()


def test_a_chunk_that_forgets_needs_no_iteration():
    """Update gates of one half: 64 steps halve what they started from 64 times."""
    gates, weight, state = (x.detach() for x in inputs(GRUCell, 600, 0.0))
    gates[:, :, 0] = 0
    _, done, _ = newton_recurrence(GRUCell, gates, weight, state, chunk=64)
    assert done == 0
    assert newton_recurrence(GRUCell, gates, weight, state, chunk=4)[1] == 1


@CELLS
def test_float32_is_as_good_as_float32_steps(cell):
    xs = [x.detach() for x in inputs(cell, 400, 0.7, width=20)]
    exact = loop(cell, *xs)
    singles = [x.float() for x in xs]
    stepped = (loop(cell, *singles) - exact).abs().max()
    ours = (newton_recurrence(cell, *singles, chunk=16)[0] - exact).abs().max()
    assert ours < max(4 * stepped, 4e-6)


@CELLS
def test_half_precision_is_computed_in_float32(cell):
    gates, weight, state = (x.detach() for x in inputs(cell, 30))
    halves = [x.bfloat16() for x in (gates, weight)]
    got, _, _ = newton_recurrence(cell, *halves, state.float(), chunk=4)
    assert got.dtype == torch.float32
    wanted, _, _ = newton_recurrence(cell, *(x.float() for x in halves), state.float(), chunk=4)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(newton_recurrence(cell, *halves, state.float(), chunk=4)[0], wanted, rtol=0, atol=0)


@CELLS
def test_channels_in_heads_and_a_missing_state(cell):
    gates, weight, _ = inputs(cell, 50, width=6)
    flat, _, _ = newton_recurrence(cell, gates, weight, chunk=7)
    headed, _, _ = newton_recurrence(cell, gates.unflatten(-1, (2, 3)), weight.unflatten(-1, (2, 3)), chunk=7)
    assert headed.shape == (cell.states, 2, 50, 2, 3)
    torch.testing.assert_close(headed.flatten(-2), flat, rtol=0, atol=0)
    upstream = torch.randn_like(flat)
    wanted = torch.autograd.grad(flat, (gates, weight), upstream)
    for a, b in zip(torch.autograd.grad(headed.flatten(-2), (gates, weight), upstream), wanted, strict=True):
        close(a, b)


@CELLS
def test_nothing_to_do(cell):
    for shape in ((2, 0, 3, 4), (0, 5, 3, 4)):
        gates = torch.zeros(shape, requires_grad=True)
        weight = torch.ones(cell.weights, 4, requires_grad=True)
        states, done, residual = newton_recurrence(cell, gates, weight)
        assert states.shape == (cell.states, shape[0], shape[1], 4)
        assert done == residual == 0
        assert not any(x.any() for x in torch.autograd.grad(states.sum(), (gates, weight)))


def test_chunks_are_chosen_by_size():
    def chosen(batch, length, width):
        return newton._chunk_length(torch.empty(batch, length, 3, width))

    assert chosen(1, 1, 8) == 1
    assert chosen(2, 255, 64) == 255  # Too short for chunks: the loop.
    assert chosen(2, 1024, 64) == 64
    assert chosen(2, 65536, 64) == 256
    assert chosen(2, 4096, 256) == 64
    assert chosen(16, 4096, 256) == 4096  # Wide enough for the loop.
    assert newton._chunk_length(torch.empty(2, 4096, 3, 256, device="meta")) == 16


@pytest.mark.parametrize("settings", [{"chunk": 0}, {"iterations": -1}])
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="chunk must be at least 1 and iterations at least 0"):
        newton_recurrence(GRUCell, *inputs(GRUCell, 4), **settings)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gates": (2, 5, 2, 4)}, r"gates \(B, T, 3, \*channels\) .*, not \(2, 5, 2, 4\) and \(3, 4\)"),
        ({"gates": (2, 5, 3), "weight": (3,)}, r"not \(2, 5, 3\) and \(3,\)"),
        ({"weight": (4, 4)}, r"weights \(3, \*channels\) .* and \(4, 4\)"),
        ({"weight": (3, 1)}, r"not \(2, 5, 3, 4\) and \(3, 1\)"),
        ({"state": (1, 1, 4)}, r"the state is \(1, 2, 4\), not \(1, 1, 4\)"),
        ({"segments": (1, 5)}, r"segments are \(B, T\) = \(2, 5\), not \(1, 5\)"),
        ({"segments": (2, 4)}, r"not \(2, 4\)"),
    ],
)
def test_sizes_that_are_not_the_cells(unchecked, wrong, message):
    shapes = {"gates": (2, 5, 3, 4), "weight": (3, 4)} | wrong
    with pytest.raises(ValueError, match=message):
        newton_recurrence(GRUCell, **{name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.compile
@CELLS
def test_compiled_with_chunks_and_documents(cell):
    """The number of iterations is data; a compiled graph gives the same numbers with any."""
    torch._dynamo.reset()
    run = torch.compile(lambda *xs, s: newton_recurrence(cell, *xs, segments=s, chunk=8), fullgraph=True, backend="aot_eager")
    for scale in (0.1, 1.0, 40.0):
        xs = inputs(cell, 60, scale)
        segments = torch.arange(60).expand(2, -1) // 23
        got, wanted = run(*xs, s=segments), newton_recurrence(cell, *xs, segments=segments, chunk=8)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        ours, theirs = (torch.autograd.grad(states.square().sum(), xs) for states, _, _ in (got, wanted))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
