"""``SeerAttention``: softmax attention that reads the key blocks which a gate, distilled from its own attention map, chooses.

Gao et al., SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs, 2024, arXiv 2410.13276 (``choice="block"``), and
SeerAttention-R: Sparse Attention Adaptation for Long Reasoning, 2025, arXiv 2506.08889 (``choice="token"``); official code:
microsoft/SeerAttention. The attention is that of :mod:`gatework.mixers.attention`. Keys are cut into blocks of b tokens; q and k
are queries and keys before their rotation (behind their norms), per head of width K, and the gate of width G scores the key block j
by

    kg_j = rope_{j b}([max, min, mean of k over the block] W_k)               W_k (3K, G) per head
    block:  qg_i = rope_{i b}((mean of q over the query block i) W_q)          per query head; W_q left out where G = K
    token:  qg_t = rope_t([q of the query heads of the group] W_q)             per key-value head, W_q (H / kv_heads K, G)
    logits = qg . kg_j / sqrt(G)       over the blocks j <= i, for a token over those before its own

**What it learns.** In training the output is that of dense attention, and the gate learns, nothing else does, towards the attention
map A: the largest A of each key block, for a query block over its queries, for a token over the query heads of its group, divided
by the row's sum. The loss is KL(target || softmax(logits)), without the rows of the first quarter of the sequence's blocks, whose
few blocks teach little.

**What it reads.** In evaluation a row keeps the blocks with ``softmax(logits) > threshold``, or its largest logits. The row's own
block is always kept. The rest of the keys is not read.

The two forms. A query block of the paper's form, made to speed up prompts, chooses together: a later query of the block has a say
in what an earlier one reads. That is not causal, nor can it be repeated token by token, so this form says that it neither is causal
nor decodes. In the form of SeerAttention-R every token chooses for itself, by blocks that were finished before its own began; it is
causal, decodes, and is the default.

Differences. The loss is the mean over rows of the divergence; the official code divides once more by the number of blocks (the mean
of all elements) and multiplies by 10. In the block form, where the official code only makes the last two rows dense, the own block
is kept in every row, within the number that ``ratio`` allows. The official token form learns with the pooled keys of the unfinished
block, which hold later tokens, and scores with that block's place filled by zeros; here the own block has no score, neither in
training nor in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, State, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.mixers.attention import Attention
from gatework.mixers.base import KVCache, check_call, put, rotary_angles, rotate, take
from gatework.ops.block_sparse import block_sparse_attention

#: Queries whose attention map is made at once, for the target.
MAPPED = 256


@dataclass(kw_only=True)
class SeerState(KVCache):
    """Keys and values of all tokens, and what the gate scores: the pooled, mapped and rotated keys of each finished block. What
    stands behind a row's own number of blocks, in a batch of several lengths, means nothing."""

    pooled: Float[Tensor, "B G n W"]

    @property
    def nbytes(self) -> int:
        """Bytes that the sequence needs, without the room to grow."""
        return super().nbytes + self.pooled.numel() * self.pooled.element_size()


@register("seer_attention", paper="seer_attention")
class SeerAttention(Attention):
    """Attention that reads the key blocks chosen by a self-distilled gate.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``: dense in training, sparse in evaluation. ``losses["gate"]`` trains the gate;
    it has no gradient for anything else, and nothing else has one for the gate.

    Args:
        d_model: width of the stream.
        heads, kv_heads, qk_norm, rope, rope_base: as in :class:`~gatework.mixers.attention.Attention`; with ``rope`` the gate's
            queries and keys are rotated too.
        block: tokens b in a block; the papers take 64, for sequences of many thousands.
        gate_width: G; None is the head width.
        choice: who chooses: each ``token`` (for the query heads of a group together; causal), or each query ``block`` and head (the
            paper's; neither causal nor decodes).
        threshold: blocks with a larger share of the gate's softmax are read; below 0 all are, and the layer is plain attention (the
            papers use 5e-4 to 5e-3).
        ratio: read this share r in (0, 1] of the blocks instead of those above a threshold: of the n blocks before its own a token
            reads the ``max(1, int(r n))`` with the largest logits; a row of the block form, of n blocks in all, its own among the
            ``max(1, int((1 - sqrt(1 - r)) n))`` largest, which is r of the triangle, and the last two rows read everything.
        budget: a token reads the ``max(1, budget // block)`` largest blocks before its own, whatever the length (``token`` only).
        loss_weight: factor of the gate's loss.

    Initialisation: as attention; the gate's maps Xavier-uniform, as in the official code.

    Decoding keeps what attention keeps, and G numbers per key-value head of each finished block. A token reads the keys of its
    chosen blocks and of its own. Feeding several tokens behind others computes all scores and masks them; a prompt from the start
    and single tokens skip what is not chosen, and so does everything but a compiled graph, which masks.

    ``keep`` in evaluation computes scores, attention and output projection for the kept tokens, and in the token form queries too.

    Padding takes no position, and blocks count real tokens. Packed documents have blocks of their own: they are computed as rows of
    a larger batch.

    Metrics: ``kept``, the share of the (causal) pairs of blocks that any token of a block of queries reads (evaluation, without
    ``state``); ``kl``, the loss before its weight (training).

    Raises:
        ValueError: as attention does; a block or gate width below 1, an odd gate width with ``rope``, more than one of ``ratio``
            and ``budget``, a ratio outside (0, 1], a budget below 1 or in the block form.
    """

    example = {"block": 4, "ratio": 0.5}

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        qk_norm: bool = False,
        rope: bool = True,
        rope_base: float = 10000.0,
        block: int = 16,
        gate_width: int | None = None,
        choice: Literal["token", "block"] = "token",
        threshold: float = 5e-4,
        ratio: float | None = None,
        budget: int | None = None,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(d_model, heads, kv_heads, None, qk_norm, rope, rope_base)
        gate_width = self.head_width if gate_width is None else gate_width
        if block < 1 or gate_width < 1 or (rope and gate_width % 2):
            raise ValueError(f"block must be at least 1 and gate_width positive (with rope even), got {block} and {gate_width}")
        if choice not in ("token", "block"):
            raise ValueError(f"choice must be token or block, got {choice!r}")
        if ratio is not None and (budget is not None or not 0 < ratio <= 1):
            raise ValueError(f"ratio must be in (0, 1] and without a budget, got ratio {ratio} and budget {budget}")
        if budget is not None and (budget < 1 or choice == "block"):
            raise ValueError(f"budget must be at least 1, and is for choice='token', got {budget} for choice={choice!r}")
        self.block, self.gate_width, self.choice = block, gate_width, choice
        self.threshold, self.ratio, self.budget, self.loss_weight = threshold, ratio, budget, loss_weight
        if choice == "block":
            answer = No("the queries of a block choose their keys together: later ones have a say in what earlier ones read")
            self.capabilities = self.capabilities | {"causal": answer, "decodes": answer}
        choosers = self.kv_heads if choice == "token" else heads
        self.gate_k = nn.Parameter(torch.empty(choosers, 3 * self.head_width, gate_width))
        self.gate_q = None
        if choice == "token" or gate_width != self.head_width:
            read = heads // choosers * self.head_width
            self.gate_q = nn.Parameter(torch.empty(choosers, read, gate_width))
        for weight in (self.gate_k, self.gate_q):
            if weight is not None:
                bound = math.sqrt(6 / (weight.shape[1] + gate_width))
                nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"block={self.block}, gate_width={self.gate_width}, choice={self.choice}, threshold={self.threshold}"
        return super().extra_repr() + f", {shown}, ratio={self.ratio}, budget={self.budget}, loss_weight={self.loss_weight}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, SeerState if self.capabilities["decodes"] else None, mask, segments, keep)
        if segments is not None:
            return self._packed(x, mask, segments, keep)
        if self.training:
            if not isinstance(state, SeerState):
                self._distill(x, mask)
                return super().forward(x, None, mask, None, keep)
            before = _fed(state)
            y = super().forward(x, state, mask, None, keep)
            self._pool_finished(state, before)
            return y
        if not in_backward():
            self.losses, self.metrics = {}, {}
        if mask is None:
            return self._read(x, state, None, keep)
        # Real tokens first, so that a token's place in its row is its position.
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        real = mask.gather(1, order)
        x = x.gather(1, order[..., None].expand_as(x)).masked_fill(~real[..., None], 0)
        y = self._read(x, state, real, None if keep is None else keep.gather(1, order))
        return torch.empty_like(y).scatter(1, order[..., None].expand_as(y), y)

    def _packed(self, x: Tensor, mask: Tensor | None, segments: Tensor, keep: Tensor | None) -> Tensor:
        """The documents as rows of their own."""
        if not x.numel():
            return self.forward(x)
        start = torch.ones_like(segments, dtype=torch.bool)
        start[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = start.flatten().nonzero()[:, 0]
        document = start.flatten().cumsum(0) - 1
        place = torch.arange(len(document), device=x.device) - first[document]
        length = int(place.max()) + 1
        slot, shape = document * length + place, torch.Size([len(first), length])

        def unpack(tokens: Tensor) -> Tensor:
            flat = tokens.flatten(0, 1)
            return flat.new_zeros(shape.numel(), *flat.shape[1:]).index_copy(0, slot, flat).unflatten(0, shape)

        real = unpack(torch.ones_like(start) if mask is None else mask)
        return take(self.forward(unpack(x), mask=real, keep=None if keep is None else unpack(keep)), slot).view_as(x)

    # -- the gate

    def _gate_keys(self, keys: Tensor, counts: Tensor | None, first: int = 0) -> Tensor:
        """What the gate scores, (B, N, n, G), of keys (B, n b, kv_heads, K) in whole blocks, the first of them the block ``first``;
        ``counts`` (B, n) says how many of a block's tokens are there (at its front), None all."""
        blocks = keys.unflatten(1, (-1, self.block))
        if counts is None:
            pools = [blocks.amax(2), blocks.amin(2), blocks.mean(2)]
        else:
            there = (torch.arange(self.block, device=keys.device) < counts[..., None])[..., None, None]
            some, size = (counts > 0)[..., None, None], counts.clamp(min=1)[..., None, None]
            pools = [
                blocks.masked_fill(~there, float("-inf")).amax(2).where(some, 0),
                blocks.masked_fill(~there, float("inf")).amin(2).where(some, 0),
                (blocks * there).sum(2) / size,
            ]
        pooled = torch.cat(pools, -1).repeat_interleave(len(self.gate_k) // self.kv_heads, 2)
        mapped = torch.einsum("bjnk,nkg->bjng", pooled, self.gate_k.to(pooled.dtype))
        positions = (first + torch.arange(blocks.shape[1], device=keys.device)) * self.block
        return self._turned(mapped, positions).transpose(1, 2)

    def _gate_queries(self, q: Tensor, positions: Tensor) -> Tensor:
        """What scores the blocks, (B, M, N, G), for queries (B, M, H, K) (in the block form the blocks' means)."""
        q = q.unflatten(2, (len(self.gate_k), -1)).flatten(3)
        if self.gate_q is not None:
            q = torch.einsum("btnk,nkg->btng", q, self.gate_q.to(q.dtype))
        return self._turned(q, positions)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        if not self.rope:
            return x
        return rotate(x, *rotary_angles(positions, self.gate_width, self.rope_base, x.dtype))

    def _row_logits(self, q: Tensor, k: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """For whole sequences of queries (B, T, H, K) and keys (B, T, kv_heads, K), T a multiple of b, of which ``counts`` (B, n)
        per block are there: the logits (B, N, rows, n) and which of them count."""
        blocks, device = q.shape[1] // self.block, q.device
        keys = self._gate_keys(k, counts)
        if self.choice == "block":
            means = q.unflatten(1, (blocks, self.block))
            if counts is None:
                means = means.mean(2)
            else:
                there = (torch.arange(self.block, device=device) < counts[..., None])[..., None, None]
                means = (means * there).sum(2) / counts.clamp(min=1)[..., None, None]
            queries = self._gate_queries(means, torch.arange(blocks, device=device) * self.block)
            open_to = torch.arange(blocks, device=device)[:, None] >= torch.arange(blocks, device=device)
        else:
            queries = self._gate_queries(q, torch.arange(q.shape[1], device=device)[None])
            open_to = torch.arange(q.shape[1], device=device)[:, None] // self.block > torch.arange(blocks, device=device)
        return self._scores(queries, keys).masked_fill(~open_to, float("-inf")), open_to

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Logits (B, N, M, n), in float32 or better, of gate queries (B, M, N, G) and keys (B, N, n, G)."""
        logits = queries.transpose(1, 2) @ keys.transpose(-1, -2) * self.gate_width**-0.5
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    # -- training

    def _distill(self, x: Tensor, mask: Tensor | None) -> None:
        """Leave the gate's loss for the tokens ``x``, whose own values and projections get no gradient from it."""
        batch, length = x.shape[:2]
        missing = -length % self.block
        with torch.no_grad():
            counts = None
            if mask is not None:
                order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
                x = x.gather(1, order[..., None].expand_as(x)).masked_fill(~mask.gather(1, order)[..., None], 0)
            if mask is not None or missing:
                total = mask.sum(1) if mask is not None else torch.full((batch,), length, device=x.device)
                x = F.pad(x, (0, 0, 0, missing))
                counts = total[:, None] - torch.arange(x.shape[1] // self.block, device=x.device) * self.block
                counts = counts.clamp(0, self.block)
            q, k = self._normed(self.query(x), self.q_norm), self._normed(self.key(x), self.k_norm)
            real = None if counts is None else torch.arange(x.shape[1], device=x.device) < counts.sum(1, keepdim=True)
            target = self._target(q, k, real)
        logits, open_to = self._row_logits(q, k, counts)
        # Rows that count: real, behind the first quarter of their sequence's blocks, with a block to choose.
        blocks = x.shape[1] // self.block
        row_block = torch.arange(logits.shape[2], device=x.device) // (1 if self.choice == "block" else self.block)
        used = torch.full((batch, 1), blocks, device=x.device) if counts is None else (counts > 0).sum(1, keepdim=True)
        rows = (row_block >= used // 4) & (row_block < used) & open_to.any(1)
        if real is not None and self.choice == "token":
            rows = rows & real
        log_probs = logits.masked_fill(~open_to.any(1)[:, None], 0).log_softmax(-1).masked_fill(~open_to, 0)
        divergence = (torch.special.xlogy(target, target) - target * log_probs).sum(-1)  # (B, N, rows)
        loss = (divergence * rows[:, None]).sum() / (rows.sum() * logits.shape[1]).clamp(min=1)
        if not in_backward():
            self.losses, self.metrics = {"gate": self.loss_weight * loss}, {"kl": loss.detach()}

    def _normed(self, x: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        return self._place(x, norm, None, None)

    def _target(self, q: Tensor, k: Tensor, real: Tensor | None) -> Tensor:
        """What the gate should say, (B, N, rows, n), of queries (B, T, H, K) and keys, T a multiple of b; in stretches of queries,
        so that no T x T map is ever held. Rows without a block, or of padding, are 0."""
        length, device, dtype = q.shape[1], q.device, torch.promote_types(q.dtype, torch.float32)
        blocks = length // self.block
        if self.rope:
            angles = rotary_angles(torch.arange(length, device=device)[None], self.head_width, self.rope_base, q.dtype)
            q, k = rotate(q, *angles), rotate(k, *angles)
        queries = q.transpose(1, 2).unflatten(1, (self.kv_heads, -1))
        keys = k.transpose(1, 2)[:, :, None]
        stretch = self.block * max(1, MAPPED // self.block)
        rows = []
        for begin in range(0, length, stretch):
            end = min(begin + stretch, length)
            scores = (queries[..., begin:end, :] @ keys[..., :end, :].transpose(-1, -2)).to(dtype) * self.head_width**-0.5
            causal = torch.ones(end - begin, end, dtype=torch.bool, device=device).tril(begin)
            probs = scores.masked_fill(~causal, float("-inf")).softmax(-1)
            largest = probs.unflatten(-1, (-1, self.block)).amax(-1)  # (B, G, H / G, queries, blocks)
            if real is not None:
                largest = largest * real[:, None, None, begin:end, None]
            if self.choice == "block":
                largest = largest.flatten(1, 2).unflatten(2, (-1, self.block)).amax(3)
            else:
                own = torch.arange(begin, end, device=device)[:, None] // self.block
                largest = largest.amax(2).masked_fill(torch.arange(end // self.block, device=device) >= own, 0)
            rows.append(F.pad(largest, (0, blocks - largest.shape[-1])))
        if not rows:
            return q.new_zeros(len(q), len(self.gate_k), 0, 0, dtype=dtype)
        target = torch.cat(rows, 2)
        return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)

    # -- evaluation

    def _chosen(self, logits: Tensor, open_to: Tensor, count: Tensor) -> Tensor:
        """Which of the blocks that are open to each row (..., n) it reads, of all ``count`` blocks of its rule (broadcasts to (...,
        1))."""
        if self.ratio is None and self.budget is None:
            return open_to & (logits.masked_fill(~open_to.any(-1, keepdim=True), 0).softmax(-1) > self.threshold)
        if self.budget is not None:
            share = torch.full_like(count, self.budget // self.block)
        else:
            share = (self._portion * count.to(torch.float64)).long()
        # No row has more blocks than there are columns.
        columns = logits.shape[-1]
        most = self.budget // self.block if self.budget is not None else int(self._portion * columns)
        order = logits.topk(min(max(1, most), columns), -1).indices
        within = torch.arange(order.shape[-1], device=logits.device) < share.clamp(min=1)
        return torch.zeros_like(open_to.expand_as(logits)).scatter(-1, order, within.expand_as(order)) & open_to

    @property
    def _portion(self) -> float:
        """How much of its blocks a row of the ratio's rule reads."""
        ratio = 1.0 if self.ratio is None else self.ratio
        return ratio if self.choice == "token" else 1 - math.sqrt(1 - ratio)

    def _read(self, x: Tensor, state: State | None, real: Tensor | None, keep: Tensor | None) -> Tensor:
        """Sparse attention for tokens of which the real ones are the first of each row."""
        length = x.shape[1]
        cache = state if isinstance(state, SeerState) else None
        kept = None if keep is None else keep.flatten().nonzero()[:, 0]
        positions = torch.arange(length, device=x.device)[None] if cache is None else cache.positions(length, None)
        angles = rotary_angles(positions, self.head_width, self.rope_base, x.dtype) if self.rope else (None, None)
        k = self._normed(self.key(x), self.k_norm)
        keys, values = self._place(k, None, *angles).transpose(1, 2), self.value(x).transpose(1, 2)
        before = 0 if cache is None else _fed(cache)
        started = cache is not None and cache.fed > 0
        if kept is None or self.choice == "block":
            q = self._normed(self.query(x), self.q_norm)
        else:
            q = put(self._normed(self.query(take(x, kept)), self.q_norm), kept, x.shape[:2])
        queries = self._place(q, None, *angles).transpose(1, 2)
        if cache is not None:
            if real is None:
                cache.append(keys, values)
            else:
                cache.append_masked(keys, values, real)
            self._pool_finished(cache, before)
        if not length:
            return x
        if started and cache is not None:
            o = self._continued(q, queries, positions, cache, real)
        else:
            o = self._whole(q, k, queries, keys, values, real, keep)
        o = o.transpose(1, 2)
        if kept is None:
            return self.output(o, x)
        return put(self.output(take(o, kept), take(x, kept)), kept, x.shape[:2])

    def _whole(
        self, q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, values: Tensor, real: Tensor | None, keep: Tensor | None
    ) -> Tensor:
        """Heads (B, H, T, K) of sequences that begin here."""
        batch, length, missing = len(q), q.shape[1], -q.shape[1] % self.block
        blocks = (length + missing) // self.block
        counts = None
        if real is not None or missing:
            total = torch.full((batch,), length, device=q.device) if real is None else real.sum(1)
            counts = (total[:, None] - torch.arange(blocks, device=q.device) * self.block).clamp(0, self.block)
        logits, open_to = self._row_logits(F.pad(q, (0, 0, 0, 0, 0, missing)), F.pad(k, (0, 0, 0, 0, 0, missing)), counts)
        row = torch.arange(blocks, device=q.device)
        seen = None
        if self.choice == "block":
            used = torch.full((batch, 1), blocks, device=q.device) if counts is None else (counts > 0).sum(1, keepdim=True)
            own = torch.eye(blocks, dtype=torch.bool, device=q.device)
            if self.ratio is not None:  # The own block is among those that it allows.
                logits = logits.masked_fill(own, float("inf"))
            chosen = self._chosen(logits, open_to, used[:, None, None]) | own
            last = (row >= used - 2) & (row < used)
            chosen = (chosen | last[:, None, :, None]) & open_to
        else:
            count = torch.arange(length + missing, device=q.device)[:, None] // self.block
            seen = self._chosen(logits, open_to, count)[:, :, :length]
            for counted in (real, keep):
                if counted is not None:
                    seen = seen & counted[:, None, :, None]
            chosen = F.pad(seen, (0, 0, 0, missing)).unflatten(2, (blocks, self.block)).any(3)
            chosen = chosen | torch.eye(blocks, dtype=torch.bool, device=q.device)
        triangle = torch.ones(blocks, blocks, dtype=torch.bool, device=q.device).tril()
        if not in_backward():
            pairs = triangle.expand_as(chosen) if counts is None else triangle & (counts > 0)[:, None, :, None]
            self.metrics = {"kept": (chosen & pairs).sum() / (pairs.expand_as(chosen).sum().clamp(min=1))}
        if keep is not None:  # Rows without a kept token are not computed.
            wanted = F.pad(keep, (0, missing)).unflatten(1, (blocks, self.block)).any(2)
            chosen = chosen & wanted[:, None, :, None]
        if torch.compiler.is_compiling():
            allowed = chosen.repeat_interleave(self.block, 2)[:, :, :length]
            if seen is not None:
                allowed = (allowed & seen) | (row == torch.arange(length, device=q.device)[:, None] // self.block)
            allowed = allowed.repeat_interleave(self.block, 3)[..., :length].tril()
            return self._masked(queries, keys, values, allowed | torch.eye(length, dtype=torch.bool, device=q.device))
        if bool((chosen | ~triangle).all()) and (seen is None or bool((seen | ~open_to[:length]).all())):
            return self._sdpa(queries, keys, values, causal=True)
        return block_sparse_attention(queries, keys.to(queries.dtype), values.to(queries.dtype), chosen, self.block, seen)

    def _masked(self, queries: Tensor, keys: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        """Attention by a mask (B, N, T, S)."""
        allowed = allowed.repeat_interleave(self.heads // allowed.shape[1], 1)
        return F.scaled_dot_product_attention(
            queries, keys.to(queries.dtype), values.to(queries.dtype), attn_mask=allowed, enable_gqa=self.kv_heads != self.heads
        )

    def _continued(self, q: Tensor, queries: Tensor, positions: Tensor, cache: SeerState, real: Tensor | None) -> Tensor:
        """Heads (B, H, T, K) of tokens at ``positions`` behind others; everything real is in the cache."""
        keys, values = cache.used()
        if not keys.shape[2]:
            return torch.zeros_like(queries)
        batch, blocks = len(q), cache.pooled.shape[2]
        positions = positions.expand(batch, -1)
        logits = self._scores(self._gate_queries(q, positions), cache.pooled.to(q.dtype))
        own = positions // self.block
        open_to = (torch.arange(blocks, device=q.device) < own[..., None])[:, None].expand_as(logits)
        chosen = self._chosen(logits.masked_fill(~open_to, float("-inf")), open_to, own[:, None, :, None])
        if q.shape[1] == 1 and real is None and not torch.compiler.is_compiling():
            if cache.real is None and bool((chosen | ~open_to).all()):
                return self._sdpa(queries, keys, values)
            return self._step(queries, chosen[:, :, 0], positions[:, 0], cache)
        entries = cache.slot_positions().expand(batch, -1)
        block = (entries // self.block).clamp(min=0)
        if blocks:
            index = block.clamp(max=blocks - 1)[:, None, None].expand(-1, chosen.shape[1], chosen.shape[2], -1)
            allowed = chosen.gather(3, index) & (block < blocks)[:, None, None]
        else:
            allowed = chosen.new_zeros(batch, chosen.shape[1], chosen.shape[2], entries.shape[1])
        near = (block[:, None, None] == own[:, None, :, None]) | allowed
        allowed = near & (entries[:, None, None] <= positions[:, None, :, None]) & (entries >= 0)[:, None, None]
        # Padding may see anything, so that no row of the softmax is empty.
        return self._masked(queries, keys, values, allowed | ~allowed.any(-1, keepdim=True))

    def _step(self, queries: Tensor, chosen: Tensor, position: Tensor, cache: SeerState) -> Tensor:
        """Heads (B, H, 1, K) of one token per row: the chosen blocks (B, G, n) and its own are gathered, the rest is not read."""
        most = int(chosen.sum(-1).amax()) if chosen.numel() else 0
        # The chosen blocks first, in order; shorter lists end in blocks that are masked.
        order = chosen.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]
        there = chosen.gather(2, order)
        own = (position // self.block)[:, None, None].expand(-1, chosen.shape[1], 1)
        block, there = torch.cat([order, own], 2), F.pad(there, (0, 1), value=True)
        spot = (block[..., None] * self.block + torch.arange(self.block, device=queries.device)).flatten(2)  # (B, G, positions)
        allowed = there.repeat_interleave(self.block, 2) & (spot <= position[:, None, None])
        # The last used slot of the buffers holds the token itself.
        slot = (spot + (cache.end - 1 - position)[:, None, None]).clamp(0, cache.end - 1)
        row = torch.arange(len(slot) * self.kv_heads, device=slot.device).view(-1, self.kv_heads, 1)
        index = (row * cache.keys.shape[2] + slot).flatten()
        grouped = queries[:, :, 0].unflatten(1, (self.kv_heads, -1))  # (B, G, R, K)
        keys, values = (
            x.flatten(0, 2).index_select(0, index).view(*slot.shape, -1).to(queries.dtype) for x in (cache.keys, cache.values)
        )
        heads = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=allowed[:, :, None])
        return heads.flatten(1, 2)[:, :, None]

    def _pool_finished(self, cache: SeerState, before: int | Tensor) -> None:
        """Pool the keys of the blocks that have been finished since a row's length was ``before``."""
        after = _fed(cache)
        if isinstance(before, int) and isinstance(after, int):
            begin, end = before // self.block, after // self.block
        else:  # Rows of several lengths: from the first block that any of them has finished now.
            old, new = torch.broadcast_tensors(torch.as_tensor(before, device=cache.keys.device) // self.block, after // self.block)
            end = int(new.amax()) if new.numel() else 0
            begin = int(old.where(new > old, end).amin()) if new.numel() else 0
        if begin >= end:
            return
        keys, _ = cache.used()
        entries = keys.shape[2]
        spot = torch.arange(begin * self.block, end * self.block, device=keys.device)
        length = after if isinstance(after, int) else after[:, None]
        slot = (spot + (entries - length)).clamp(0, entries - 1).expand(len(keys), -1)
        some = keys.gather(2, slot[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])).transpose(1, 2)
        if self.rope:
            cos, sin = rotary_angles(spot[None], self.head_width, self.rope_base, some.dtype)
            some = rotate(some, cos, -sin)
        new_blocks = self._gate_keys(some, None, begin).to(cache.pooled.dtype)
        cache.pooled = torch.cat([cache.pooled[:, :, :begin], new_blocks], 2)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SeerState:
        """An empty cache; dtype and device default to the parameters'."""
        if not self.capabilities["decodes"]:
            raise PartError("SeerAttention with choice='block' cannot decode: a block's queries choose their keys together")
        empty = super().init_state(batch_size, dtype=dtype, device=device)
        return SeerState(empty.keys, empty.values, pooled=empty.keys.new_empty(batch_size, self.kv_heads, 0, self.gate_width))

    def state_bytes(self, length: int) -> int:
        """Bytes of keys and values per sequence, and of the pooled keys of the finished blocks."""
        pooled = self.kv_heads * self.gate_width * (length // self.block) * self.k_proj.weight.element_size()
        return super().state_bytes(length) + pooled


def _fed(cache: KVCache) -> int | Tensor:
    """The real tokens that each row of a cache has been fed."""
    return cache.fed if cache.real is None else cache.real
