"""``LinearAttention``: attention whose softmax is replaced by a feature map, so that its cost is linear in time.

Katharopoulos et al., Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention, 2020, arXiv 2006.16236,
equations 7 (all tokens) and 16 to 20 (causal). With head h of H, K = d_model / H, and a feature map phi of each element:

    q = phi(x W_q)    k = phi(x W_k)    v = x W_v
    S_t = S_{t-1} + k_t^T v_t    z_t = z_{t-1} + k_t    o_t = q_t S_t / (q_t z_t^T + eps)
    y = concat_h(o_h) W_o

Without ``causal`` every token reads the sums over all tokens. Without ``normalize`` o_t = K^-1/2 q_t S_t, which with the identity
for phi and a ``gate`` is gated linear attention (:mod:`gatework.mixers.gla`) whose decays are all 1.

eps is 1e-6 as in the released code; its layer has biases in its linear maps, of which the paper says nothing, and this one none.
The paper's map is elu(x) + 1; relu(x) is as positive, the identity is not and cannot be normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, State
from gatework.core.registry import register
from gatework.mixers.base import RecurrentMixer, check_chunk, check_heads, of_kept
from gatework.ops.linear_recurrence import gated_linear_recurrence
from gatework.ops.precision import without_autocast

#: Added to the normaliser.
EPS = 1e-6


@dataclass
class LinearAttentionState(State):
    """The sums S of every head, with ``normalize`` z as one more value channel (B, H, K, K + 1), in float32 or the parameters'
    dtype where that is finer."""

    memory: Float[Tensor, "B H K V"]


@register("linear_attention", paper="linear_attention")
class LinearAttention(RecurrentMixer):
    """Linear attention: a matrix state per head that forgets nothing.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``heads * K * (K + 1)``
    numbers whatever the length.

    Args:
        d_model: width of the stream.
        heads: H; each is K = ``d_model / heads`` wide.
        feature_map: phi: ``elu`` is elu(x) + 1, ``relu``, or ``identity``.
        normalize: divide by the sum of a token's weights; None does so where the feature map is not the identity.
        gate: RMS norm (eps 1e-5, one gain vector for all heads) of what a head has read, times silu(x W_g), as gated linear
            attention has it.
        causal: False lets every token see both sides (then no decoding).
        chunk: chunk length of the causal parallel form, a power of two.

    Initialisation: PyTorch's default for every linear layer, gains of the norm 1. No biases.

    Padding has no key and no value. Packed documents start with empty sums.

    ``keep`` computes queries, gates and the output projection for the kept tokens only; the sums are run for all.

    Raises:
        ValueError: for a width that heads do not divide, an unknown feature map, a normalised identity.
    """

    state_type = LinearAttentionState

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        feature_map: Literal["elu", "relu", "identity"] = "elu",
        normalize: bool | None = None,
        gate: bool = False,
        causal: bool = True,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        check_heads(d_model, heads)
        if feature_map not in ("elu", "relu", "identity"):
            raise ValueError(f"feature_map must be elu, relu or identity, got {feature_map!r}")
        if normalize and feature_map == "identity":
            raise ValueError("weights of either sign have no sum to divide by: feature_map identity takes normalize false")
        check_chunk(chunk)
        self.d_model, self.heads, self.head_width = d_model, heads, d_model // heads
        self.feature_map, self.causal, self.chunk = feature_map, causal, chunk
        self.normalize = feature_map != "identity" if normalize is None else normalize
        if not causal:
            answer = No("it was built with causal=False and sees later tokens")
            self.capabilities = self.capabilities | {"causal": answer, "decodes": answer}
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.g_proj = nn.Linear(d_model, d_model, bias=False) if gate else None
        self.norm = nn.RMSNorm(self.head_width, eps=1e-5) if gate else None
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, feature_map={self.feature_map}, normalize={self.normalize}"
        return f"{shown}, causal={self.causal}, chunk={self.chunk}"

    def features(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H K"]:
        """phi of projected tokens, head by head."""
        if self.feature_map == "elu":
            x = F.elu(x) + 1
        elif self.feature_map == "relu":
            x = F.relu(x)
        return x.unflatten(-1, (self.heads, -1))

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        q, k = self.features(of_kept(self.q_proj, x, kept)), self.features(self.k_proj(x))
        v = self.v_proj(x).unflatten(-1, (self.heads, -1))
        if real is not None:
            k = k.masked_fill(~real[..., None, None], 0)
        if self.normalize:
            v = F.pad(v, (0, 1), value=1.0)
        scale = 1.0 if self.normalize else self.head_width**-0.5
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            q, k, v = q.to(wide), k.to(wide), v.to(wide)
            if self.causal:
                memory = state.memory if isinstance(state, LinearAttentionState) else None
                o, memory = gated_linear_recurrence(q, k, v, None, state=memory, segments=segments, scale=scale, chunk=self.chunk)
                if isinstance(state, LinearAttentionState):
                    state.memory = memory.to(state.memory.dtype)
            elif segments is None:
                o = (q * scale).transpose(1, 2) @ torch.einsum("bthk,bthv->bhkv", k, v)
                o = o.transpose(1, 2)
            else:
                # What a token's document holds before and after it, both with the token's own.
                before, _ = gated_linear_recurrence(q, k, v, None, segments=segments, scale=scale, chunk=self.chunk)
                after, _ = gated_linear_recurrence(
                    q.flip(1), k.flip(1), v.flip(1), None, segments=segments.flip(1), scale=scale, chunk=self.chunk
                )
                o = before + after.flip(1) - scale * (q * k).sum(-1, keepdim=True) * v
            if self.normalize:
                o = o[..., :-1] / (o[..., -1:] + EPS)
        return self.outputs(o, x, kept)

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The output projection, behind norm and gate if there are any."""
        o = o.to(x.dtype)
        if self.norm is not None and self.g_proj is not None:
            o = self.norm(o) * F.silu(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        out: Tensor = self.o_proj(o.flatten(-2))
        return out

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LinearAttentionState:
        """Sums of nothing; half precisions are kept in float32."""
        weight = self.q_proj.weight
        dtype = torch.promote_types(dtype or weight.dtype, torch.float32)
        shape = batch_size, self.heads, self.head_width, self.head_width + self.normalize
        return LinearAttentionState(torch.zeros(shape, dtype=dtype, device=device or weight.device))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's sums, the same at every length."""
        size = torch.promote_types(self.q_proj.weight.dtype, torch.float32).itemsize
        return self.d_model * (self.head_width + self.normalize) * size
