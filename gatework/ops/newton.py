"""Nonlinear recurrences ``s_t = f(s_{t-1}, x_t)`` whose Jacobian acts on each channel alone, solved for all t side by side.

Danieli et al., ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models, 2025, arXiv 2510.21450, writes the
recurrence as one system of equations, F_t = s_t - f(s_{t-1}, x_t) = 0 for t = 1 .. T, and solves it by Newton's method: each
iteration is a linear recurrence, delta_t = J_t delta_{t-1} - F_t with J_t = df/ds at s_{t-1}, which a parallel reduction solves.

Here the unknowns are the states at the borders of chunks (multiple shooting). All chunks are stepped side by side from the present
guesses of their first states, which gives each chunk's end and, where it is needed, the product of its Jacobians; the same linear
recurrence over the borders then moves the guesses. Chunks of one step are the paper's method, one chunk is the plain loop. In
between, a chunk forgets most of what its first state was, so that few iterations are needed, often none: the first guess of a
chunk's first state is what the last steps of the chunk before it make of 0 (for chunks of one step f(0, x_t), as in the paper), and
Jacobians are only computed where that was not enough. The error is squared by every iteration, and after k of them the first k + 1
chunks are exact whatever the weights.

Iterations stop when no border moves by more than :data:`ROUNDING` units of rounding. After :data:`LIMIT` of them the loop steps
through what Newton's method could not solve, so that the result is always the recurrence's. A guess out of the states' bounds is
moved to them, which brings it nearer to the solution. The paper iterates three times whatever the residual (``iterations=3,
chunk=1``) and takes the last guess; here the cell is evaluated at it once more, which gives the residual too.

The backward pass does not differentiate the iterations: adjoints come from one linear recurrence from behind with the transposed
Jacobians at the solution, and a :class:`Cell` gives the rest in closed form.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatework.ops.precision import without_autocast
from gatework.ops.scan import associative_scan

#: Iterations end when the residual is at most this many units of rounding: states are of the order of 1.
ROUNDING = 16
#: Iterations after which a recurrence is stepped instead.
LIMIT = 8
#: Elements of one step of all chunks, about: enough to hide what calling an operation costs, few enough for the caches.
STEP = 2**15
#: The same where steps need not wait for each other and are taken some at once.
STRETCH = 2**16
#: Elements of one time step from which on the loop is faster than chunks, which do all at least twice.
WIDE = 2**12
#: Shorter chunks forget too little of their first state, and need more iterations.
SHORTEST = 64
#: Steps of a chunk, its last, that the first guess of its end is made of.
WARM = 64


class Cell(ABC):
    """A recurrent cell ``s_t = f(s_{t-1}, gates_t)`` of S states and G gates per channel, channels apart, with its derivatives.

    One gate passes a tanh, computed as 2 sigmoid(2a) - 1 (which is several times as fast on a CPU and differs by a unit of rounding
    of 1): the solver doubles this gate's input and weights beforehand, wherever the cell says ``doubled``.

    Arrays are (steps, rows, n, B, D), for n chunks and B sequences side by side: ``before`` and ``after`` hold the states before
    and after each step, ``gates`` the gates' inputs, ``values`` what the cell keeps of a step, ``local`` derivatives; ``weight`` is
    (weights, D). Each of the numbers below is one of rows. States that start within [-1, 1] stay there.
    """

    #: What a compiled graph calls the cell.
    name: ClassVar[str]
    states: ClassVar[int]
    gates: ClassVar[int]
    values: ClassVar[int]
    weights: ClassVar[int]
    derivatives: ClassVar[int]
    #: The gate, and its weight, that pass the tanh.
    doubled: ClassVar[int]
    known: ClassVar[dict[str, type[Cell]]] = {}

    def __init_subclass__(cls) -> None:
        # An operation of a compiled graph takes no classes, but names.
        Cell.known[cls.name] = cls

    @staticmethod
    @abstractmethod
    def steps(weight: Tensor, gates: Tensor, before: Tensor, after: Tensor, values: Tensor) -> Iterator[None]:
        """Take one step whenever asked for the next: fill its ``after`` and ``values``, whose first rows may be the memory of
        ``gates``. Here the weight and the input of the gate ``doubled`` are."""

    @staticmethod
    @abstractmethod
    def linearise(weight: Tensor, before: Tensor, after: Tensor, values: Tensor, jacobian: Tensor, local: Tensor) -> None:
        """Write the Jacobians (steps, S, S, ..., D), [i, j] = ds_i / ds_j before, and ``local``, what :meth:`gradients` needs."""

    @staticmethod
    @abstractmethod
    def gradients(before: Tensor, after: Tensor, values: Tensor, local: Tensor, adjoint: Tensor, by_weight: Tensor) -> None:
        """Turn the first G rows of ``local`` into the gradients of the gates' inputs, and add those of the weights to
        ``by_weight`` (steps, weights, ..., D), not yet summed over what runs side by side.

        ``adjoint`` (steps, S, ..., D) are the gradients of the states after each step, by all that comes after.
        """


def newton_recurrence(
    cell: type[Cell],
    gates: Float[Tensor, "B T G *channels"],
    weight: Float[Tensor, "W *channels"],
    state: Float[Tensor, "S B *channels"] | None = None,
    *,
    segments: Int[Tensor, "B T"] | None = None,
    chunk: int | None = None,
    iterations: int | None = None,
) -> tuple[Float[Tensor, "S B T *channels"], Float[Tensor, ""], Float[Tensor, ""]]:
    """All states of a recurrence, the number of Newton iterations and the residual max |s_t - f(s_{t-1}, x_t)| that they left.

    Args:
        cell: the recurrence, with its derivatives.
        gates: the inputs of the cell's gates.
        weight: its weights, one of each kind per channel.
        state: the states before the first step; None is 0.
        segments: ids of packed documents, equal ids contiguous: the state is 0 where the id changes.
        chunk: steps of a chunk; None chooses by sizes and device. 1 is the paper's method, T or more the loop.
        iterations: None for the exact result; a number for so many Newton iterations, converged or not.

    Computed, and returned, in float32 or better. Double backward is not supported. In a compiled graph all of this is one
    operation.

    Raises:
        ValueError: for a ``chunk`` below 1, negative ``iterations``, or sizes that are not the cell's.
    """
    if (chunk is not None and chunk < 1) or (iterations is not None and iterations < 0):
        raise ValueError(f"chunk must be at least 1 and iterations at least 0, got {chunk} and {iterations}")
    batch, length = gates.shape[:2]
    channels = gates.shape[3:]
    if not channels or gates.shape[2] != cell.gates or weight.shape != (cell.weights, *channels):
        raise ValueError(
            f"cell {cell.name!r} has gates (B, T, {cell.gates}, *channels) and weights ({cell.weights}, *channels) of the same "
            f"channels, not {tuple(gates.shape)} and {tuple(weight.shape)}"
        )
    if state is not None and state.shape != (cell.states, batch, *channels):
        raise ValueError(f"the state is {(cell.states, batch, *channels)}, not {tuple(state.shape)}")
    if segments is not None and segments.shape != (batch, length):
        raise ValueError(f"segments are (B, T) = {(batch, length)}, not {tuple(segments.shape)}")
    dtype = torch.promote_types(gates.dtype, torch.float32)
    with without_autocast(gates.device):
        if state is None:
            state = gates.new_zeros(cell.states, batch, *channels, dtype=dtype)
        gates, weight, state = gates.to(dtype), weight.to(dtype), state.to(dtype)
        if gates.numel() == 0:
            nothing = gates.sum() + weight.sum() * 0 + state.sum() * 0
            return gates.new_zeros(cell.states, batch, length, *channels) + nothing, nothing.detach(), nothing.detach()
        fresh = None
        if segments is not None:
            fresh = torch.zeros_like(segments, dtype=torch.bool)
            fresh[:, 1:] = segments[:, 1:] != segments[:, :-1]
        chunk = min(chunk or _chunk_length(gates), length)
        count = -1 if iterations is None else iterations
        states, _, done, residual = _Recurrence.apply(cell.name, gates, weight, state, fresh, chunk, count)
    return states, done, residual


def _chunk_length(gates: Tensor) -> int:
    """The steps of a chunk, from the sizes alone: the states do not depend on the number of threads."""
    length, width = gates.shape[1], gates[:, 0, 0].numel()
    if not gates.is_cpu:
        return 16  # An operation costs the same whatever its size: few steps are better than few iterations.
    chunk = max(SHORTEST, _chunks(length * width, STEP))
    return length if width >= WIDE or 4 * chunk > length else chunk


def _chunks(length: int, chunk: int) -> int:
    """Chunks that cover a length, the last of them in part."""
    return -(-length // chunk)


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, cell: str, gates: Tensor, weight: Tensor, state: Tensor, fresh: Tensor | None, chunk: int, iterations: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # In a compiled graph the iterations, whose number is data, hide behind one operation.
        solve = _solve_operation if torch.compiler.is_compiling() else _solve
        states, values, done, residual = solve(cell, gates, weight, state, fresh, chunk, iterations)
        ctx.cell = cell
        ctx.save_for_backward(weight, state, fresh, states, values)
        ctx.mark_non_differentiable(values, done, residual)
        ctx.set_materialize_grads(False)
        return states, values, done, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        differentiate = _differentiate_operation if torch.compiler.is_compiling() else _differentiate
        gates, weight, state = differentiate(ctx.cell, grad, *ctx.saved_tensors)
        return None, gates, weight, state, None, None, None


# -- Arrays by step: (C, rows, n, B, D) for n chunks of C steps. A chunk's first steps of all sequences lie together.


def _pairs(steps: Tensor, x: Tensor, chunk: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of an array by step, holding the steps of each chunk from ``first`` on, and of ``x`` (B, T, rows, *channels) that are
    of the same elements: those of the whole chunks, and those of the rest."""
    count = len(steps)
    steps = steps.unflatten(-1, x.shape[3:])
    by_row = steps.permute(3, 2, 0, 1, *range(4, steps.dim()))  # (B, n, count, rows, *channels)
    whole, rest = divmod(x.shape[1], chunk)
    yield by_row[:, :whole], x[:, : whole * chunk].unflatten(1, (whole, chunk))[:, :, first : first + count]
    count = min(count, rest - first)
    if count > 0:
        yield by_row[:, whole, :count], x[:, whole * chunk + first :][:, :count]


def _fill(steps: Tensor, x: Tensor, chunk: int, first: int = 0) -> Tensor:
    """Fill an array by step, holding the steps of each chunk from ``first`` on, from ``x`` (B, T, rows, *channels); 0 where the
    last chunk goes beyond it."""
    rest = x.shape[1] % chunk
    if rest and rest < first + len(steps):
        steps[max(rest - first, 0) :, :, -1] = 0
    for there, here in _pairs(steps, x, chunk, first):
        there.copy_(here)
    return steps


def _kept(fresh: Tensor | None, chunk: int, dtype: torch.dtype) -> Tensor | None:
    """The factor on the state before each step, (C, 1, n, B, 1): 0 where a document starts."""
    if fresh is None:
        return None
    batch, length = fresh.shape
    kept = torch.empty(chunk, 1, _chunks(length, chunk), batch, 1, dtype=dtype, device=fresh.device)
    return _fill(kept, fresh.logical_not()[:, :, None, None], chunk)


def _states(cell: type[Cell], like: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for the states before and after each step of an array by step; one array where nothing is reset in between."""
    chunk, _, *sizes = like.shape
    track = like.new_empty(chunk + 1, cell.states, *sizes)
    return track[:-1] if kept is None else like.new_empty(chunk, cell.states, *sizes), track[1:]


def _run(
    cell: type[Cell], weight: Tensor, gates: Tensor, starts: Tensor, kept: Tensor | None, before: Tensor, after: Tensor,
    values: Tensor,
) -> None:
    """Step all chunks side by side from their first states ``starts`` (S, n, B, D)."""
    before[0] = starts if kept is None else starts * kept[0]
    one_track = before[1:].data_ptr() == after.data_ptr()
    for t, _ in enumerate(cell.steps(weight, gates, before, after, values), 1):
        if t == len(gates) or one_track:
            continue
        if kept is None:
            before[t] = after[t - 1]
        else:
            torch.mul(after[t - 1], kept[t], out=before[t])


def _linearised(
    cell: type[Cell], weight: Tensor, before: Tensor, after: Tensor, values: Tensor, kept: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """From the last steps to the first, some at once: which, their Jacobians (k, S, S, n, B, D) and local derivatives.

    Both are overwritten by the next ones, and so stay in the caches: computing them twice is faster than keeping them.
    """
    chunk, states, *sizes = before.shape
    stretch = _stretch(before)
    jacobians, locals_ = before.new_empty(stretch, states, states, *sizes), before.new_empty(stretch, cell.derivatives, *sizes)
    for first in reversed(range(0, chunk, stretch)):
        steps = slice(first, min(first + stretch, chunk))
        count = steps.stop - first
        jacobian, local = jacobians[:count], locals_[:count]
        cell.linearise(weight, before[steps], after[steps], values[steps], jacobian, local)
        if kept is not None:
            jacobian *= kept[steps, None]
        yield steps, jacobian, local


def _stretch(before: Tensor) -> int:
    """Steps that the element-wise work takes at once."""
    return min(len(before), max(1, STRETCH // before[0, 0].numel()))


def _back(jacobian: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """The transposed matrices (S, S, *sizes) times vectors, given as S rows."""
    sums = []
    for column in range(len(rows)):
        total = jacobian[0, column] * rows[0]
        for row in range(1, len(rows)):
            total.addcmul_(jacobian[row, column], rows[row])
        sums.append(total)
    return sums


def _through(
    linearised: Iterator[tuple[slice, Tensor, Tensor]], own: Callable[[slice], Tensor] | None, sizes: Sequence[int]
) -> Tensor:
    """What a chunk's last state makes of its first: the transposed product of its Jacobians, (S, S, n, B, D). Where ``own`` gives
    the gradients of the states after some steps, one more column: the gradient of the first state by all of them."""
    rows: list[Tensor] = []
    for steps, jacobian, _ in linearised:
        added = None if own is None else own(steps)
        for t in reversed(range(len(jacobian))):
            if not rows:
                states = jacobian.shape[1]
                rows = [jacobian.new_zeros(states + (own is not None), *sizes) for _ in range(states)]
                for i in range(states):
                    rows[i][i] = 1
            if added is not None:
                for row, here in zip(rows, added[t], strict=True):
                    row[-1] += here
            rows = _back(jacobian[t], rows)
    # What has overflowed means no more than "very large", and times 0 it is 0.
    return torch.stack(rows).nan_to_num(nan=0.0)


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    """The matrices (S, S, *sizes) times vectors (S, *sizes) or matrices."""
    return torch.stack(_back(matrix.transpose(0, 1), x.unbind(0)))


def _along_borders(product: Tensor, added: Tensor) -> Tensor:
    """``d_k = product_k d_{k-1} + added_k`` with d before the first 0: product (S, S, n, B, D), added (S, n, B, D)."""
    states, n = len(product), added.shape[1]
    if n <= 128:
        steps = list(added.unbind(1))
        for k in range(1, n):
            steps[k] = steps[k] + _times(product[:, :, k], steps[k - 1])
        return torch.stack(steps, 1)

    def combine(earlier: tuple[Tensor, ...], later: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first, second = (torch.stack(x[: states**2]).unflatten(0, (states, states)) for x in (earlier, later))
        moved = torch.stack(later[states**2 :]) + _times(second, torch.stack(earlier[states**2 :]))
        return *_times(second, first).flatten(0, 1).unbind(0), *moved.unbind(0)

    return torch.stack(associative_scan(combine, (*product.flatten(0, 1).unbind(0), *added.unbind(0)), 0)[states**2 :])


def _solve(
    cell_name: str, gates: Tensor, weight: Tensor, state: Tensor, fresh: Tensor | None, chunk: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The states (S, B, T, *channels), the cell's values by step, iterations done (as many as needed where ``iterations`` is -1)
    and the residual."""
    cell = Cell.known[cell_name]
    batch, length, _, *channels = gates.shape
    kept = _kept(fresh, chunk, gates.dtype)
    doubled = weight.flatten(1).clone()
    doubled[cell.doubled] *= 2
    # Memory that is new to the process costs more than what is done to it here, so that a step's values replace its gates' inputs.
    values = gates.new_empty(chunk, cell.values, _chunks(length, chunk), batch, math.prod(channels))
    before, after = _states(cell, values, kept)
    starts = torch.zeros_like(before[0])
    starts[:, 0] = state.flatten(2)
    ends = after[-1, :, :-1]

    def fill() -> Tensor:
        by_step = _fill(values[:, : cell.gates], gates, chunk)
        by_step[:, cell.doubled] *= 2
        return by_step

    def run() -> None:
        _run(cell, doubled, fill(), starts, kept, before, after, values)

    done, residual = 0, gates.new_zeros(())
    if length > chunk:
        # The first guess takes a chunk's last steps, and keeps its end only: all steps write into the same place.
        gates_by_step, late = fill(), min(chunk, WARM)
        first, last, room = (torch.empty_like(x[:1]).expand(late, *x.shape[1:]) for x in (before, after, values))
        starts[:, 0] *= late == chunk
        _run(cell, doubled, gates_by_step[-late:], starts, None if kept is None else kept[-late:], first, last, room)
        starts[:, 0], starts[:, 1:] = state.flatten(2), last[-1, :, :-1]
        _run(cell, doubled, gates_by_step, starts, kept, before, after, values)
        close = ROUNDING * torch.finfo(gates.dtype).eps
        bound = max(1.0, float(state.abs().max()))
        while True:
            missing = ends - starts[:, 1:]
            residual = missing.abs().max()
            if done == iterations or (iterations < 0 and float(residual) <= close):
                break
            if iterations < 0 and done == LIMIT:
                stepped = _solve(cell_name, gates, weight, state, fresh, length, iterations)[0]
                starts[:, 1:] = stepped[:, :, chunk - 1 : -1 : chunk].flatten(3).transpose(1, 2)
                run()
                residual = (ends - starts[:, 1:]).abs().max()
                break
            done += 1
            through = _through(_linearised(cell, weight.flatten(1), before, after, values, kept), None, starts.shape[1:])
            better = starts[:, 1:] + _along_borders(through.transpose(0, 1)[:, :, :-1], missing)
            starts[:, 1:] = torch.where(better.isfinite(), better, ends).clamp_(-bound, bound)
            run()
    else:
        run()
    states = gates.new_empty(cell.states, batch, length, *channels)
    for there, here in _pairs(after, states.movedim(0, 2), chunk):
        here.copy_(there)
    return states, values, gates.new_tensor(float(done)), residual


def _differentiate(
    cell_name: str, grad: Tensor, weight: Tensor, state: Tensor, fresh: Tensor | None, states: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, weight and state from those of the states."""
    cell = Cell.known[cell_name]
    chunk, kept = len(values), _kept(fresh, len(values), grad.dtype)
    before, after = _states(cell, values, kept)
    _fill(after, states.movedim(0, 2), chunk)
    before[0, :, 1:] = after[-1, :, :-1]
    before[0, :, 0] = state.flatten(2)
    if kept is not None:
        before[1:] = after[:-1]
        before *= kept
    stretch = _stretch(before)
    room = torch.empty_like(before[:stretch])

    def linearised() -> Iterator[tuple[slice, Tensor, Tensor]]:
        return _linearised(cell, weight.flatten(1), before, after, values, kept)

    def own(steps: slice) -> Tensor:
        return _fill(room[: steps.stop - steps.start], grad.movedim(0, 2), chunk, steps.start)

    # The gradients that reach the chunks' last states: what every chunk but the first sends to the one before it, with what it
    # has got itself.
    later = [torch.zeros_like(row) for row in before[0]]
    if before.shape[2] > 1:
        through = _through(linearised(), own, before.shape[2:])[:, :, 1:].flip(2)
        for row, sent in zip(later, _along_borders(through[:, :-1], through[:, -1]), strict=True):
            row[:-1] = sent.flip(0)
    d_gates = _gradient(cell, states)
    by_weight = grad.new_zeros(stretch, cell.weights, *before.shape[2:])
    for steps, jacobian, local in linearised():
        adjoint = own(steps)
        for t in reversed(range(len(adjoint))):
            for row, more in zip(adjoint[t], later, strict=True):
                row += more
            later = _back(jacobian[t], adjoint[t].unbind(0))
        cell.gradients(before[steps], after[steps], values[steps], local, adjoint, by_weight[: len(adjoint)])
        for there, here in _pairs(local[:, : cell.gates], d_gates, chunk, steps.start):
            here.copy_(there)
    d_state = torch.stack([row[0] for row in later])
    return d_gates, by_weight.sum((0, 2, 3)).view_as(weight), d_state.view_as(state)


def _gradient(cell: type[Cell], states: Tensor) -> Tensor:
    """Room for the gradient of the gates (B, T, G, *channels). Of channels (heads, K) the heads come first in memory, as a
    projection of each head by itself has its outputs."""
    batch, length, *channels = states.shape[1:]
    if len(channels) == 1:
        return states.new_empty(batch, length, cell.gates, *channels)
    heads, *rest = channels
    return states.new_empty(heads, batch, length, cell.gates, *rest).movedim(0, 3)


_solve_operation = torch.library.custom_op(
    "gatework::solve_recurrence", _solve, mutates_args=(),
    schema="(str cell, Tensor gates, Tensor weight, Tensor state, Tensor? fresh, int chunk, int iterations)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
_differentiate_operation = torch.library.custom_op(
    "gatework::differentiate_recurrence", _differentiate, mutates_args=(),
    schema="(str cell, Tensor grad, Tensor weight, Tensor state, Tensor? fresh, Tensor states, Tensor values)"
    " -> (Tensor, Tensor, Tensor)",
)


@_solve_operation.register_fake
def _(
    cell_name: str, gates: Tensor, weight: Tensor, state: Tensor, fresh: Tensor | None, chunk: int, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cell = Cell.known[cell_name]
    batch, length, _, *channels = gates.shape
    states = gates.new_empty(cell.states, batch, length, *channels)
    values = gates.new_empty(chunk, cell.values, _chunks(length, chunk), batch, math.prod(channels))
    return states, values, gates.new_empty(()), gates.new_empty(())


@_differentiate_operation.register_fake
def _(
    cell_name: str, grad: Tensor, weight: Tensor, state: Tensor, fresh: Tensor | None, states: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient(Cell.known[cell_name], states), torch.empty_like(weight), torch.empty_like(state)
