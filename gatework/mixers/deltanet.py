"""``DeltaNet``: linear attention whose state replaces what it holds under a key, instead of adding to it.

Yang et al., Parallelizing Linear Transformers with the Delta Rule over Sequence Length, 2024, arXiv 2406.06484 (the rule itself:
Schlag et al., Linear Transformers Are Secretly Fast Weight Programmers, 2021, arXiv 2102.11174). Per head, with
K = expand_k d_model / heads and V = expand_v d_model / heads:

    q, k, v = silu(conv(x W_q)), silu(conv(x W_k)), silu(conv(x W_v))    q, k <- q / |q|, k / |k|    beta = sigmoid(x W_b)
    S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1})        o_t = K^-1/2 q_t S_t
    y = concat_h(RMSNorm(o_h)) W_o

conv is a causal convolution of each channel over 4 tokens, |x| = sqrt(sum_c x_c^2 + 1e-6), and the norm has one gain vector of
length V that the heads share (eps 1e-5), as in the released code. ``allow_neg_eigval`` doubles beta (Grazzi et al., Unlocking
State-Tracking in Linear RNNs Through Negative Eigenvalues, 2024, arXiv 2411.12537): the eigenvalue 1 - beta of a
transition may then be negative, which counting modulo 2 needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.mixers.base import RecurrentMixer, ShortConvolution
from gatework.ops.delta_rule import gated_delta_rule, unit


@dataclass
class DeltaNetState(State):
    """The memory S of every head, (B, H, K, V), in float32 or the parameters' dtype where that is finer, and what the convolution
    looks back at, (B, conv_width - 1, channels)."""

    memory: Float[Tensor, "B H K V"]
    tail: Float[Tensor, "B W C"]


@register("deltanet", paper="deltanet")
class DeltaNet(RecurrentMixer):
    """Linear attention by the delta rule: a write replaces what its key reads.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``heads * K * V`` numbers
    and the convolution's last inputs, whatever the length.

    Args:
        d_model: width of the stream.
        heads: H; keys are K = ``expand_k d_model / heads`` wide, values V = ``expand_v d_model / heads``.
        expand_k: total key width as a share of ``d_model``.
        expand_v: total value width as a share of ``d_model``.
        conv_width: tokens that the convolution of queries, keys and values sees.
        allow_neg_eigval: beta = 2 sigmoid(x W_b), so that a write can turn what its key reads into its opposite.
        chunk: chunk length of the parallel form, a power of two.

    Initialisation: PyTorch's default for every linear layer and the convolution, gains of the norm 1.

    Padding: a padded token writes nothing, and the convolution does not see it. Packed documents start with an empty state and
        nothing to look back at.

    ``keep`` computes the output stage for the kept tokens only; queries are computed for all, since the convolution mixes
    neighbours, and the recurrence is run for all.

    Raises:
        ValueError: for widths that do not divide.
    """

    state_type = DeltaNetState

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        conv_width: int = 4,
        allow_neg_eigval: bool = False,
        chunk: int = 32,
    ) -> None:
        super().__init__()
        key_width, value_width = round(d_model * expand_k), round(d_model * expand_v)
        if min(key_width, value_width) < 1:
            raise ValueError(f"expand_k {expand_k} and expand_v {expand_v} leave the keys or the values no width")
        if heads < 1 or key_width % heads or value_width % heads:
            raise ValueError(f"the key width {key_width} and value width {value_width} are not divisible by heads {heads}")
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(f"chunk must be a power of two, got {chunk}")
        self.d_model, self.heads, self.key_width, self.value_width = d_model, heads, key_width, value_width
        self.allow_neg_eigval, self.chunk = allow_neg_eigval, chunk
        self.qkv_proj = nn.Linear(d_model, 2 * key_width + value_width, bias=False)
        self.conv = ShortConvolution(2 * key_width + value_width, conv_width)
        self.b_proj = nn.Linear(d_model, heads, bias=False)
        self.norm = nn.RMSNorm(value_width // heads, eps=1e-5)
        self.o_proj = nn.Linear(value_width, d_model, bias=False)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, K={self.key_width // self.heads}, V={self.value_width // self.heads}"
        return f"{shown}, allow_neg_eigval={self.allow_neg_eigval}, chunk={self.chunk}"

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        memory, tail = (state.memory, state.tail) if isinstance(state, DeltaNetState) else (None, None)
        qkv, tail = self.conv(self.qkv_proj(x), tail, real, segments)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in qkv.split([self.key_width, self.key_width, self.value_width], -1))
        beta = self.b_proj(x).sigmoid()
        if self.allow_neg_eigval:
            beta = 2 * beta
        log_decay = self.log_decay(x)
        if real is not None:
            beta = beta.masked_fill(~real[..., None], 0)
            log_decay = None if log_decay is None else log_decay.masked_fill(~real[..., None], 0)
        o, memory = gated_delta_rule(
            unit(q), unit(k), v, beta, log_decay, state=memory, segments=segments, chunk=self.chunk
        )
        if isinstance(state, DeltaNetState):
            state.memory, state.tail = memory.to(state.memory.dtype), tail.to(state.tail.dtype)
        return self.outputs(o, x, kept)

    def log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"] | None:
        """Logarithms of the decays, at most 0; None: the state forgets nothing but what it replaces."""
        return None

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Norm and output projection."""
        out: Tensor = self.o_proj(self.norm(o.to(x.dtype)).flatten(-2))
        return out

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> DeltaNetState:
        """A zero memory, of which half precisions are kept in float32, and nothing to look back at."""
        weight = self.qkv_proj.weight
        dtype, device = dtype or weight.dtype, device or weight.device
        shape = batch_size, self.heads, self.key_width // self.heads, self.value_width // self.heads
        memory = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)
        return DeltaNetState(memory, self.conv.init_tail(batch_size, dtype, device))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's memory and of the convolution's last inputs, the same at every length."""
        channels, width = self.conv.weight.shape
        dtype = self.qkv_proj.weight.dtype
        memory = self.key_width * self.value_width // self.heads * torch.promote_types(dtype, torch.float32).itemsize
        return memory + channels * (width - 1) * dtype.itemsize
