"""``GatedSlotAttention``: softmax attention over a fixed number of memory slots that forget and write by gates.

Zhang et al., Gated Slot Attention for Efficient Linear-Time Sequence Modeling, 2024, arXiv 2409.07146. With head h of H, its
key-value head g = floor(h / (H / kv_heads)), K = d_model / H, M slots and a feature map phi:

    q_h = phi(x W_q,h)    k_g = phi(x W_k,g)    v_g = silu(x W_v,g)    a_g = sigmoid(x W_f,g)^(1 / normalizer)    s_g = 1 - a_g
    Kt_t = Kt_{t-1} diag(a_t) + k_t^T s_t    (K x M)        Vt_t = diag(a_t) Vt_{t-1} + s_t^T v_t    (M x V)
    p_t = softmax_M(q_t Kt_t)    o_t = p_t Vt_t
    y = RMSNorm(silu(concat_h o_h)) W_o

so each slot holds an average of past keys, and one of past values, with the same weights; these sum to 1 - prod_t a_t, the rest
being the empty slot, which is zeros. Empty slots are not masked: their logit is 0, and early tokens read from them.

Both memories are gated linear recurrences: the first decays along the values, the second along the keys. s is -expm1(log a),
exact for slots that hardly forget. The norm is over all of d_model (eps 1e-5), and there is no scale on the logits, as in the
released code. Left out: its short convolution and its output gate, which the paper's model does not use.
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
from gatework.mixers.base import RecurrentMixer, check_chunk, check_heads, of_kept
from gatework.ops.linear_recurrence import gated_linear_recurrence


@dataclass
class GSAState(State):
    """The two slot memories of every key-value head, in float32 or the parameters' dtype where that is finer."""

    keys: Float[Tensor, "B G K M"]
    values: Float[Tensor, "B G M V"]


@register("gsa", paper="gsa")
class GatedSlotAttention(RecurrentMixer):
    """Gated slot attention: softmax over M slots, decayed and written by gates.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``kv_heads * M * 2 K``
    numbers whatever the length.

    Args:
        d_model: width of the stream.
        heads: query heads H; each is K = ``d_model / heads`` wide.
        kv_heads: heads of keys, values and gates, a divisor of ``heads``; None is ``heads``.
        slots: M, slots per key-value head, at least 2; None is K.
        feature_map: phi: ``swish`` is silu; ``t2r`` is relu(x W_phi) with one K x K matrix for all heads, queries and keys, to
            convert a trained softmax model.
        normalizer: divides the logarithms of the gates; 8 makes a slot's memory about 12 tokens long at initialisation.
        chunk: chunk length of the parallel form, a power of two.

    Initialisation: PyTorch's default for every linear layer, gains of the norm 1. No biases.

    Padding writes to no slot and fades none. Packed documents start with empty slots.

    ``keep`` computes queries and the output projection for the kept tokens only; both recurrences are run for all.

    Raises:
        ValueError: for sizes that do not divide, fewer than 2 slots, a normalizer that is not positive, an unknown feature map.
    """

    state_type = GSAState

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        kv_heads: int | None = None,
        slots: int | None = None,
        feature_map: Literal["swish", "t2r"] = "swish",
        normalizer: float = 8.0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        check_heads(d_model, heads, kv_heads)
        slots = d_model // heads if slots is None else slots
        if slots < 2:
            raise ValueError(f"slots must be at least 2, since a softmax over one asks no query, got {slots}")
        if normalizer <= 0:
            raise ValueError(f"normalizer must be positive, got {normalizer}")
        if feature_map not in ("swish", "t2r"):
            raise ValueError(f"feature_map must be swish or t2r, got {feature_map!r}")
        check_chunk(chunk)
        self.d_model, self.heads, self.kv_heads, self.head_width = d_model, heads, kv_heads, d_model // heads
        self.slots_per_head, self.normalizer, self.chunk = slots, normalizer, chunk
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(d_model, kv_heads * self.head_width, bias=False)
        self.f_proj = nn.Linear(d_model, kv_heads * slots, bias=False)
        self.feature = nn.Linear(self.head_width, self.head_width, bias=False) if feature_map == "t2r" else None
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}, slots={self.slots_per_head}"
        return f"{shown}, normalizer={self.normalizer}, chunk={self.chunk}"

    def features(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H K"]:
        """phi of projected tokens, head by head."""
        x = x.unflatten(-1, (-1, self.head_width))
        return F.silu(x) if self.feature is None else F.relu(self.feature(x))

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        q = self.features(of_kept(self.q_proj, x, kept))
        k = self.features(self.k_proj(x))
        v = F.silu(self.v_proj(x)).unflatten(-1, (self.kv_heads, -1))
        logits = self.f_proj(x).unflatten(-1, (self.kv_heads, -1))
        log_decay = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.normalizer
        if real is not None:
            log_decay = log_decay.masked_fill(~real[..., None, None], 0)
        write = -torch.expm1(log_decay)
        shared, memory = self.heads // self.kv_heads, state if isinstance(state, GSAState) else None
        keys, values = (None, None) if memory is None else (memory.keys, memory.values)
        if shared > 1:
            k, v, log_decay, write = (some.repeat_interleave(shared, 2) for some in (k, v, log_decay, write))
            if memory is not None:
                keys, values = memory.keys.repeat_interleave(shared, 1), memory.values.repeat_interleave(shared, 1)
        logits, keys = gated_linear_recurrence(
            q, k, write, log_decay, state=keys, segments=segments, scale=1.0, axis="values", chunk=self.chunk
        )
        o, values = gated_linear_recurrence(
            logits.softmax(-1), write, v, log_decay, state=values, segments=segments, scale=1.0, chunk=self.chunk
        )
        if memory is not None:
            memory.keys, memory.values = keys[:, ::shared].to(memory.keys.dtype), values[:, ::shared].to(memory.values.dtype)
        return self.outputs(o, x, kept)

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Activation, norm and output projection."""
        out: Tensor = self.o_proj(self.norm(F.silu(o.to(x.dtype)).flatten(-2)))
        return out

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> GSAState:
        """Empty slots; half precisions are kept in float32."""
        weight = self.q_proj.weight
        dtype = torch.promote_types(dtype or weight.dtype, torch.float32)
        shape = batch_size, self.kv_heads, self.head_width, self.slots_per_head
        keys = torch.zeros(shape, dtype=dtype, device=device or weight.device)
        return GSAState(keys, keys.new_zeros(batch_size, self.kv_heads, self.slots_per_head, self.head_width))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's slots, the same at every length."""
        size = torch.promote_types(self.q_proj.weight.dtype, torch.float32).itemsize
        return 2 * self.kv_heads * self.slots_per_head * self.head_width * size
