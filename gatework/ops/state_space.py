"""Linear time-invariant state spaces in chunks: one algorithm for S4, S4D and S5.

A system is a bank of independent groups, each with a state x of S real numbers, M inputs and M' outputs per token:

    x_t = A x_{t-1} + b u_t        y_t = c x_t

Its outputs are a convolution of the inputs with the kernel c A^j b. The papers compute it by Fourier transforms of twice the
sequence's length (S4, S4D) or by an associative scan (S5). Here the sequence is cut into chunks of C tokens:

    Y = U K + X O        X <- X A^C + U I        K_ji = c A^(i - j) b (i >= j)    O_i = c A^(i + 1)    I_j = A^(C - 1 - j) b

(row vectors; X holds the states before the chunks). All chunks, groups and sequences are three batched matrix products; only the
states pass from chunk to chunk in a loop. The kernel is needed for C tokens, not for T; time and memory are linear in T; the state
before the sequence and the one after it are exact; packed documents start chunks of their own. On one CPU thread this takes about
half the time of the Fourier transforms (``benchmarks/state_space.py``).

Three kinds of systems say what K, O, I and the powers of A are: :class:`DiagonalSystem`, :class:`LowRankSystem` and
:class:`ComplexScan`. Complex numbers are pairs of real tensors, in the state the real parts stand before the imaginary ones: so
everything compiles, and the products are real ones. Powers come by doubling, A^1 .. A^m times A^m being A^(m+1) .. A^2m.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatework.ops.precision import without_autocast

#: Real and imaginary part.
Pair = tuple[Tensor, Tensor]

#: Up to this many tokens are stepped one by one: cheaper than a chunk, and what decoding does.
STEP_LENGTH = 4


def multiply(a: Pair, b: Pair) -> Pair:
    """The product of complex numbers."""
    return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]


def zero_order_hold(rate: Pair, step: Tensor) -> tuple[Pair, Pair]:
    """What x' = rate x + u becomes for inputs that stand still for ``step``: x_t = factor x_{t-1} + gain u_t.

    factor = exp(z), gain = step (exp(z) - 1) / z with z = step rate; returns (factor, gain). Exact and differentiable at z = 0 too.
    """
    re, im = rate[0] * step, rate[1] * step
    grow, cos, sin = re.exp(), im.cos(), im.sin()
    size = re.square() + im.square()
    near = size < 1e-4
    # (e^z - 1) / z loses digits, in its gradient above all, where z is small: there a polynomial whose next term is z^5 / 720.
    away = torch.where(near, torch.ones_like(size), size)
    above = re.expm1() * cos - 2 * (im / 2).sin().square(), grow * sin
    far = multiply(above, (re / away, -im / away))
    small = torch.where(near, re, torch.zeros_like(re)), torch.where(near, im, torch.zeros_like(im))
    series: Pair = (torch.ones_like(re), torch.zeros_like(im))
    for divisor in (5, 4, 3, 2):
        product = multiply(series, small)
        series = 1 + product[0] / divisor, product[1] / divisor
    gain = torch.where(near, series[0], far[0]) * step, torch.where(near, series[1], far[1]) * step
    return (grow * cos, grow * sin), gain


def bilinear(rate: Pair, step: Tensor) -> tuple[Pair, Pair]:
    """The same by the trapezoidal rule: factor = (1 + z/2) / (1 - z/2), gain = step / (1 - z/2); returns (factor, gain)."""
    re, im = rate[0] * step / 2, rate[1] * step / 2
    size = (1 - re).square() + im.square()
    inverse = (1 - re) / size, im / size
    return multiply((1 + re, im), inverse), (step * inverse[0], step * inverse[1])


@dataclass
class Tables:
    """What the chunked form of a system needs for chunks of C tokens: K, O, I, and A^1, A^2, A^4, .. A^C.

    A power is (G, 2, N), the complex factors of a diagonal A, or where ``dense`` (G, S, S), which a row vector is multiplied by.
    """

    local: Float[Tensor, "M2 M G C C"]
    out: Float[Tensor, "M2 G S C"]
    into: Float[Tensor, "M G C S"]
    powers: list[Tensor]
    dense: bool = False


@dataclass
class System(ABC):
    """A bank of G groups with S real state entries each. Token inputs are (B, G, M), outputs (B, G, M'), states (B, G, S).

    ``factor`` (G, N) are complex factors of S / 2 modes, what A is or begins with.
    """

    #: The length of chunks that is fastest.
    chunk: ClassVar[int] = 64
    #: M, the inputs of a group.
    inputs: ClassVar[int] = 1

    factor: Pair

    @property
    def state_shape(self) -> tuple[int, int]:
        """G and S."""
        groups, modes = self.factor[0].shape
        return groups, 2 * modes

    @abstractmethod
    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One token: the new state and the output."""

    @abstractmethod
    def tables(self, chunk: int) -> Tables:
        """The matrices for chunks of ``chunk`` (a power of two) tokens."""


@dataclass
class DiagonalSystem(System):
    """Single-input, single-output: ``h_tn = a_n h_(t-1)n + u_t``, ``y_t = Re sum_n w_n h_tn`` with N complex modes per group.

    The weights of the inputs are best folded into w: the outputs depend on the product alone.
    """

    weight: Pair

    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`System`."""
        re, im = state.chunk(2, -1)
        re, im = multiply(self.factor, (re, im))
        re = re + u
        y = (re * self.weight[0] - im * self.weight[1]).sum(-1, keepdim=True)
        return torch.cat([re, im], -1), y

    def tables(self, chunk: int) -> Tables:
        """See :class:`System`."""
        powers = _powers(self.factor, chunk)
        out = multiply((self.weight[0][:, None], self.weight[1][:, None]), powers)
        kernel = torch.cat([self.weight[0].sum(-1, keepdim=True), out[0][:, :-1].sum(-1)], 1)
        read = torch.cat([out[0], -out[1]], -1).mT
        return Tables(_toeplitz(kernel)[None, None], read[None], _into(powers)[None], _doublings(powers))


@dataclass
class ComplexScan(System):
    """``h_t = a h_(t-1) + u_t`` with one complex number per group, ``factor`` (G, 1); input and output are (real, imaginary)."""

    chunk = 32
    inputs = 2

    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`System`."""
        re, im = state.chunk(2, -1)
        state = torch.cat(multiply(self.factor, (re, im)), -1) + u
        return state, state

    def tables(self, chunk: int) -> Tables:
        """See :class:`System`."""
        powers = _powers(self.factor, chunk)
        re, im = powers[0][..., 0], powers[1][..., 0]
        one = torch.ones_like(re[:, :1])
        turn, lift = _toeplitz(torch.cat([one, re[:, :-1]], 1)), _toeplitz(torch.cat([0 * one, im[:, :-1]], 1))
        local = torch.stack([torch.stack([turn, -lift]), torch.stack([lift, turn])])
        out = torch.stack([torch.stack([re, -im], 1), torch.stack([im, re], 1)])
        re_into, im_into = _into(powers).unbind(-1)
        into = torch.stack([torch.stack([re_into, im_into], -1), torch.stack([-im_into, re_into], -1)])
        return Tables(local, out, into, _doublings(powers))


@dataclass
class LowRankSystem(System):
    """``x_t = a x_(t-1) - left (right . x_(t-1)) + b u_t``, ``y_t = c . x_t``: a diagonal of N complex modes minus a rank of one.

    ``factor`` is a; the other fields are (G, 2N), real parts before imaginary parts, and their products are those of real vectors.
    """

    left: Tensor
    right: Tensor
    b: Tensor
    c: Tensor

    @staticmethod
    def bilinear(rate: Pair, p: Pair, b: Pair, c: Pair, step: Float[Tensor, "G 1"]) -> LowRankSystem:
        """The trapezoidal rule for x' = (Lambda - P P*) x + B u, y = C x, of which ``rate`` (Lambda), ``p``, ``b`` and ``c``, each
        (G, N), are one half, the other being their conjugates.

        On the real vector [Re x, Im x] of that half the matrix is L - 2 p p^T, L being Lambda's blocks and p = [Re P, Im P]; with
        E = (1 - step L / 2)^-1, also diagonal, Woodbury's identity gives

            (1 - step/2 (L - 2 p p^T))^-1 = E - step / (1 + step p.Ep) Ep (E^T p)^T =: R,    A = 2 R - 1,    b = step R B

        Where Re Lambda < 0 the symmetric part of L - 2 p p^T is negative, so A shortens every vector, whatever P is.
        """
        factor, gain = bilinear(rate, step)
        left = torch.cat(multiply(gain, p), -1) / step
        right = torch.cat(multiply((gain[0], -gain[1]), p), -1) / step
        share = step / (1 + step * (left * torch.cat(p, -1)).sum(-1, keepdim=True))
        taken = share * (right * torch.cat(b, -1)).sum(-1, keepdim=True)
        entering = torch.cat(multiply(gain, b), -1) - step * taken * left
        return LowRankSystem(factor, 2 * share * left, right, entering, 2 * torch.cat([c[0], -c[1]], -1))

    def step(self, state: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`System`."""
        re, im = state.chunk(2, -1)
        turned = torch.cat(multiply(self.factor, (re, im)), -1)
        state = turned - self.left * (self.right * state).sum(-1, keepdim=True) + self.b * u
        return state, (self.c * state).sum(-1, keepdim=True)

    def matrix(self) -> Float[Tensor, "G S S"]:
        """A transposed: what a state, as a row vector, is multiplied by."""
        re, im = self.factor[0].diag_embed(), self.factor[1].diag_embed()
        blocks = torch.cat([torch.cat([re, im], -1), torch.cat([-im, re], -1)], -2)
        return blocks - self.right[:, :, None] * self.left[:, None, :]

    def tables(self, chunk: int) -> Tables:
        """See :class:`System`."""
        powers = [self.matrix()]
        entered, read = self.b[:, None], powers[0] @ self.c[..., None]
        while entered.shape[1] < chunk:
            entered = torch.cat([entered, entered @ powers[-1]], 1)
            read = torch.cat([read, powers[-1] @ read], 2)
            powers.append(powers[-1] @ powers[-1])
        kernel = (entered @ self.c[..., None])[..., 0]
        return Tables(_toeplitz(kernel)[None, None], read[None], entered.flip(1)[None], powers, dense=True)


def cauchy_kernel(
    rate: Pair, p: Pair, b: Pair, c: Pair, step: Float[Tensor, "G 1"], length: int
) -> Float[Tensor, "G L"]:
    """The kernel c A^j b, j < ``length``, of :meth:`LowRankSystem.bilinear`, as S4's paper computes it: from its values at the
    roots of unity w_k = e^(-2 pi i k / L), without a power of A but the L-th.

        K^_k = r(c~, B) - h r(c~, P) r(P*, B) / (1 + h r(P*, P))    h = (1 + w)/2    c~ = c (1 - A^L)
        r(a, b) = sum_n 2 step a_n b_n / (2 (1 - w) - step Lambda_n (1 + w))    over all n, conjugates too

    The factor 2 / (1 + w) of the textbook's Cauchy sums is multiplied in, so w = -1 is no pole. O(L N) time and memory per group.

    Raises:
        ValueError: for a ``length`` below 1.
    """
    if length < 1:
        raise ValueError(f"a kernel has at least one entry, not {length}")
    system = LowRankSystem.bilinear(rate, p, b, c, step)
    ended = system.c - (torch.linalg.matrix_power(system.matrix(), length) @ system.c[..., None])[..., 0]
    re, im = ended.chunk(2, -1)
    full = [torch.cat([torch.complex(*x), torch.complex(*x).conj()], -1) for x in (rate, p, b, (re / 2, -im / 2))]
    rates, low_rank, entering, read = full
    angle = torch.arange(length // 2 + 1, dtype=rates.real.dtype, device=rates.device) * (-2 * torch.pi / length)
    w = torch.polar(torch.ones_like(angle), angle)
    terms = 2 * step[..., None] / (2 * (1 - w)[:, None] - (step * rates)[:, None] * (1 + w)[:, None])  # (G, L/2 + 1, 2 N)
    sums = terms @ torch.stack([read * entering, read * low_rank, low_rank.conj() * entering, low_rank.conj() * low_rank], -1)
    h = (1 + w) / 2
    values = sums[..., 0] - h * sums[..., 1] * sums[..., 2] / (1 + h * sums[..., 3])
    return torch.fft.irfft(values, n=length)


def state_space(
    system: System,
    u: Float[Tensor, "B T MG"],
    *,
    state: Float[Tensor, "B G S"] | None = None,
    real: Bool[Tensor, "B T"] | None = None,
    segments: Int[Tensor, "B T"] | None = None,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "B T M2G"], Float[Tensor, "B G S"] | None]:
    """Run a system over T tokens; returns the outputs and, where a state was given, the one after the last real token.

    Args:
        system: of G groups, in float32 or better; the inputs are computed in its dtype.
        u: inputs (B, T, M G), the first inputs of all groups before the second ones; zero where ``real`` is False. The outputs
            lie in the same order.
        state: the state before the first token; None is zero.
        real: True for real tokens, the first of each row; None where all are.
        segments: ids of packed documents (equal ids contiguous), each of which starts with a zero state; without ``state``.
        chunk: the chunks' length, a power of two; None is the system's own.

    Memory and time are linear in T. Double backward is not supported.

    Raises:
        ValueError: for a chunk length that is no power of two, a state beside segments, or inputs of other sizes.
    """
    chunk = system.chunk if chunk is None else chunk
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"the chunk length must be a power of two, got {chunk}")
    if state is not None and segments is not None:
        raise ValueError("packed documents start with a zero state: give segments or a state, not both")
    groups, size = system.state_shape
    if u.shape[2] != system.inputs * groups:
        raise ValueError(f"{groups} groups have {system.inputs * groups} inputs per token, not {u.shape[2]}")
    if state is not None and state.shape != (len(u), groups, size):
        raise ValueError(f"the state is (B, G, S) = {(len(u), groups, size)}, not {tuple(state.shape)}")
    for name, tokens in (("real", real), ("segments", segments)):
        if tokens is not None and tokens.shape != u.shape[:2]:
            raise ValueError(f"{name} is (B, T) = {tuple(u.shape[:2])}, not {tuple(tokens.shape)}")
    with without_autocast(u.device):
        dtype = system.factor[0].dtype
        u = u.to(dtype)
        start = u.new_zeros(len(u), *system.state_shape) if state is None else state.to(dtype)
        if u.numel() == 0:
            return u, None if state is None else start
        if segments is not None:
            return _packed(system, u, segments, chunk), None
        if u.shape[1] <= STEP_LENGTH:
            y, after = _stepped(system, u, start, real)
        else:
            y, after = _chunked(system, u, start, real, None, chunk, state is not None)
        return y, None if state is None else after


def _stepped(system: System, u: Tensor, state: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(u.shape[1]):
        after, y = system.step(state, u[:, t].unflatten(-1, (-1, system.state_shape[0])).mT)
        state = after if real is None else torch.where(real[:, t, None, None], after, state)
        outputs.append(y.mT.flatten(1))
    return torch.stack(outputs, 1), state


def _chunked(
    system: System, u: Tensor, state: Tensor, real: Tensor | None, fresh: Tensor | None, chunk: int, wants_state: bool
) -> tuple[Tensor, Tensor]:
    """Outputs, and if wanted the state after each row's real tokens; ``fresh`` (B, n) says which chunks begin with a zero state."""
    batch, length = u.shape[:2]
    chunk = min(chunk, 1 << (length - 1).bit_length())
    tables = system.tables(chunk)
    missing = -length % chunk
    padded = torch.nn.functional.pad(u, (0, 0, 0, missing)) if missing else u
    columns = _Transposed.apply(padded.flatten(0, 1))
    cells = columns.view(len(tables.into), -1, columns.shape[1] // chunk, chunk)  # (M, G, B n, C)
    added = _sum_of_products(cells, tables.into)
    kept = None if fresh is None else fresh.logical_not()[..., None].to(u.dtype)
    before, last = _Pass.apply(added.unflatten(1, (batch, -1)), tables.powers[-1], state.transpose(0, 1), kept, tables.dense)
    outputs = [
        torch.baddbmm(_sum_of_products(cells, local), before.flatten(1, 2), out)
        for local, out in zip(tables.local, tables.out, strict=True)
    ]
    rows = (torch.stack(outputs) if len(outputs) > 1 else outputs[0]).reshape(-1, columns.shape[1])
    y = _Transposed.apply(rows).unflatten(0, (batch, -1))[:, :length]
    if wants_state:
        state = _after(tables, u, before, last, real, chunk).transpose(0, 1)
    return y, state


def _sum_of_products(cells: Tensor, tables: Tensor) -> Tensor:
    """sum_m cells_m tables_m of batched matrices (M, G, .., ..)."""
    total = cells[0] @ tables[0]
    for some, table in zip(cells[1:], tables[1:], strict=True):
        total = torch.baddbmm(total, some, table)
    return total


def _after(tables: Tables, u: Tensor, before: Tensor, last: Tensor, real: Tensor | None, chunk: int) -> Tensor:
    """The states (G, B, S) after each row's real tokens: the one before its unfinished chunk, moved on by the tokens in there."""
    batch, length = u.shape[:2]
    count = torch.full((batch,), length, device=u.device) if real is None else real.sum(1)
    whole, rest = count // chunk, count % chunk
    states = torch.cat([before, last[:, :, None]], 2)
    state = states.gather(2, whole[None, :, None, None].expand(len(states), -1, 1, states.shape[3]))[:, :, 0]
    for bit, power in enumerate(tables.powers[:-1]):
        state = torch.where((rest >> bit & 1).bool()[:, None], _advance(state, power, tables.dense), state)
    # The tokens of the unfinished chunk, at the end of one.
    place = count[:, None] + torch.arange(-chunk, 0, device=u.device)
    inside = place >= (whole * chunk)[:, None]
    tokens = u.gather(1, place.clamp(min=0)[..., None].expand(-1, -1, u.shape[2])) * inside[..., None]
    cells = tokens.permute(2, 0, 1).unflatten(0, (len(tables.into), -1))
    return state + _sum_of_products(cells, tables.into)


def _packed(system: System, u: Tensor, segments: Tensor, chunk: int) -> Tensor:
    """Outputs of packed documents: each is moved to the start of a chunk of its own, with room left behind it.

    Chunks are no longer than the documents are on average, so that this at most doubles the number of tokens, where all rows hold
    equally many documents.
    """
    batch, length = segments.shape
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    chunk = min(chunk, 1 << (segments.numel() // int(starts.sum())).bit_length() - 1)
    token = torch.arange(length, device=u.device).expand(batch, -1)
    inside = token - torch.where(starts, token, 0).cummax(1).values
    cell = (inside % chunk == 0).cumsum(1) - 1
    place = (cell * chunk + inside % chunk)[..., None]
    n = int(cell[:, -1].max()) + 1
    spread = u.new_zeros(batch, n * chunk, u.shape[2]).scatter(1, place.expand_as(u), u)
    fresh = torch.zeros(batch, n, dtype=torch.bool, device=u.device)
    fresh[torch.arange(batch, device=u.device)[:, None].expand_as(cell)[starts], cell[starts]] = True
    y, _ = _chunked(system, spread, u.new_zeros(batch, *system.state_shape), None, fresh, chunk, wants_state=False)
    return y.gather(1, place.expand(-1, -1, y.shape[2]))


def _advance(state: Tensor, power: Tensor, dense: bool) -> Tensor:
    """A power of A times states (G, B, S)."""
    if dense:
        return state @ power
    re, im = state.chunk(2, -1)
    return torch.cat(multiply((power[:, 0, None], power[:, 1, None]), (re, im)), -1)


class _Transposed(torch.autograd.Function):
    """A transposed copy of a matrix, whose gradient is one too: views would leave the copying to operations that are slow at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.t().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.t().contiguous()


class _Pass(torch.autograd.Function):
    """The states before each chunk, (G, B, n, S), and after the last: x_{i+1} = A^C x_i + added_i, x_i being 0 where ``kept``
    is."""

    @staticmethod
    def forward(
        ctx: Any, added: Tensor, power: Tensor, state: Tensor, kept: Tensor | None, dense: bool
    ) -> tuple[Tensor, Tensor]:
        states = torch.cat([state[:, :, None], added], 2)
        for i in range(added.shape[2]):
            if kept is not None:
                states[:, :, i] *= kept[:, i]
            _accumulate(states, i, i + 1, power, dense)
        before, last = states[:, :, :-1].contiguous(), states[:, :, -1].clone()
        ctx.save_for_backward(before, power, kept)
        ctx.dense = dense
        return before, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_before: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        before, power, kept = ctx.saved_tensors
        grads = torch.cat([d_before, d_last[:, :, None]], 2)
        conjugate = power.mT if ctx.dense else torch.stack([power[:, 0], -power[:, 1]], 1)
        for i in reversed(range(before.shape[2])):
            _accumulate(grads, i + 1, i, conjugate, ctx.dense)
            if kept is not None:
                grads[:, :, i] *= kept[:, i]
        d_added = grads[:, :, 1:].contiguous()
        if ctx.dense:
            d_power = before.flatten(1, 2).mT @ d_added.flatten(1, 2)
        else:
            (re, im), (d_re, d_im) = before.chunk(2, -1), d_added.chunk(2, -1)
            d_power = torch.stack([(re * d_re + im * d_im).sum((1, 2)), (re * d_im - im * d_re).sum((1, 2))], 1)
        return d_added, d_power, grads[:, :, 0].clone(), None, None


def _accumulate(states: Tensor, source: int, target: int, power: Tensor, dense: bool) -> None:
    """Add to the states (G, B, S) at ``target`` those at ``source`` times a power of A."""
    if dense:
        states[:, :, target] += states[:, :, source] @ power
        return
    re, im = power[:, 0, None], power[:, 1, None]
    (from_re, from_im), (to_re, to_im) = (states[:, :, i].chunk(2, -1) for i in (source, target))
    to_re.addcmul_(from_re, re).addcmul_(from_im, im, value=-1)
    to_im.addcmul_(from_re, im).addcmul_(from_im, re)


def _powers(factor: Pair, count: int) -> Pair:
    """The powers 1 .. count (a power of two) of complex factors (G, N): (G, count, N)."""
    powers = factor[0][:, None], factor[1][:, None]
    while powers[0].shape[1] < count:
        more = multiply(powers, (powers[0][:, -1:], powers[1][:, -1:]))
        powers = torch.cat([powers[0], more[0]], 1), torch.cat([powers[1], more[1]], 1)
    return powers


def _doublings(powers: Pair) -> list[Tensor]:
    """Of the powers 1 .. C those that are powers of two: (G, 2, N) each."""
    return [torch.stack([x[:, (1 << bit) - 1] for x in powers], 1) for bit in range(powers[0].shape[1].bit_length())]


def _into(powers: Pair) -> Tensor:
    """I of a diagonal system from the powers 1 .. C: those from C - 1 down to 0, (G, C, 2 N)."""
    one = torch.ones_like(powers[0][:, :1])
    parts = [torch.cat([first, x[:, :-1]], 1) for first, x in ((one, powers[0]), (0 * one, powers[1]))]
    return torch.cat(parts, -1).flip(1)


def _toeplitz(kernel: Tensor) -> Tensor:
    """The upper triangular matrices with entries k_(i - j) in row j and column i: (G, C) to (G, C, C)."""
    chunk = kernel.shape[1]
    return torch.nn.functional.pad(kernel, (chunk - 1, 0)).unfold(1, chunk, 1).flip(1)
