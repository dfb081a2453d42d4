"""The gated linear recurrence in chunks: one algorithm for every mixer with a decayed, rank-one-updated matrix state.

Per head, with a state S (K x V), inputs q, k (K), v (V) and decays exp(la) <= 1 along one axis of S, or one for all of it:

    S_t = diag(exp la_t) S_{t-1} + k_t^T v_t    (keys)        o_t = scale * q_t S_t
    S_t = S_{t-1} diag(exp la_t) + k_t^T v_t    (values)

Chunked form (Yang et al., Gated Linear Attention, 2023, arXiv 2312.06635, section 4), with b the cumulative sum of la
inside a chunk of length C; decays along the keys:

    o_i = (q_i e^{b_i}) S + sum_{j <= i} P_ij v_j        P_ij = sum_c q_ic k_jc e^{b_ic - b_jc}
    S  <- diag(e^{b_C}) S + (k e^{b_C - b})^T v

and along the values (the first pass of Zhang et al., Gated Slot Attention, 2024, arXiv 2409.07146):

    o_i = (q_i S) e^{b_i} + sum_{j <= i} A_ij v_j e^{b_i - b_j}        A = q k^T
    S  <- S diag(e^{b_C}) + k^T (v e^{b_C - b})

Only differences b_i - b_j with i >= j are ever exponentiated, so every factor is at most 1. Both sums over j are built by
halving instead of the paper's one level of sub-blocks: inside every block of length m (C, C/2, ... down to 2 ``sub_chunk``) the
later half's rows meet the earlier half's columns by a plain matrix product about the reference row just before the later half,
(q_I e^{b_I - ref}) (k_J e^{ref - b_J})^T; in the blocks of ``sub_chunk`` that remain on the diagonal the pairs are taken by their
distance, element by element. All blocks of a level, of all chunks, heads and sequences are one batched product; only the states
pass from chunk to chunk in a loop. With one decay per head, or none, e^{b_i - b_j} is one factor per pair, and the scores q k^T
are one product.

The backward pass is our own: it keeps q, k, v, b, the pairs' scores and the states at the chunks' borders, and gets the decays'
gradient from d/db_t = q_t * dq_t - k_t * dk_t (keys) or o_t * do_t - v_t * dv_t (values), which need no K x V tensor per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatework.ops import fla
from gatework.ops.precision import without_autocast

#: Up to this many tokens, without gradients, the recurrence is stepped: cheaper than a chunk, and what decoding does.
STEP_LENGTH = 4
#: exp of less is 0 in float32. Sums of greater numbers round less, and with them what follows a token that forgets everything.
FORGETS = -88.0
#: Tokens whose chunks are computed at once.
STRETCH = 512


def gated_linear_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H D"] | None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    segments: Int[Tensor, "B T"] | None = None,
    scale: float | None = None,
    axis: Literal["keys", "values"] = "keys",
    chunk: int = 64,
    sub_chunk: int = 4,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Run the recurrence over T tokens; returns the outputs and the state after the last token.

    Args:
        q, k: queries and keys (B, T, H, K).
        v: values (B, T, H, V).
        log_decay: logarithms of the decays, at most 0: one per channel of ``axis``, (B, T, H, K) or (B, T, H, V), or one per
            head, (B, T, H, 1), or None for no decay; the last two cost less.
        state: the state (B, H, K, V) before the first token; None is zero.
        segments: ids of packed documents (B, T), equal ids contiguous: the state is forgotten where the id changes.
            The given ``state`` then belongs to the first token's document.
        scale: factor on q; None is K^-1/2.
        axis: which axis of the state the decays belong to.
        chunk, sub_chunk: lengths of a chunk and of the explicit blocks on its diagonal, powers of two.

    The outputs have v's dtype; inside, half precisions are computed in float32, and so is the state returned. Double
    backward is not supported.

    Raises:
        ValueError: for chunk lengths that are not powers of two with ``sub_chunk <= chunk``, decays of another width, or inputs
            whose sizes do not fit each other.
    """
    check_sizes(q, k, v, (log_decay,), state, segments)
    if chunk < 1 or chunk & (chunk - 1) or sub_chunk < 1 or sub_chunk & (sub_chunk - 1) or sub_chunk > chunk:
        raise ValueError(f"chunk {chunk} and sub_chunk {sub_chunk} must be powers of two with sub_chunk <= chunk")
    if log_decay is not None and log_decay.shape[-1] not in (1, (k if axis == "keys" else v).shape[-1]):
        raise ValueError(f"log_decay has one number per head or one per channel of the {axis}, not {log_decay.shape[-1]}")
    long = q.shape[1] > STEP_LENGTH and segments is None
    if long and axis == "keys" and log_decay is not None and log_decay.shape == k.shape and fla.available(q, k, v):
        return fla.linear_recurrence(q, k, v, log_decay, scale, state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    length, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        q, k, values = q.to(dtype), k.to(dtype), v.to(dtype)
        decay = None if log_decay is None else log_decay.to(dtype).clamp(min=FORGETS)
        if state is None:
            state = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[-1], dtype=dtype)
        state = state.to(dtype)
        recording = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, values, decay, state))
        if length == 0:
            return v.clone(), state
        if length <= STEP_LENGTH and not recording and segments is None:
            out, state = _stepped(q * scale, k, values, decay, state, axis)
        else:
            out, state = _chunked(q, k, values, decay, state, segments, scale, axis, chunk, sub_chunk)
        return out.to(v.dtype), state


def check_sizes(
    q: Tensor, k: Tensor, v: Tensor, per_head: Iterable[Tensor | None], state: Tensor | None, segments: Tensor | None
) -> None:
    """Refuse what does not fit: ``per_head`` begins with (B, T, H), as q, k and v do. Broadcasting would let some of it pass."""
    here = k.shape[:3]
    if q.shape != k.shape or any(x is not None and x.shape[:3] != here for x in (v, *per_head)) or not k.shape[3]:
        others = ", ".join(str(tuple(x.shape)) for x in per_head if x is not None)
        raise ValueError(
            f"queries and keys are (B, T, H, K) with K >= 1, and all other inputs begin with the same B, T and H; got queries "
            f"{tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}{others and ' and ' + others}"
        )
    if state is not None and state.shape != (here[0], here[2], k.shape[3], v.shape[3]):
        raise ValueError(f"the state is (B, H, K, V) = {(here[0], here[2], k.shape[3], v.shape[3])}, not {tuple(state.shape)}")
    if segments is not None and segments.shape != here[:2]:
        raise ValueError(f"segments are (B, T) = {tuple(here[:2])}, not {tuple(segments.shape)}")


def _stepped(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    outputs = []
    factor = None if decay is None else decay.exp()[..., None, :] if axis == "values" else decay.exp()[..., None]
    for t in range(q.shape[1]):
        kept = state if factor is None else factor[:, t] * state
        state = torch.addcmul(kept, k[:, t, :, :, None], v[:, t, :, None, :])
        outputs.append(q[:, t, :, None, :] @ state)
    out = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return out.transpose(1, 2), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor, segments: Tensor | None, scale: float, axis: str,
    chunk: int, sub: int,
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    while chunk > sub and chunk // 2 >= length:
        chunk //= 2
    # In stretches whose intermediate results caches hold: a long sequence is then not slower per token than a short one.
    # Each tensor is cut once: a slice per stretch would have a gradient of the whole length per stretch.
    stretch = max(chunk, STRETCH)
    parts: list[Any] = [x.split(stretch, 1) for x in (q, k, v)]
    for some in (decay, segments):
        parts.append([None] * len(parts[0]) if some is None else some.split(stretch, 1))
    before = None if segments is None else segments[:, :1]
    outputs = []
    for *qkv, decays, ids in zip(*parts, strict=True):
        xs = [_layout(x, chunk) for x in qkv]
        xs[0] = xs[0] * scale
        b = None if decays is None else _layout(decays, chunk).cumsum(3)
        same = carry = None
        if before is not None:
            same, carry = document_masks(before, ids, chunk, state.dtype)
            before = ids[:, -1:]
        if b is None or b.shape[-1] == 1:
            out, state = _HeadDecay.apply(*xs, b, state, same, carry)
        elif axis == "keys":
            out, state = _KeyDecay.apply(*xs, b, state, same, carry, sub)
        else:
            out, state = _ValueDecay.apply(*xs, b, state, same, carry, sub)
        out, count = out.flatten(2, 3), qkv[0].shape[1]
        outputs.append((out if out.shape[2] == count else out[:, :, :count]).transpose(1, 2))
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


def _layout(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, K) as (B, H, n, C, K), side by side in that order: all products are over C and K. The last chunk is filled up with
    zeros (decay 1, no key), which leave the state as it is."""
    x = x.transpose(1, 2)
    missing = -x.shape[2] % chunk
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).contiguous().unflatten(2, (-1, chunk))


def document_masks(before: Tensor, ids: Tensor, chunk: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Who is of whose document: pairs of a chunk (B, 1, n, C, C), and, with the document that enters a chunk, the rows that it
    enters, the rows that leave it, and all rows where it passes (3, B, 1, n, C)."""
    missing = -ids.shape[1] % chunk
    if missing:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1)
    ids = ids.unflatten(1, (-1, chunk))[:, None]
    last = ids[..., -1:]
    entering = torch.cat([before[:, None, :, None], last[:, :, :-1]], 2)
    carry = torch.stack([ids == entering, ids == last, (last == entering).expand_as(ids)])
    return (ids[..., :, None] == ids[..., None, :]).to(dtype), carry.to(dtype)


# Below, tensors are (B, H, n, C, *): n chunks of C tokens.


def _halves(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later halves of all blocks along the last but one axis: (..., C/m, m/2, K) each."""
    blocks = x.unflatten(-2, (-1, 2, block // 2))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _corner(matrix: Tensor, block: int) -> Tensor:
    """View of the lower left quarters of the diagonal blocks of (..., C, C) as (..., C/m, m/2, m/2)."""
    return diagonal_blocks(matrix, block)[..., block // 2 :, : block // 2]


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """View of the diagonal blocks of (..., C, C) as (..., C/m, m, m)."""
    tiles = matrix.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # (..., C/m, m, C/m, m)
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _levels(b: Tensor, sub: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each block length whose later half meets its earlier half by a matrix product: the length, and the factors
    e^{b - ref} of the later and e^{ref - b} of the earlier rows, about the last earlier row."""
    block = b.shape[-2]
    while block > sub:
        early, late = _halves(b, block)
        reference = early[..., -1:, :]
        yield block, (late - reference).exp_(), (reference - early).exp_()
        block //= 2


def _near(b: Tensor, sub: int) -> Iterator[tuple[int, Tensor]]:
    """For each distance inside the blocks that remain: it, and e^{b_i - b_(i - distance)}, (..., C/sub, sub - distance, K)."""
    blocks = b.unflatten(-2, (-1, sub))
    for distance in range(1, sub):
        yield distance, (blocks[..., distance:, :] - blocks[..., :-distance, :]).exp_()


Levels = Iterable[tuple[int, Tensor, Tensor]]
Near = Iterable[tuple[int, Tensor]]


def _scores(q: Tensor, k: Tensor, levels: Levels, near: Near, sub: int) -> Tensor:
    """P_ij = sum_c q_ic k_jc e^{b_ic - b_jc} for j <= i, else 0: (..., C, C)."""
    p = q.new_zeros(*q.shape[:-1], q.shape[-2])
    for block, grow_q, grow_k in levels:
        later, earlier = _halves(q, block)[1] * grow_q, _halves(k, block)[0] * grow_k
        _corner(p, block).copy_(later @ earlier.transpose(-1, -2))
    p.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    queries, keys, diagonal = q.unflatten(-2, (-1, sub)), k.unflatten(-2, (-1, sub)), diagonal_blocks(p, sub)
    for distance, factor in near:
        weighted = (queries[..., distance:, :] * factor).mul_(keys[..., :-distance, :])
        diagonal.diagonal(-distance, -2, -1).copy_(weighted.sum(-1))
    return p


def _spread(
    p: Tensor, levels: Levels, near: Near, sub: int, forth: tuple[Tensor, Tensor] | None, back: tuple[Tensor, Tensor] | None
) -> None:
    """Add what passes along the pairs j < i: for ``forth = (x, y)`` y_i += sum_j p_ij x_j e^{b_i - b_j}, for ``back = (x, y)``
    y_j += sum_i p_ij x_i e^{b_i - b_j}. Overwrites the factors of ``near``."""
    for block, grow_later, grow_earlier in levels:
        corner = _corner(p, block)
        if forth is not None:
            x, y = forth
            _halves(y, block)[1].addcmul_(corner @ (_halves(x, block)[0] * grow_earlier), grow_later)
        if back is not None:
            x, y = back
            _halves(y, block)[0].addcmul_(corner.transpose(-1, -2) @ (_halves(x, block)[1] * grow_later), grow_earlier)
    diagonal = diagonal_blocks(p, sub)
    for distance, factor in near:
        weight = factor.mul_(diagonal.diagonal(-distance, -2, -1)[..., None])
        if forth is not None:
            x, y = (some.unflatten(-2, (-1, sub)) for some in forth)
            y[..., distance:, :].addcmul_(weight, x[..., :-distance, :])
        if back is not None:
            x, y = (some.unflatten(-2, (-1, sub)) for some in back)
            y[..., :-distance, :].addcmul_(weight, x[..., distance:, :])


def _borders(b: Tensor, carry: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Factors between a chunk's rows and the states at its borders: e^b on what comes in, e^{b_C - b} on what goes out, and
    e^{b_C} (..., 1, K) on what passes; 0 where the documents differ."""
    end = b[..., -1:, :]
    incoming, outgoing, passing = b.exp(), (end - b).exp_(), end.exp()
    if carry is not None:
        incoming, outgoing = incoming * carry[0][..., None], outgoing * carry[1][..., None]
        passing = passing * carry[2][..., :1, None]
    return incoming, outgoing, passing


class _KeyDecay(torch.autograd.Function):
    """Decays along the keys; ``b`` (B, H, n, C, K) is the cumulative log-decay inside each chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor, same: Tensor | None, carry: Tensor | None, sub: int
    ) -> tuple[Tensor, Tensor]:
        p = _scores(q, k, _levels(b, sub), _near(b, sub), sub)
        if same is not None:
            p *= same
        incoming, outgoing, passing = _borders(b, carry)
        states, last = _pass((k * outgoing).transpose(-1, -2) @ v, passing.transpose(-1, -2), state)
        out = p @ v
        out += incoming.mul_(q) @ states
        ctx.save_for_backward(q, k, v, b, p, states, last, same, carry)
        ctx.sub = sub
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, p, states, last, same, carry = ctx.saved_tensors
        d_out = d_out.contiguous()
        incoming, outgoing, passing = _borders(b, carry)
        d_after, d_first = _pass_back((q * incoming).transpose(-1, -2) @ d_out, passing.transpose(-1, -2), d_state)
        d_q = (d_out @ states.transpose(-1, -2)).mul_(incoming)
        d_k = (v @ d_after.transpose(-1, -2)).mul_(outgoing)
        d_v = (k * outgoing) @ d_after
        d_v += p.transpose(-1, -2) @ d_out
        d_p = d_out @ v.transpose(-1, -2)
        if same is not None:
            d_p *= same
        _spread(d_p, _levels(b, ctx.sub), _near(b, ctx.sub), ctx.sub, (k, d_q), (q, d_k))
        d_b = (q * d_q).addcmul_(k, d_k, value=-1)
        # The decay of a chunk's last row also scales the state that passes through, and all that the chunk adds to it.
        d_b[..., -1, :] += _left(d_after, states, last).sum(-1)
        own = d_p.diagonal(dim1=-2, dim2=-1)[..., None]  # A row's own key meets no decay.
        return d_q.addcmul_(own, k), d_k.addcmul_(own, q), d_v, d_b, d_first, None, None, None


class _ValueDecay(torch.autograd.Function):
    """Decays along the values; ``b`` (B, H, n, C, V) is the cumulative log-decay inside each chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor, same: Tensor | None, carry: Tensor | None, sub: int
    ) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2)
        if same is not None:
            scores *= same
        incoming, outgoing, passing = _borders(b, carry)
        states, last = _pass(k.transpose(-1, -2) @ (v * outgoing), passing, state)
        strict = (q @ states).mul_(incoming)
        _spread(scores, _levels(b, sub), _near(b, sub), sub, (v, strict), None)
        own = scores.diagonal(dim1=-2, dim2=-1)[..., None]  # A row's own value meets no decay.
        ctx.save_for_backward(q, k, v, b, scores, states, last, same, carry, strict)
        ctx.sub = sub
        return torch.addcmul(strict, own, v), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, scores, states, last, same, carry, strict = ctx.saved_tensors
        sub, d_out = ctx.sub, d_out.contiguous()
        incoming, outgoing, passing = _borders(b, carry)
        d_incoming = d_out * incoming
        d_after, d_first = _pass_back(q.transpose(-1, -2) @ d_incoming, passing, d_state)
        levels, near = list(_levels(b, sub)), list(_near(b, sub))
        d_scores = _scores(d_out, v, levels, near, sub)
        if same is not None:
            d_scores *= same
        d_q = d_scores @ k
        d_q += d_incoming @ states.transpose(-1, -2)
        d_k = d_scores.transpose(-1, -2) @ q
        d_k += (v * outgoing) @ d_after.transpose(-1, -2)
        d_v = (k @ d_after).mul_(outgoing)
        _spread(scores, levels, near, sub, None, (d_out, d_v))
        d_b = (d_out * strict).addcmul_(v, d_v, value=-1)
        d_b[..., -1, :] += _left(d_after, states, last).sum(-2)
        d_v.addcmul_(scores.diagonal(dim1=-2, dim2=-1)[..., None], d_out)
        return d_q, d_k, d_v, d_b, d_first, None, None, None


class _HeadDecay(torch.autograd.Function):
    """One decay per head, ``b`` (B, H, n, C, 1) being its cumulative logarithm inside each chunk, or none."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor | None, state: Tensor, same: Tensor | None, carry: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        p = _pair_factors(b, same, q @ k.transpose(-1, -2))
        incoming, outgoing, passing = _head_borders(b, carry)
        states, last = _pass((k if outgoing is None else k * outgoing).transpose(-1, -2) @ v, passing, state)
        out = p @ v
        out += (q if incoming is None else q * incoming) @ states
        ctx.save_for_backward(q, k, v, b, p, states, last, same, carry)
        return out, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, p, states, last, same, carry = ctx.saved_tensors
        d_out = d_out.contiguous()
        incoming, outgoing, passing = _head_borders(b, carry)
        d_after, d_first = _pass_back((q if incoming is None else q * incoming).transpose(-1, -2) @ d_out, passing, d_state)
        d_q = d_out @ states.transpose(-1, -2)
        d_k = v @ d_after.transpose(-1, -2)
        d_v = (k if outgoing is None else k * outgoing) @ d_after
        if incoming is not None and outgoing is not None:
            d_q *= incoming
            d_k *= outgoing
        d_v += p.transpose(-1, -2) @ d_out
        d_p = _pair_factors(b, same, d_out @ v.transpose(-1, -2))
        d_q += d_p @ k
        d_k += d_p.transpose(-1, -2) @ q
        d_b = None
        if b is not None:
            # A row's own key, which meets no decay, cancels here.
            d_b = (q * d_q).addcmul_(k, d_k, value=-1).sum(-1, keepdim=True)
            d_b[..., -1, 0] += _left(d_after, states, last).sum((-2, -1))
        return d_q, d_k, d_v, d_b, d_first, None, None


def _pair_factors(b: Tensor | None, same: Tensor | None, scores: Tensor) -> Tensor:
    """Multiplies, in place, the scores of the pairs j <= i by e^{b_i - b_j}, those of other pairs or documents by 0."""
    if b is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        scores *= (b - b.transpose(-1, -2)).masked_fill_(later, -torch.inf).exp_()
    else:
        scores.tril_()
    return scores if same is None else scores.mul_(same)


def _head_borders(b: Tensor | None, carry: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`_borders` of one decay per head, or of none: None where all factors are 1."""
    if b is not None:
        return _borders(b, carry)
    return (None, None, None) if carry is None else (carry[0][..., None], carry[1][..., None], carry[2][..., :1, None])


def _pass(added: Tensor, decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states that enter the chunks (B, H, n, K, V), and the last to leave: S_{n+1} = decay_n S_n + added_n."""
    states = [state]
    for new, factor in _steps(added, decay):
        states.append(states[-1] + new if factor is None else torch.addcmul(new, states[-1], factor))
    return torch.stack(states[:-1], 2), states[-1]


def _pass_back(added: Tensor, decay: Tensor | None, last: Tensor) -> tuple[Tensor, Tensor]:
    """The same from behind, D_n = decay_n D_{n+1} + added_n with D_N = ``last``: D_1 .. D_N, which belong to the states that leave
    the chunks, and D_0."""
    states = [last]
    for new, factor in reversed(_steps(added, decay)):
        states.append(states[-1] + new if factor is None else torch.addcmul(new, states[-1], factor))
    return torch.stack(states[-2::-1], 2), states[-1]


def _steps(added: Tensor, decay: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    news = added.unbind(2)
    return list(zip(news, [None] * len(news) if decay is None else decay.unbind(2), strict=True))


def _left(d_after: Tensor, states: Tensor, last: Tensor) -> Tensor:
    """The states that leave the chunks times their gradients."""
    return d_after * torch.cat([states[:, :, 1:], last[:, :, None]], 2)
