"""``Lizard``: gated linear attention over the whole past plus softmax attention with sinks over a short window.

Nguyen et al., Lizard: An Efficient Linearization Framework for Large Language Models, 2025, arXiv 2507.09025, section 3. It
replaces the softmax attention of a trained decoder and reuses its four projections (:func:`gatework.surgery.lizard` does that);
here it is a mixer of its own. Per head of width K, with q = x W_q, k = x W_k, v = x W_v as attention makes them, F features and one
gate g_t:

    phi(u) = [exp(u W), exp(-u W)]                                            W (K, F), one for queries, one for keys
    y_t = sum_{j<=t} c_tj phi_q(q_t).phi_k(k_j) v_j / sum_{j<=t} c_tj phi_q(q_t).phi_k(k_j)    c_tj = prod_{l=j+1..t} g_l
    a_t = sum_{t-w<j<=t} exp(s_tj) v_j / (sum_i exp(t_i) + sum_{t-w<j<=t} exp(s_tj))           s_tj = rope(q_t).rope(k_j) / sqrt(K)
    o_t = y_t + alpha a_t        output: concat_h(o_t) W_o        g_t = sigmoid(x_t W_g)

The gates take the place of positions in y, which has no rotation; the m sinks t_i of the window ("meta memory") are logits without
values, so that the window can say that it has found nothing.

How it is computed. The recurrence keeps the numerator and the denominator together, as ``S_t = g_t S_{t-1} + phi_k(k_t)^T [v_t,
1]``. Its exponentials are taken relative to the running maximum of each feature, ``M_t = max(M_{t-1} + log g_t, k_t W)``: the state
is ``S_t exp(-M_t)``, its decay ``exp(log g_t + M_{t-1} - M_t) <= 1``, and a query is scaled by the largest ``q_t W + M_t`` over the
features. All of this cancels in the quotient, whose denominator is then at least 1, whatever the keys and gates are.

Differences. The paper prints the sinks as t_i in the denominator and calls them logits: they are logits here. Its recurrent form
leaves the denominator out; it is kept here. Each head has sinks of its own. The gate is one number per token for all heads, the
paper's default; ``gates="head"`` is ours. Where a setting of the experiments differs from the equations (a softmax over the
features in the place of the exponential, no rotation in the window either) the equations are followed: the running maxima do what
that softmax is for, and ``rope=False`` leaves the rotation out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.mixers.base import KVCache, RecurrentMixer, check_chunk, check_heads, of_kept, rotary_angles, rotate
from gatework.ops.linear_recurrence import gated_linear_recurrence
from gatework.ops.precision import without_autocast
from gatework.ops.scan import associative_scan

#: Queries of a block of the window: they share the keys that they read.
BLOCK = 64


@dataclass
class LizardState(State):
    """What a sequence leaves: the recurrence's memory (numerator and, last column, denominator), the running maximum of each
    feature's logarithm, and the keys and values of the window."""

    memory: Float[Tensor, "B H F2 V1"]
    peak: Float[Tensor, "B H F2"]
    window: KVCache


@register("lizard", paper="lizard")
class Lizard(RecurrentMixer):
    """Gated linear attention plus a softmax window with sinks.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T.

    Args:
        d_model: width of the stream.
        heads: query heads H; each is K = ``d_model / heads`` wide.
        kv_heads: key-value heads, a divisor of ``heads``; None is ``heads``. The recurrence has a state per query head.
        features: F; a feature map has 2 F outputs. None is K.
        window: tokens w that the window reads, the token itself among them. More is not better: the paper finds that a long window
            keeps the gated part from learning (of 32 to 256 its best is 128).
        sinks: logits m of each head in the window's denominator; 0 makes the window plain softmax attention.
        gates: ``shared``, one gate per token (the paper's best), or ``head``, one per token and head.
        rope: rotary positions in the window.
        rope_base: wavelength base of the rotary positions.
        chunk: chunk length of the recurrence's parallel form, a power of two.

    Initialisation: projections normal with standard deviation 0.02, as attention's; feature maps the identity where F = K, else
    orthogonal; gates as ``nn.Linear`` starts, near 1/2; sinks 0; alpha 1 (the paper says none of them).

    Decoding keeps ``H 2F (K + 2)`` numbers for the recurrence, and the keys and values of the last ``window`` tokens. Padding takes
    no position and leaves the state as it is; packed documents start with an empty one.

    ``keep`` computes queries and output projection for the kept tokens only; recurrence and window run for all.

    Raises:
        ValueError: for sizes that do not divide or are below 1, an odd head width with ``rope``, a ``rope_base`` of 0 or less.
    """

    state_type = LizardState

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        features: int | None = None,
        window: int = 128,
        sinks: int = 4,
        gates: Literal["shared", "head"] = "shared",
        rope: bool = True,
        rope_base: float = 10000.0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(d_model, heads, kv_heads)
        width = d_model // heads
        features = width if features is None else features
        if features < 1 or window < 1 or sinks < 0:
            raise ValueError(f"features and window must be at least 1 and sinks at least 0, got {features}, {window} and {sinks}")
        if gates not in ("shared", "head"):
            raise ValueError(f"gates must be shared or head, got {gates!r}")
        if rope and width % 2:
            raise ValueError(f"rotary positions need an even head width, not d_model / heads = {width}")
        if rope_base <= 0:
            raise ValueError(f"rope_base must be positive, got {rope_base}")
        check_chunk(chunk)
        self.d_model, self.heads, self.kv_heads, self.head_width = d_model, heads, kv_heads, width
        self.features, self.window, self.rope, self.rope_base, self.chunk = features, window, rope, rope_base, chunk
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(d_model, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
        self.q_features, self.k_features = (nn.Parameter(_start(heads, width, features)) for _ in range(2))
        self.gate_proj = nn.Linear(d_model, heads if gates == "head" else 1, bias=False)
        self.sinks = nn.Parameter(torch.zeros(heads, sinks)) if sinks else None
        self.alpha = nn.Parameter(torch.ones(()))

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}, features={self.features}"
        sinks = 0 if self.sinks is None else self.sinks.shape[1]
        return f"{shown}, window={self.window}, sinks={sinks}, rope={self.rope}, rope_base={self.rope_base}, chunk={self.chunk}"

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        split = (-1, self.head_width)
        q = of_kept(self.q_proj, x, kept).unflatten(-1, split)
        k, v = self.k_proj(x).unflatten(-1, split), self.v_proj(x).unflatten(-1, split)
        logits = self.gate_proj(x)
        log_gate = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).expand(-1, -1, self.heads)
        if real is not None:
            log_gate = log_gate.masked_fill(~real[..., None], 0)
        held = state if isinstance(state, LizardState) else None
        past = self._past(q, k, v, log_gate, held, real, segments)
        near = self._window(q, k, v, held, real, segments)
        return self.outputs(past + self.alpha.to(near.dtype) * near, x, kept)

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The output projection."""
        y: Tensor = self.o_proj(o.to(x.dtype).flatten(-2))
        return y

    def _past(
        self, q: Tensor, k: Tensor, v: Tensor, log_gate: Tensor, state: LizardState | None, real: Tensor | None,
        segments: Tensor | None,
    ) -> Tensor:
        """y (B, T, H, K) of the module's equations."""
        dtype, group = log_gate.dtype, self.heads // self.kv_heads
        with without_autocast(q.device):
            if group > 1:
                k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
            maps = (q, self.q_features), (k, self.k_features)
            mapped = (torch.einsum("bthk,hkf->bthf", x.to(dtype), weight.to(dtype)) for x, weight in maps)
            queries, keys = (torch.cat([x, -x], -1) for x in mapped)
            if real is not None:
                keys = keys.masked_fill(~real[..., None, None], float("-inf"))
            # Maxima are constants: the quotient does not depend on them.
            with torch.no_grad():
                before = None if state is None else state.peak.to(dtype)
                peak, decay = _peaks(keys, log_gate, before, segments)
                if state is not None:
                    state.peak = torch.cat([state.peak[:, None], peak.to(state.peak.dtype)], 1)[:, -1]
                peak = peak.clamp(min=torch.finfo(dtype).min)
                shift = peak - (queries + peak).amax(-1, keepdim=True)
            queries, keys = (queries + shift).exp(), (keys - peak).exp()
            values = F.pad(v.to(dtype), (0, 1), value=1.0)
            memory = None if state is None else state.memory
            decay = decay + (log_gate - log_gate.detach())[..., None]  # The maxima are constants, the gates are not.
            o, memory = gated_linear_recurrence(
                queries, keys, values, decay, state=memory, segments=segments, scale=1.0, chunk=self.chunk
            )
            if state is not None:
                state.memory = memory.to(state.memory.dtype)
            denominator = o[..., -1:]
            if real is not None:  # A row that has not seen a token yet has read nothing.
                denominator = denominator.masked_fill(denominator == 0, 1)
            y: Tensor = o[..., :-1] / denominator
            return y

    def _window(
        self, q: Tensor, k: Tensor, v: Tensor, state: LizardState | None, real: Tensor | None, segments: Tensor | None
    ) -> Tensor:
        """a (B, T, H, K) of the module's equations."""
        length, cache = q.shape[1], None if state is None else state.window
        if self.rope:
            # Only differences of positions matter: documents and padding at the ends may count on.
            positions = torch.arange(length, device=q.device)[None] if cache is None else cache.positions(length, None)
            cos, sin = rotary_angles(positions, self.head_width, self.rope_base, q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        keys, values, valid = k.transpose(1, 2), v.transpose(1, 2), None
        if cache is not None:
            new = keys, values
            keep = min(cache.length, self.window - 1)
            past_keys, past_values = (x[:, :, cache.length - keep :].to(k.dtype) for x in cache.used())
            keys, values = torch.cat([past_keys, keys], 2), torch.cat([past_values, values], 2)
            if cache.real is not None:
                valid = F.pad(cache.slot_positions()[:, cache.length - keep :] >= 0, (0, length), value=True)
            if real is not None:
                cache.append_masked(*new, real)
            else:
                cache.append(*new)
        return self._banded(q.transpose(1, 2), keys, values, valid, segments).transpose(1, 2)

    def _banded(self, q: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, segments: Tensor | None) -> Tensor:
        """Window attention of queries (B, H, T, K), whose own keys are the last T of the S entries, in blocks of queries."""
        length, entries = q.shape[2], keys.shape[2]
        if not length:
            return q
        block = min(BLOCK, length)
        blocks = -(-length // block)
        # The keys of a block: its own and as many before them as its first query sees.
        ahead = self.window - 1 if blocks > 1 else entries - length
        front, behind = ahead - (entries - length), blocks * block - length
        span = ahead + block
        there = torch.arange(-front, entries + behind, device=q.device)
        there = ((there >= 0) & (there < entries))[None] if valid is None else F.pad(valid, (front, behind))
        q = F.pad(q, (0, 0, 0, behind)).unflatten(1, (self.kv_heads, -1)).unflatten(3, (blocks, block))
        q = q.transpose(2, 3).flatten(3, 4)  # (B, G, n, R b, K): the heads of a group side by side
        keys, values = (F.pad(x, (0, 0, front, behind)).unfold(2, span, block) for x in (keys, values))  # (B, G, n, K, span)
        distance = torch.arange(ahead, span, device=q.device)[:, None] - torch.arange(span, device=q.device)
        allowed = ((distance >= 0) & (distance < self.window)) & there.unfold(1, span, block)[:, :, None]
        if segments is not None:
            ids = F.pad(segments, (front, behind), value=-1)
            allowed = allowed & (ids[:, ahead:].unfold(1, block, block)[..., None] == ids.unfold(1, span, block)[:, :, None])
        # A query sees itself, padding too: no row of the softmax is empty.
        allowed = allowed | (distance == 0)
        scores = (q @ keys * self.head_width**-0.5).unflatten(3, (-1, block))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.masked_fill(~allowed[:, None, :, None], float("-inf"))
        total = scores.logsumexp(-1, keepdim=True)
        if self.sinks is not None:
            sinks = self.sinks.to(scores.dtype).logsumexp(-1).view(self.kv_heads, 1, -1, 1, 1)
            total = torch.logaddexp(total, sinks)
        weights = (scores - total).exp().flatten(3, 4).to(values.dtype)
        out = (weights @ values.transpose(-1, -2)).unflatten(3, (-1, block)).transpose(2, 3)
        return out.flatten(3, 4).flatten(1, 2)[:, :, :length]

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LizardState:
        """An empty state; of half precisions memory and maxima are kept in float32."""
        weight = self.k_proj.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        exact = torch.promote_types(dtype, torch.float32)
        memory = torch.zeros(batch_size, self.heads, 2 * self.features, self.head_width + 1, dtype=exact, device=device)
        empty = torch.empty(batch_size, self.kv_heads, 0, self.head_width, dtype=dtype, device=device)
        peak = torch.full_like(memory[..., 0], float("-inf"))
        return LizardState(memory, peak, KVCache(empty, empty.clone(), window=self.window))

    def state_bytes(self, length: int) -> int:
        """Bytes per sequence: those of the recurrence and of the last ``min(length, window)`` keys and values."""
        dtype = self.k_proj.weight.dtype
        recurrence = self.heads * 2 * self.features * (self.head_width + 2) * torch.promote_types(dtype, torch.float32).itemsize
        return recurrence + 2 * self.kv_heads * self.head_width * min(length, self.window) * dtype.itemsize


def _start(heads: int, width: int, features: int) -> Tensor:
    if features == width:
        return torch.eye(width).repeat(heads, 1, 1)
    return torch.stack([nn.init.orthogonal_(torch.empty(width, features)) for _ in range(heads)])


def _peaks(keys: Tensor, log_gate: Tensor, before: Tensor | None, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The running maxima M_t = max(M_{t-1} + log g_t, keys_t), (B, T, H, F2), and the decays log g_t + M_{t-1} - M_t <= 0.

    Before the first key of a row (``before`` is None, or -inf) or of a document the maximum is -inf, and the decay of that nothing
    0.
    """
    if segments is not None:
        start = segments[:, 1:] != segments[:, :-1]
        log_gate = log_gate.masked_fill(F.pad(start, (1, 0))[..., None], float("-inf"))
    gates = log_gate[..., None]
    first = torch.full_like(keys[:, :1], float("-inf")) if before is None else before[:, None]
    steps = gates, torch.cat([keys[:, :1].maximum(first + gates[:, :1]), keys[:, 1:]], 1)
    _, peak = associative_scan(lambda early, late: (early[0] + late[0], late[1].maximum(early[1] + late[0])), steps)
    decay = gates + torch.cat([first, peak], 1)[:, : peak.shape[1]] - peak
    return peak, decay.nan_to_num(nan=0.0, neginf=0.0).clamp(max=0)
