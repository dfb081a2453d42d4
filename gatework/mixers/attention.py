"""``Attention``: causal softmax attention with rotary positions, grouped key-value heads and an optional sliding window.

Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762, section 3.2; rotary positions: Su et al., 2021, arXiv
2104.09864; grouped heads: Ainslie et al., GQA, 2023, arXiv 2305.13245; q/k norm: Henry et al., 2020, arXiv 2010.04245, in today's
form (RMS norm with a gain per channel, before the rotation). With head h of H, its key-value head g = floor(h / (H / kv_heads)),
K = d_model / H:

    q_h = rope(x W_q,h)    k_g = rope(x W_k,g)    v_g = x W_v,g
    o_h,t = sum_s softmax_s(q_h,t . k_g,s / sqrt(K)) v_g,s    over the positions s <= t, s > t - window
    y = concat_h(o_h) W_o
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, SequenceMixer, State
from gatework.core.registry import register
from gatework.mixers.base import KVCache, check_call, check_heads, rotary_angles, rotate

#: Least block of the sliding window's parallel form, and queries per step over kept tokens: large enough that a block's products
#: outweigh its overhead.
BLOCK = 64
KEPT_CHUNK = 128


@register("attention")
class Attention(SequenceMixer):
    """Softmax attention: RoPE, grouped KV heads, sliding window, q/k norm.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``.

    Args:
        d_model: width of the stream.
        heads: query heads H; each is ``d_model / heads`` wide.
        kv_heads: key-value heads, a divisor of ``heads``; None is ``heads``.
        window: each token sees itself and the ``window - 1`` tokens before it; None sees all before it. The causal parallel form
            without padding costs O(T window).
        qk_norm: RMS norm (eps 1e-6, a gain per channel, shared by the heads) on q and k before the rotation.
        rope: rotary positions; without them attention has no notion of order but causality.
        rope_base: wavelength base of the rotary positions.
        causal: False lets every token see both sides (then no decoding); ``window`` counts to both sides.

    Padding takes no position: a token's position counts the real tokens before it in its row.

    Initialisation: all weights normal with standard deviation 0.02; no biases.

    Decoding keeps the rotated keys and the values of all tokens, with a window of the last ``window`` tokens
    (:class:`~gatework.mixers.base.KVCache`). ``keep`` computes keys and values for all tokens, and queries, scores and output
    projection for the kept ones.

    Raises:
        ValueError: for sizes that do not divide, an odd head width with ``rope``, a window below 1, a ``rope_base`` of 0 or less.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        window: int | None = None,
        qk_norm: bool = False,
        rope: bool = True,
        rope_base: float = 10000.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(d_model, heads, kv_heads)
        if rope and (d_model // heads) % 2:
            raise ValueError(f"rotary positions need an even head width, not d_model / heads = {d_model // heads}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        if rope_base <= 0:
            raise ValueError(f"rope_base must be positive, got {rope_base}")
        self.d_model, self.heads, self.kv_heads, self.head_width = d_model, heads, kv_heads, d_model // heads
        self.window, self.rope, self.rope_base, self.causal = window, rope, rope_base, causal
        if not causal:
            answer = No("it was built with causal=False and sees later tokens")
            self.capabilities = self.capabilities | {"causal": answer, "decodes": answer}
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(d_model, kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.q_norm = nn.RMSNorm(self.head_width, eps=1e-6) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_width, eps=1e-6) if qk_norm else None
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}, window={self.window}"
        return shown + f", rope={self.rope}, rope_base={self.rope_base}, causal={self.causal}"

    # The four stages below act on tokens alone; variants (gated_attention) override them.

    def query(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H K"]:
        """Queries of the tokens ``x``, before norm and rotation."""
        return self.q_proj(x).unflatten(-1, (self.heads, self.head_width))

    def key(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B G K"]:
        """Keys of the tokens ``x``, before norm and rotation."""
        return self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_width))

    def value(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B G K"]:
        """Values of the tokens ``x``."""
        return self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_width))

    def output(self, heads: Float[Tensor, "*B H K"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the mixer returns for the tokens ``x``, from what their heads have read."""
        return self.o_proj(heads.flatten(-2))

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, KVCache, mask, segments, keep)
        length = x.shape[1]
        cache = state if isinstance(state, KVCache) else None
        if cache is not None:
            positions = cache.positions(length, mask)
        elif mask is not None:
            positions = mask.cumsum(1) - 1
        else:
            positions = torch.arange(length, device=x.device)[None]
        cos, sin = rotary_angles(positions, self.head_width, self.rope_base, x.dtype) if self.rope else (None, None)
        keys = self._place(self.key(x), self.k_norm, cos, sin).transpose(1, 2)
        values = self.value(x).transpose(1, 2)

        # Who may see whom: `limits` stays None where position in the tensor says it all (no padding, no packing).
        limits = None
        if cache is None:
            if mask is not None or segments is not None:
                limits = Limits.parallel(positions, mask, segments)
        elif mask is None and cache.real is None:
            keys, values = cache.append(keys, values)
        else:
            limits = Limits.after(cache, positions, mask)
            if mask is None:
                keys, values = cache.append(keys, values)
            else:
                past_keys, past_values = cache.used()
                new_keys, new_values = keys, values
                keys = torch.cat([past_keys.to(keys.dtype), keys], dim=2)
                values = torch.cat([past_values.to(values.dtype), values], dim=2)
                cache.append_masked(new_keys, new_values, mask)
        if keep is not None:
            return self._kept(x, keep, cos, sin, keys, values, limits)
        queries = self._queries(x, cos, sin).transpose(1, 2)
        heads = self._attend(queries, keys, values, limits)
        return self.output(heads.transpose(1, 2), x)

    def _place(self, x: Tensor, norm: nn.RMSNorm | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Norm and rotation of queries or keys (..., heads, K)."""
        if norm is not None:
            x = norm(x.to(norm.weight.dtype)).to(x.dtype)
        return x if cos is None or sin is None else rotate(x, cos, sin)

    def _queries(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        """Queries of tokens (..., H, K), ready for :meth:`_sdpa`."""
        return self._place(self.query(x), self.q_norm, cos, sin)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, limits: Limits | None) -> Tensor:
        """Heads (B, H, T, K) of the queries (B, H, T, K), the last T of the S entries being the queries' own."""
        new, entries, window = queries.shape[2], keys.shape[2], self.window
        if limits is not None:
            return self._sdpa(queries, keys, values, limits.allowed(self.causal, window))
        if window is None or window >= entries:
            if new == 1 or not self.causal:
                return self._sdpa(queries, keys, values)
            if new == entries:
                return self._sdpa(queries, keys, values, causal=True)
        elif self.causal and new == 1:
            return self._sdpa(queries, keys[:, :, -window:], values[:, :, -window:])
        elif self.causal and new == entries and entries > max(window, BLOCK):
            return self._banded(queries, keys, values, window)
        entry = torch.arange(entries, device=queries.device)[None]
        return self._sdpa(queries, keys, values, _allowed(entry[:, entries - new :], entry, self.causal, window))

    def _banded(self, queries: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
        """The causal window in blocks of c >= window tokens: a block's queries see its own keys and those of the block before."""
        length, c = queries.shape[2], max(window, BLOCK)
        blocks = -(-length // c)
        queries, keys, values = (F.pad(x, (0, 0, 0, blocks * c - length)) for x in (queries, keys, values))
        first = self._sdpa(queries[:, :, :c], keys[:, :, :c], values[:, :, :c], self._band(c, c, window, queries.device))

        def pairs(x: Tensor) -> Tensor:
            return torch.cat([fold(x[:, :, :-c]), fold(x[:, :, c:])], dim=2)

        def fold(x: Tensor) -> Tensor:
            return x.unflatten(2, (blocks - 1, c)).transpose(1, 2).flatten(0, 1)

        rest = self._sdpa(fold(queries[:, :, c:]), pairs(keys), pairs(values), self._band(c, 2 * c, window, queries.device))
        rest = rest.unflatten(0, (-1, blocks - 1)).transpose(1, 2).flatten(2, 3)
        return torch.cat([first, rest], dim=2)[:, :, :length]

    def _band(self, new: int, entries: int, window: int, device: torch.device) -> Tensor:
        entry = torch.arange(entries, device=device)[None]
        return _allowed(entry[:, entries - new :], entry, self.causal, window)

    def _kept(
        self, x: Tensor, keep: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor, limits: Limits | None
    ) -> Tensor:
        """Outputs of the kept tokens, 0 elsewhere; queries, scores and output projection run for the kept tokens only."""
        batch, new, width = x.shape
        rows = keep.flatten().nonzero()[:, 0]
        x_N = x.reshape(-1, width).index_select(0, rows)
        if cos is not None and sin is not None:
            cos, sin = (angle.expand(batch, -1, -1).flatten(0, 1).index_select(0, rows) for angle in (cos, sin))
        queries_N = self._queries(x_N, cos, sin)
        heads_N = self._attend_kept(queries_N, rows, keep, keys, values, limits)
        y_N = self.output(heads_N, x_N)
        return y_N.new_zeros(batch * new, width).index_copy_(0, rows, y_N).view(batch, new, width)

    def _attend_kept(
        self, queries_N: Tensor, rows: Tensor, keep: Tensor, keys: Tensor, values: Tensor, limits: Limits | None
    ) -> Tensor:
        """Heads (N, H, K) of the kept queries (N, H, K), which stand at the flat places ``rows``."""
        batch, new = keep.shape
        past, device = keys.shape[2] - new, keep.device
        # Each row's kept tokens in time order, side by side; a shorter row ends in places that are computed in vain.
        rank = keep.cumsum(1)[keep] - 1
        row, token_N = rows // new, rows % new
        most = int(rank.max()) + 1 if len(rows) else 0
        place = row * most + rank
        token = token_N.new_full((batch * most,), -1).index_copy_(0, place, token_N).view(batch, most)
        queries = queries_N.new_zeros(batch * most, *queries_N.shape[1:]).index_copy_(0, place, queries_N)
        queries = queries.view(batch, most, *queries_N.shape[1:]).transpose(1, 2)
        # Chunks of queries, each against no later keys than its last one needs, and with a window no earlier ones than its first.
        chunks = token.split(KEPT_CHUNK, 1) if most else ()
        spans = [torch.stack([chunk.where(chunk >= 0, new).amin(), chunk.amax()]) for chunk in chunks]
        heads = []
        for i, (first, final) in enumerate(torch.stack(spans).tolist() if spans else []):
            chunk = chunks[i].clamp(min=first)
            begin, end = 0, past + final + 1 if self.causal else keys.shape[2]
            if limits is None:
                if self.window is not None:
                    begin, end = max(0, past + first - self.window + 1), min(end, past + final + self.window)
                entry = torch.arange(begin, end, device=device)[None]
                allowed = _allowed(chunk + past, entry, self.causal, self.window)
            else:
                allowed = limits.allowed(self.causal, self.window, chunk)[:, :, :end]
            some = queries[:, :, i * KEPT_CHUNK : (i + 1) * KEPT_CHUNK]
            heads.append(self._sdpa(some, keys[:, :, begin:end], values[:, :, begin:end], allowed))
        if not heads:
            return queries_N[..., : self.head_width]
        return torch.cat(heads, dim=2).transpose(1, 2).flatten(0, 1).index_select(0, place)

    def _sdpa(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None = None, causal: bool = False) -> Tensor:
        return F.scaled_dot_product_attention(
            queries, keys.to(queries.dtype), values.to(queries.dtype), is_causal=causal,
            attn_mask=None if allowed is None else allowed[:, None], enable_gqa=self.kv_heads != self.heads,
        )

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> KVCache:
        """An empty cache; dtype and device default to the parameters'."""
        weight = self.k_proj.weight
        shape = (batch_size, self.kv_heads, 0, self.head_width)
        empty = torch.empty(shape, dtype=dtype or weight.dtype, device=device or weight.device)
        return KVCache(empty, empty.clone(), window=self.window)

    def state_bytes(self, length: int) -> int:
        """Bytes of keys and values per sequence: ``2 kv_heads K`` numbers for each of the last ``min(length, window)`` tokens."""
        entries = length if self.window is None else min(length, self.window)
        return 2 * self.kv_heads * self.head_width * entries * self.k_proj.weight.element_size()


def _allowed(query: Int[Tensor, "#B T"], entry: Int[Tensor, "#B S"], causal: bool, window: int | None) -> Bool[Tensor, "#B T S"]:
    """Which entries each query may see, by position."""
    query, entry = query[:, :, None], entry[:, None, :]
    if causal:
        return entry <= query if window is None else (entry <= query) & (entry > query - window)
    if window is None:
        return torch.ones_like(entry <= query)
    return (entry < query + window) & (entry > query - window)


class Limits:
    """Who may see whom where padding or packing has a say: T queries, the last of S entries being their own."""

    def __init__(self, query: Tensor, entry: Tensor, real: Tensor | None, segments: Tensor | None) -> None:
        self.query, self.entry, self.real, self.segments = query, entry, real, segments

    @classmethod
    def parallel(cls, positions: Tensor, mask: Tensor | None, segments: Tensor | None) -> Limits:
        """For a sequence of its own."""
        return cls(positions, positions, mask, segments)

    @classmethod
    def after(cls, cache: KVCache, positions: Tensor, mask: Tensor | None) -> Limits:
        """For tokens at ``positions`` that are fed behind what the cache holds."""
        past = cache.slot_positions()
        batch = max(len(past), len(positions))
        past, positions = past.expand(batch, -1), positions.expand(batch, -1)
        real = torch.ones_like(positions, dtype=torch.bool) if mask is None else mask
        return cls(positions, torch.cat([past, positions], dim=1), torch.cat([past >= 0, real], dim=1), None)

    def allowed(self, causal: bool, window: int | None, chosen: Tensor | None = None) -> Tensor:
        """Who sees whom (B, T, S); for the queries at the places ``chosen`` (B, M) only, if given."""
        new, entries = self.query.shape[1], self.entry.shape[1]
        query, segments, place = self.query, self.segments, torch.arange(new, device=self.query.device)[None]
        if chosen is not None:
            query, place = query.expand(len(chosen), -1).gather(1, chosen), chosen
            segments = None if segments is None else segments.gather(1, chosen)
        allowed = _allowed(query, self.entry, causal, window)
        if self.real is not None:
            allowed = allowed & self.real[:, None, :]
        if self.segments is not None and segments is not None:
            allowed = allowed & (segments[:, :, None] == self.segments[:, None, :])
        # Padding sees itself, so that no row of the softmax is empty.
        own = torch.arange(entries, device=allowed.device) == (place + (entries - new))[:, :, None]
        return allowed | own
