"""The gated delta rule in chunks: a matrix state that replaces what it holds under a key, instead of adding to it.

Per head, with a state S (K x V), a decay exp(la) <= 1, a writing strength beta and inputs q, k (K), v (V):

    S <- exp(la_t) S        z_t = v_t - k_t S        S <- S + beta_t k_t^T z_t        o_t = scale * q_t S

that is, S_t = exp(la_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t. Keys of length 1 and beta in [0, 2] keep the
transition's eigenvalues in [-1, 1].

Chunked form (Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024, arXiv 2406.06484,
section 3; with decays Yang et al., Gated Delta Networks, 2024, arXiv 2412.06464, section 3.3). Inside a chunk of length C, with
b the cumulative sum of la, G_ij = e^{b_i - b_j} and M the part of G * (K K^T) below the diagonal, the errors z of all tokens
solve one unit lower triangular system, (I + M diag(beta)) Z = V - (e^b K) S. Its inverse is I - N diag(beta), with

    N = (I + M diag(beta))^{-1} M

a strictly lower triangular matrix that also serves the transposed system of the backward pass. So

    Z = (V - N diag(beta) V) - (e^b K - N diag(beta) e^b K) S
    O = scale * ((e^b Q) S + lower(G * Q K^T) diag(beta) Z)
    S <- e^{b_C} S + (e^{b_C - b} K)^T diag(beta) Z

Only differences b_i - b_j with i >= j are ever exponentiated, so every factor is at most 1; they are summed by themselves, since
cumulative sums would round away what follows a token that forgets nearly everything. N is made of diagonal blocks of
:data:`SOLVED` tokens by substitution, then by doubling: of the N_11 and N_22 of two neighbouring blocks and the M_21 between
them, N_21 = (I - N_22 beta) M_21 (I - beta N_11), which is as stable as substitution and consists of matrix products. All of
this is done for all chunks, heads and sequences at once; only the states pass from chunk to chunk in a loop.

The backward pass is our own. It keeps q and k, the pairs' scores and decays, N, Z, the factor of S in Z and the states at the
chunks' borders. Per chunk, from the gradients of the outputs and of the state that the chunk leaves, it has

    dW = P^T dO + (e^{b_C - b} K) dS        of what is written, W = diag(beta) Z, where P = lower(G * Q K^T)
    dR = dW - N^T diag(beta) dW             so that dV = diag(beta) dR and dbeta_t = dR_t . Z_t

and the gradients of the scores of all pairs, [P; M], are one product [dO; -dV] W^T. That of the decays needs no C x C matrix:
b_t multiplies what q_t and k_t read and divides what k_t writes, so db_t = q_t . dq_t + k_t . (dk_t as read - dk_t as written).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatework.ops import fla
from gatework.ops.linear_recurrence import STEP_LENGTH, check_sizes, diagonal_blocks, document_masks
from gatework.ops.precision import without_autocast

#: Tokens whose chunks are computed at once.
STRETCH = 256
#: Length of the diagonal blocks whose systems are solved by substitution.
SOLVED = 8


def unit(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """``x / sqrt(sum_c x_c^2 + 1e-6)``, computed in float32 or better: vectors of length 1, and 0 for 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def gated_delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None = None,
    *,
    state: Float[Tensor, "B H K V"] | None = None,
    segments: Int[Tensor, "B T"] | None = None,
    scale: float | None = None,
    chunk: int = 32,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Run the rule over T tokens; returns the outputs and the state after the last token.

    Args:
        q, k: queries and keys (B, T, H, K); the rule is stable for keys of length at most 1.
        v: values (B, T, H, V).
        beta: writing strengths (B, T, H), between 0 and 2.
        log_decay: logarithms of the decays, at most 0, (B, T, H); None is the delta rule without decay, which costs less.
        state: the state (B, H, K, V) before the first token; None is zero.
        segments: ids of packed documents (B, T), equal ids contiguous: the state is forgotten where the id changes.
            The given ``state`` then belongs to the first token's document.
        scale: factor on q; None is K^-1/2.
        chunk: length of a chunk, a power of two.

    The outputs have v's dtype; inside, half precisions are computed in float32, and so is the state returned. Double
    backward is not supported. On CUDA, half precisions go to the kernels of :mod:`gatework.ops.fla` where those are installed.

    Raises:
        ValueError: for a chunk length that is not a power of two, or inputs whose sizes do not fit each other.
    """
    check_sizes(q, k, v, (beta, log_decay), state, segments)
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk {chunk} must be a power of two")
    if segments is None and q.shape[1] > STEP_LENGTH and fla.available(q, k, v):
        return fla.delta_rule(q, k, v, beta, log_decay, scale, state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q.device):
        q, k, values, beta = (x.to(dtype) for x in (q, k, v, beta))
        if log_decay is not None:
            log_decay = log_decay.to(dtype)
        if state is None:
            state = values.new_zeros(len(k), *k.shape[2:], v.shape[-1])
        state = state.to(dtype)
        length = q.shape[1]
        if length == 0:
            return v.clone(), state
        given = (x for x in (q, k, values, beta, log_decay, state) if x is not None)
        recording = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        if length <= STEP_LENGTH and not recording and segments is None:
            out, state = _stepped(q, k, values, beta, log_decay, state, scale)
        else:
            out, state = _chunked(q, k, values, beta, log_decay, state, segments, scale, chunk)
        return out.to(v.dtype), state


def _stepped(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    # The key and the query read the old state together; what the key then writes reaches the query by their product.
    rows, meets = torch.stack([k, q * scale], 3), scale * (q * k).sum(-1, keepdim=True)
    outputs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            state = state * log_decay[:, t, :, None, None].exp()
        known, out = (rows[:, t] @ state).unbind(2)
        written = (v[:, t] - known) * beta[:, t, :, None]
        state = torch.addcmul(state, k[:, t, :, :, None], written[:, :, None])
        outputs.append(torch.addcmul(out, meets[:, t], written))
    return torch.stack(outputs, 1), state


def _chunked(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor, segments: Tensor | None,
    scale: float, chunk: int,
) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    while chunk // 2 >= length:
        chunk //= 2
    # In stretches whose intermediate results caches hold: a long sequence is then not slower per token than a short one.
    stretch = max(chunk, STRETCH)
    inputs = [x.split(stretch, 1) for x in (q, k, v, beta)]
    decays = [None] * len(inputs[0]) if log_decay is None else log_decay.split(stretch, 1)
    documents = [None] * len(inputs[0]) if segments is None else segments.split(stretch, 1)
    before: Tensor | None = None
    outputs = []
    for *xs, decay, ids in zip(*inputs, decays, documents, strict=True):
        same = carry = None
        if ids is not None:
            same, carry = document_masks(ids[:, :1] if before is None else before, ids, chunk, state.dtype)
            before = ids[:, -1:]
        given = [None if x is None else _cut(x, chunk) for x in (*xs, decay)]
        out, state = _Chunks.apply(*given, state, same, carry, scale)
        outputs.append(out.flatten(1, 2)[:, : xs[0].shape[1]])
    return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0], state


def _cut(x: Tensor, chunk: int) -> Tensor:
    """(B, T, *) as (B, n, C, *), filled up with zeros (decay 1, nothing written), which leave the state as it is."""
    missing = -x.shape[1] % chunk
    return (F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)) if missing else x).unflatten(1, (-1, chunk))


def _chunks(x: Tensor) -> Tensor:
    """(B, n, C, H, *) as (n, B, H, C, *): what belongs to one chunk lies together."""
    return x.transpose(0, 1).movedim(3, 2)


def _tokens(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(n B H, C, *) as (B, n, C, H, *)."""
    return x.unflatten(0, shape).movedim(2, 3).transpose(0, 1)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _weights(beta: Tensor, log_decay: Tensor | None, same: Tensor | None) -> Tensor:
    """What a token reads of what an earlier one has written, 0 above the diagonal: (n B H, 1, C, C), or (1, 1, C, C) for all."""
    batch, count, chunk, heads = beta.shape
    weights = lower = beta.new_ones(1, chunk, chunk).tril()
    if log_decay is not None:
        # b_i - b_j as a sum, not as a difference: that of two cumulative sums would lose what a strong decay leaves small.
        weights = (_chunks(log_decay).flatten(0, 2)[:, :, None] * lower.tril(-1)).cumsum(1).exp_().mul_(lower)
    if same is not None:
        weights = weights.expand(count * batch * heads, -1, -1).unflatten(0, (count, batch, heads))
        weights = (weights * same.movedim(2, 0)).flatten(0, 2)
    return weights[:, None]


def _borders(
    beta: Tensor, log_decay: Tensor | None, weights: Tensor, carry: Tensor | None
) -> tuple[Tensor | None, Tensor | None, list[Any]]:
    """What decays (and the borders of documents) leave; None is 1.

    Of what a token reads from the incoming state (n B H, C, 1), of what it writes to the outgoing one (n B H, C, 1), and of the
    state that passes through, n times (B H, 1, 1).
    """
    batch, count, chunk, heads = beta.shape
    grow = fade = None
    if log_decay is not None:
        grow = _chunks(log_decay).cumsum(3).exp()
        fade = grow[..., -1:]
    if carry is not None:
        read, _, through = (x.movedim(2, 0).expand(count, batch, heads, chunk) for x in carry.unbind(0))
        grow, fade = _scaled(read, grow), _scaled(through[..., :1], fade)
    if grow is None or fade is None:
        return None, None, [None] * count
    # The outgoing state is read by the last token.
    shrink = weights[:, 0, -1, :, None]
    return grow.flatten(0, 2)[..., None], shrink, list(fade.reshape(count, batch * heads, 1, 1).unbind(0))


class _Chunks(torch.autograd.Function):
    """The chunked form on (B, n, C, H, *) tensors.

    Inside, (n B H) chunks are one batch, and queries and keys, which read alike, the two halves of ``rows``.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor,
        same: Tensor | None, carry: Tensor | None, scale: float,
    ) -> tuple[Tensor, Tensor]:
        batch, count, chunk, heads, width = k.shape
        shape = count, batch, heads
        rows = k.new_empty(count * batch * heads, 2, chunk, width)
        queries, keys = rows.unbind(1)
        queries.unflatten(0, shape).copy_(_chunks(q))
        keys.unflatten(0, shape).copy_(_chunks(k))
        strength = _chunks(beta).flatten(0, 2)  # (n B H, C)
        weights = _weights(beta, log_decay, same)
        grow, shrink, fades = _borders(beta, log_decay, weights, carry)

        pairs = torch.bmm(rows.flatten(1, 2), keys.transpose(1, 2)).unflatten(1, (2, chunk)).mul_(weights)
        scores, inverse = pairs.unbind(1)
        inverse.diagonal(dim1=1, dim2=2).zero_()
        corrections = _invert(inverse, strength)
        strength = strength[..., None]

        # The errors without a state, and what the state is multiplied with.
        values, reads = _chunks(v).flatten(0, 2), _scaled(keys, grow)
        errors = torch.baddbmm(values, corrections, values, alpha=-1)
        reads = torch.baddbmm(reads, corrections, reads, alpha=-1)
        outgoing = (keys * _scaled(strength, shrink)).transpose(1, 2)
        last, states = state.flatten(0, 1), []
        each = (x.unflatten(0, (count, batch * heads)).unbind(0) for x in (errors, reads, outgoing))
        for error, read, out, fade in zip(*each, fades, strict=True):
            states.append(last)
            error.baddbmm_(read, last, alpha=-1)
            last = torch.baddbmm(_scaled(last, fade), out, error)
        before = torch.cat(states)
        out = torch.bmm(scores, errors * strength)
        out.baddbmm_(_scaled(queries, grow), before, beta=scale, alpha=scale)
        ctx.save_for_backward(rows, pairs, weights, errors, reads, before, last, beta, log_decay, carry)
        ctx.scale = scale
        return _tokens(out, shape), last.unflatten(0, (batch, heads)).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        rows, pairs, weights, errors, reads, before, last, beta, log_decay, carry = ctx.saved_tensors
        batch, count, chunk, heads, width = d_out.shape
        shape = count, batch, heads
        grow, shrink, fades = _borders(beta, log_decay, weights, carry)
        queries, keys = rows.unbind(1)
        scores, inverse = pairs.unbind(1)
        strength = _chunks(beta).flatten(0, 2)[..., None]

        d_read = d_out.new_empty(count * batch * heads, 2, chunk, width)  # Of what queries read, and of minus what keys read.
        d_read[:, 0].unflatten(0, shape).copy_(_chunks(d_out)).mul_(ctx.scale)
        d_written = torch.bmm(scores.transpose(1, 2), d_read[:, 0])
        d_before = torch.bmm(_scaled(queries, grow).transpose(1, 2), d_read[:, 0])
        outgoing, incoming = _scaled(keys, shrink), (reads * strength).transpose(1, 2)
        d_last, d_after = d_state.flatten(0, 1), []
        each = (x.unflatten(0, (count, batch * heads)).unbind(0) for x in (d_written, d_before, outgoing, incoming))
        for d_write, d_old, out, into, fade in reversed(list(zip(*each, fades, strict=True))):
            d_after.append(d_last)
            d_write.baddbmm_(out, d_last)
            d_old = d_old.add_(d_last) if fade is None else d_old.addcmul_(d_last, fade)
            d_last = d_old.baddbmm_(into, d_write, alpha=-1)
        d_left = torch.cat(d_after[::-1])  # Of the states after each chunk.

        d_errors = torch.baddbmm(d_written, inverse.transpose(1, 2), d_written * strength, alpha=-1)
        d_beta = (d_errors * errors).sum(-1)
        d_v = d_errors.mul_(strength)
        d_read[:, 1] = -d_v
        written = errors * strength
        d_pairs = torch.bmm(d_read.flatten(1, 2), written.transpose(1, 2)).unflatten(1, (2, chunk)).mul_(weights)
        d_pairs[:, 1].diagonal(dim1=1, dim2=2).zero_()
        d_pairs = d_pairs.flatten(1, 2)
        d_rows = torch.bmm(d_read.flatten(1, 2), before.transpose(1, 2)).unflatten(1, (2, chunk))
        d_keys = torch.bmm(written, d_left.transpose(1, 2))
        if grow is not None and shrink is not None:
            d_rows *= grow[:, None]
            d_keys *= shrink
        d_rows.flatten(1, 2).baddbmm_(d_pairs, keys)
        d_keys.baddbmm_(d_pairs.transpose(1, 2), rows.flatten(1, 2))
        d_decay = None
        if log_decay is not None:
            d_b = (rows * d_rows).sum(-1).sum(1) - (keys * d_keys).sum(-1)
            # The decay of a chunk's last row also scales the state that passes through, and all that the chunk adds to it.
            d_b[:, -1] += (d_left * torch.cat([before[batch * heads :], last])).sum((-1, -2))
            d_decay = _tokens(d_b.flip(1).cumsum(1).flip(1), shape)
        d_q, d_read_keys = d_rows.unbind(1)
        d_keys += d_read_keys
        grads = (_tokens(x, shape) for x in (d_q, d_keys, d_v, d_beta))
        return *grads, d_decay, d_last.unflatten(0, (batch, heads)), None, None, None


def _invert(matrix: Tensor, strength: Tensor) -> Tensor:
    """Turn the strictly lower triangular M (N, C, C) into N = (I + M diag(beta))^{-1} M in place; returns N diag(beta)."""
    chunk = matrix.shape[-1]
    scaled = matrix * strength[:, None]
    block = min(SOLVED, chunk)
    tiles, factors = (diagonal_blocks(x, block).permute(2, 3, 0, 1).contiguous() for x in (matrix, scaled))  # (s, s, N, C / s)
    for i in range(2, block):
        tiles[i, : i - 1] -= (factors[i, 1:i, None] * tiles[1:i, : i - 1]).sum(0)
    tiles = tiles.permute(2, 3, 0, 1)
    diagonal_blocks(matrix, block).copy_(tiles)
    diagonal_blocks(scaled, block).copy_(tiles * strength.unflatten(1, (-1, 1, block)))
    while block < chunk:
        for start in range(0, chunk, 2 * block):
            early, late = slice(start, start + block), slice(start + block, start + 2 * block)
            corner = torch.baddbmm(matrix[:, late, early], scaled[:, late, early], matrix[:, early, early], alpha=-1)
            corner = torch.baddbmm(corner, scaled[:, late, late], corner, alpha=-1)
            matrix[:, late, early] = corner
            scaled[:, late, early] = corner * strength[:, None, early]
        block *= 2
    return scaled
