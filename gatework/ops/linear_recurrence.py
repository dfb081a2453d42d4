"""The gated linear recurrence in chunks: one algorithm for every mixer with a decayed, rank-one-updated matrix state.

Per head, with a state S (K x V), decays exp(la) <= 1 on the key axis and inputs q, k (K), v (V):

    S_t = diag(exp la_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

Chunked form (Yang et al., Gated Linear Attention, 2023, arXiv 2312.06635, section 4), with b the cumulative sum of la
inside a chunk of length C:

    o_i = (q_i e^{b_i}) S + sum_{j <= i} P_ij v_j        P_ij = sum_c q_ic k_jc e^{b_ic - b_jc}
    S  <- diag(e^{b_C}) S + (k e^{b_C - b})^T v

Only differences b_i - b_j with i >= j are ever exponentiated, so every factor is at most 1. P is built by halving
instead of the paper's one level of
sub-blocks: inside every block of length m (C, C/2, ... down to 2 ``sub_chunk``) the later half's rows meet the
    earlier half's columns by a plain matrix
product about the reference row just before the later half, (q_I e^{b_I - ref}) (k_J e^{ref - b_J})^T; the blocks of
``sub_chunk`` that remain on the diagonal are explicit (sub x sub x K) products. All blocks of a level, of all chunks,
heads and sequences are one batched product; only the states pass from chunk to chunk in a loop.

The backward pass is our own: it keeps q, k, v, b, P and the states at the chunks' borders, and gets the decays'
gradient from d/db_t = q_t * dq_t - k_t * dk_t, which needs no K x V tensor per token.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatework.ops.precision import without_autocast

#: Up to this many tokens, without gradients, the recurrence is stepped: cheaper than a chunk, and what decoding does.
STEP_LENGTH = 4
#: Tokens whose chunks are computed at once.
STRETCH = 512


def gated_linear_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K2"],
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    segments: Int[Tensor, "B T"] | None = None,
    scale: float | None = None,
    chunk: int = 64,
    sub_chunk: int = 4,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Run the recurrence over T tokens; returns the outputs and the state after the last token.

    Args:
        q, k: queries and keys (B, T, H, K).
        v: values (B, T, H, V).
        log_decay: logarithms of the decays, at most 0, (B, T, H, K), or (B, T, H, 1) for one decay per head.
        state: the state (B, H, K, V) before the first token; None is zero.
        segments: ids of packed documents (B, T), equal ids contiguous: the state is forgotten where the id changes.
            The given ``state`` then belongs to the first token's document.
        scale: factor on q; None is K^-1/2.
        chunk, sub_chunk: lengths of a chunk and of the explicit blocks on its diagonal, powers of two.

    The outputs have v's dtype; inside, half precisions are computed in float32, and so is the state returned. Double
    backward is not supported.

    Raises:
        ValueError: for chunk lengths that are not powers of two with ``sub_chunk <= chunk``.
    """
    if chunk < 1 or chunk & (chunk - 1) or sub_chunk < 1 or sub_chunk & (sub_chunk - 1) or sub_chunk > chunk:
        raise ValueError(f"chunk {chunk} and sub_chunk {sub_chunk} must be powers of two with sub_chunk <= chunk")
    dtype = torch.promote_types(v.dtype, torch.float32)
    length, scale = q.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        # (B, T, H, *) -> (B, H, T, *), in the computing dtype and in that order: all products below are over T and K.
        q, k, values, decay = (x.transpose(1, 2).to(dtype).contiguous() for x in (q * scale, k, v, log_decay.expand_as(k)))
        if state is None:
            state = values.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
        state = state.to(dtype)
        recording = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, values, decay, state))
        if length == 0:
            return v.new_zeros(v.shape), state
        if length <= STEP_LENGTH and not recording and segments is None:
            out, state = _stepped(q, k, values, decay, state)
        else:
            out, state = _chunked(q, k, values, decay, state, segments, chunk, sub_chunk)
        return out.transpose(1, 2).to(v.dtype), state


def _stepped(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    factor = decay.exp()
    for t in range(q.shape[2]):
        state = factor[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None, :]
        outputs.append(q[:, :, t, None, :] @ state)
    return torch.cat(outputs, 2), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, segments: Tensor | None, chunk: int, sub: int
) -> tuple[Tensor, Tensor]:
    length = q.shape[2]
    while chunk > sub and chunk // 2 >= length:
        chunk //= 2
    missing = -length % chunk
    if missing:
        # Padding with zeros (decay 1, no key) leaves the state as it is.
        q, k, v, decay = (torch.nn.functional.pad(x, (0, 0, 0, missing)) for x in (q, k, v, decay))
        if segments is not None:
            segments = torch.cat([segments, segments[:, -1:].expand(-1, missing)], 1)
    q, k, v, decay = (x.unflatten(2, (-1, chunk)) for x in (q, k, v, decay))
    same = carry = None
    if segments is not None:
        ids = segments.unflatten(1, (-1, chunk))[:, None]  # (B, 1, n, C)
        last = ids[..., -1:]
        before = torch.cat([ids[:, :, :1, :1], last[:, :, :-1]], 2)  # The document that the incoming state belongs to.
        same = (ids[..., :, None] == ids[..., None, :]).to(q.dtype)
        carry = torch.stack([ids == before, ids == last, (last == before).expand_as(ids)]).to(q.dtype)
    # In stretches whose intermediate results caches hold: a long sequence is then not slower per token than a short one.
    stretch = max(1, STRETCH // chunk)
    stretches = [x.split(stretch, 2) for x in (q, k, v, decay)]
    same_parts, carry_parts = (
        [None] * len(stretches[0]) if x is None else x.split(stretch, axis) for x, axis in ((same, 2), (carry, 3))
    )
    outputs = []
    for *xs, b, same_part, carry_part in zip(*stretches, same_parts, carry_parts, strict=True):
        out, state = _Chunks.apply(*xs, b.cumsum(3), state, same_part, carry_part, sub)
        outputs.append(out)
    out = torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]
    return out.flatten(2, 3)[:, :, :length], state


def _levels(chunk: int, sub: int) -> list[int]:
    """The block lengths whose later half meets their earlier half by a matrix product."""
    lengths = []
    while chunk > sub:
        lengths.append(chunk)
        chunk //= 2
    return lengths


def _halves(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later halves of all blocks along the last but one axis: (..., C/m, m/2, K) each."""
    blocks = x.unflatten(-2, (-1, 2, block // 2))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _corner(matrix: Tensor, block: int) -> Tensor:
    """View of the lower left quarters of the diagonal blocks of (..., C, C) as (..., C/m, m/2, m/2)."""
    return _diagonal(matrix, block)[..., block // 2 :, : block // 2]


def _diagonal(matrix: Tensor, block: int) -> Tensor:
    """View of the diagonal blocks of (..., C, C) as (..., C/m, m, m)."""
    tiles = matrix.unflatten(-1, (-1, block)).unflatten(-3, (-1, block))  # (..., C/m, m, C/m, m)
    return tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _scaled(q: Tensor, k: Tensor, b: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For one level: later queries and earlier keys about the reference row, and the factors that scaled them."""
    early, late = _halves(b, block)
    reference = early[..., -1:, :]
    grow_q, grow_k = (late - reference).exp(), (reference - early).exp()
    return _halves(q, block)[1] * grow_q, _halves(k, block)[0] * grow_k, grow_q, grow_k


def _pairs(b: Tensor, distance: int) -> Tensor:
    """exp(b_i - b_(i - distance)) inside blocks (..., C/sub, sub, K): (..., C/sub, sub - distance, K)."""
    return (b[..., distance:, :] - b[..., :-distance, :]).exp_()


class _Chunks(torch.autograd.Function):
    """The chunked form on (B, H, n, C, *) tensors; ``b`` is the cumulative log-decay inside each chunk."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, b: Tensor, state: Tensor, same: Tensor | None, carry: Tensor | None, sub: int
    ) -> tuple[Tensor, Tensor]:
        chunk = q.shape[-2]
        p = q.new_zeros(*q.shape[:-1], chunk)
        for block in _levels(chunk, sub):
            later_q, early_k, _, _ = _scaled(q, k, b, block)
            _corner(p, block).copy_(later_q @ early_k.transpose(-1, -2))
        p.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        queries, keys, blocks, diagonal = (*(x.unflatten(-2, (-1, sub)) for x in (q, k, b)), _diagonal(p, sub))
        for near in range(1, sub):
            weighted = _pairs(blocks, near).mul_(queries[..., near:, :]).mul_(keys[..., :-near, :])
            diagonal.diagonal(-near, -2, -1).copy_(weighted.sum(-1))
        if same is not None:
            p *= same
        end = b[..., -1:, :]
        incoming, outgoing, decay = q * b.exp(), k * (end - b).exp(), end.exp()
        if carry is not None:
            incoming, outgoing = incoming * carry[0][..., None], outgoing * carry[1][..., None]
            decay = decay * carry[2][..., :1, None]
        states = _pass(outgoing.transpose(-1, -2) @ v, decay.transpose(-1, -2), state)
        out = p @ v
        out += incoming @ states[:, :, :-1]
        ctx.save_for_backward(q, k, v, b, p, states, same, carry)
        ctx.sub = sub
        return out, states[:, :, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, b, p, states, same, carry = ctx.saved_tensors
        sub, chunk = ctx.sub, q.shape[-2]
        end = b[..., -1:, :]
        grow_q, grow_k, decay = b.exp(), (end - b).exp(), end.exp()
        if carry is not None:
            grow_q, grow_k = grow_q * carry[0][..., None], grow_k * carry[1][..., None]
            decay = decay * carry[2][..., :1, None]
        # Gradients of the states after each chunk, passed backwards; d_states[n] belongs to the state that chunk n
        # leaves.
        d_states = _pass_back((q * grow_q).transpose(-1, -2) @ d_out, decay.transpose(-1, -2), d_state)
        d_after = d_states[:, :, 1:]
        d_q = (d_out @ states[:, :, :-1].transpose(-1, -2)).mul_(grow_q)
        d_k = (v @ d_after.transpose(-1, -2)).mul_(grow_k)
        d_v = (k * grow_k) @ d_after
        d_v += p.transpose(-1, -2) @ d_out
        # The decay of a chunk's last row also scales the state that passes through, and all that the chunk adds to it.
        d_b = q * d_q - k * d_k
        d_end = (d_after * states[:, :, 1:]).sum(-1)

        d_p = d_out @ v.transpose(-1, -2)
        if same is not None:
            d_p *= same
        for block in _levels(chunk, sub):
            later_q, early_k, up_q, up_k = _scaled(q, k, b, block)
            corner = _corner(d_p, block)
            dq_level = (corner @ early_k).mul_(up_q)
            dk_level = (corner.transpose(-1, -2) @ later_q).mul_(up_k)
            _halves(d_q, block)[1].add_(dq_level)
            _halves(d_k, block)[0].add_(dk_level)
            _halves(d_b, block)[1].addcmul_(_halves(q, block)[1], dq_level)
            _halves(d_b, block)[0].addcmul_(_halves(k, block)[0], dk_level, value=-1)
        own = d_p.diagonal(dim1=-2, dim2=-1)[..., None]  # A row's own key meets no decay.
        d_q.addcmul_(own, k)
        d_k.addcmul_(own, q)
        queries, keys, blocks, diagonal = (*(x.unflatten(-2, (-1, sub)) for x in (q, k, b)), _diagonal(d_p, sub))
        dq_blocks, dk_blocks, db_blocks = (x.unflatten(-2, (-1, sub)) for x in (d_q, d_k, d_b))
        for near in range(1, sub):
            query, key = queries[..., near:, :], keys[..., :-near, :]
            weighted = _pairs(blocks, near).mul_(diagonal.diagonal(-near, -2, -1)[..., None])
            dq_blocks[..., near:, :].addcmul_(weighted, key)
            dk_blocks[..., :-near, :].addcmul_(weighted, query)
            weighted.mul_(query).mul_(key)
            db_blocks[..., near:, :].add_(weighted)
            db_blocks[..., :-near, :].sub_(weighted)
        d_b[..., -1, :] += d_end
        return d_q, d_k, d_v, d_b, d_states[:, :, 0].clone(), None, None, None


def _pass(added: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """States before each chunk and after the last, (B, H, n+1, K, V): S_{n+1} = decay_n S_n + added_n."""
    states = [state]
    for new, factor in zip(added.unbind(2), decay.unbind(2), strict=True):
        states.append(torch.addcmul(new, states[-1], factor))
    return torch.stack(states, 2)


def _pass_back(added: Tensor, decay: Tensor, last: Tensor) -> Tensor:
    """The same from behind: D_n = decay_n D_{n+1} + added_n with D_N = last."""
    states = [last]
    for new, factor in zip(reversed(added.unbind(2)), reversed(decay.unbind(2)), strict=True):
        states.append(torch.addcmul(new, states[-1], factor))
    return torch.stack(states[::-1], 2)
