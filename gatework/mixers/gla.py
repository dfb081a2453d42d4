"""``GatedLinearAttention``: linear attention whose state forgets at a data-dependent rate per key channel.

Yang et al., Gated Linear Attention Transformers with Hardware-Efficient Training, 2023, arXiv 2312.06635. Per head,
with K = expand_k d_model / heads and V = expand_v d_model / heads:

    q = x W_q    k = x W_k    v = x W_v    la = logsigmoid((x W_1) W_2 + b_2) / normalizer
    S_t = diag(exp la_t) S_{t-1} + k_t^T v_t    o_t = K^-1/2 q_t S_t
    y = concat_h(RMSNorm(o_h) * silu(x W_g)_h) W_o

No feature map, short convolution or q/k norm, as in the paper's main model. The norm has one gain vector of length V
that the heads share (eps 1e-5), as in the released code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.mixers.base import RecurrentMixer, check_chunk, of_kept
from gatework.ops.linear_recurrence import gated_linear_recurrence


@dataclass
class GLAState(State):
    """The memory S of every head, (B, H, K, V), in float32 or the parameters' dtype where that is finer."""

    memory: Float[Tensor, "B H K V"]


@register("gla", paper="gla")
class GatedLinearAttention(RecurrentMixer):
    """Gated linear attention: a matrix state per head, decayed per key channel.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``heads * K *
    V`` numbers whatever the length.

    Args:
        d_model: width of the stream.
        heads: H; keys are K = ``expand_k d_model / heads`` wide, values V = ``expand_v d_model / heads``.
        expand_k: total key width as a share of ``d_model``.
        expand_v: total value width as a share of ``d_model``.
        decay_rank: width between the two matrices that make the decays.
        normalizer: divides the log-decays; 16 makes a token's memory about 24 tokens long at initialisation.
        chunk: chunk length of the parallel form, a power of two.

    Initialisation: PyTorch's default for every linear layer, gains of the norm 1.

    Padding: a padded token has no key, no value and no decay, so the state passes it unchanged. Packed documents
        start with an empty state.

    ``keep`` computes queries, output gate and output projection for the kept tokens only; the recurrence itself is
    run for all (its outputs are a small part of the cost).

    Raises:
        ValueError: for widths that do not divide.
    """

    state_type = GLAState

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        decay_rank: int = 16,
        normalizer: float = 16.0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        key_width, value_width = round(d_model * expand_k), round(d_model * expand_v)
        if min(key_width, value_width) < 1:
            raise ValueError(f"expand_k {expand_k} and expand_v {expand_v} leave the keys or the values no width")
        if heads < 1 or key_width % heads or value_width % heads:
            raise ValueError(f"the key width {key_width} and value width {value_width} are not divisible by heads {heads}")
        if decay_rank < 1 or normalizer <= 0:
            raise ValueError(f"decay_rank must be at least 1 and normalizer positive, got {decay_rank} and {normalizer}")
        check_chunk(chunk)
        self.d_model, self.heads, self.normalizer, self.chunk = d_model, heads, normalizer, chunk
        self.key_width, self.value_width = key_width, value_width
        self.q_proj = nn.Linear(d_model, key_width, bias=False)
        self.k_proj = nn.Linear(d_model, key_width, bias=False)
        self.v_proj = nn.Linear(d_model, value_width, bias=False)
        self.g_proj = nn.Linear(d_model, value_width, bias=False)
        self.decay_in = nn.Linear(d_model, decay_rank, bias=False)
        self.decay_out = nn.Linear(decay_rank, key_width)
        self.norm = nn.RMSNorm(value_width // heads, eps=1e-5)
        self.o_proj = nn.Linear(value_width, d_model, bias=False)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, K={self.key_width // self.heads}, V={self.value_width // self.heads}"
        return f"{shown}, normalizer={self.normalizer}, chunk={self.chunk}"

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        split = (self.heads, -1)
        k, v = self.k_proj(x).unflatten(-1, split), self.v_proj(x).unflatten(-1, split)
        logits = self.decay_out(self.decay_in(x))
        log_decay = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.normalizer
        log_decay = log_decay.unflatten(-1, split)
        if real is not None:
            log_decay = log_decay.masked_fill(~real[..., None, None], 0)
        q = of_kept(self.q_proj, x, kept).unflatten(-1, split)
        memory = state.memory if isinstance(state, GLAState) else None
        o, memory = gated_linear_recurrence(q, k, v, log_decay, state=memory, segments=segments, chunk=self.chunk)
        if isinstance(state, GLAState):
            state.memory = memory.to(state.memory.dtype)
        return self.outputs(o, x, kept)

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Norm, gate and output projection."""
        gate = F.silu(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        out: Tensor = self.o_proj((self.norm(o.to(x.dtype)) * gate).flatten(-2))
        return out

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> GLAState:
        """A zero memory; half precisions are kept in float32."""
        weight = self.q_proj.weight
        dtype = torch.promote_types(dtype or weight.dtype, torch.float32)
        shape = batch_size, self.heads, self.key_width // self.heads, self.value_width // self.heads
        return GLAState(torch.zeros(shape, dtype=dtype, device=device or weight.device))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's memory, the same at every length."""
        size = torch.promote_types(self.q_proj.weight.dtype, torch.float32).itemsize
        return self.key_width * self.value_width // self.heads * size
