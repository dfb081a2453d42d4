"""``GatedAttention``: softmax attention with a sigmoid gate, by default on what each head has read, before the output projection.

Qiu et al., Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free, 2025, arXiv 2505.06708.
With the attention of :mod:`gatework.mixers.attention` and x the (normed) input that also feeds q, the gate of token t is

    g_t = sigmoid(W_g x_t)        W_g without bias, one row per gated channel (elementwise) or per head (headwise)

and multiplies, by ``position``: g1 the head outputs o_t before W_o (the paper's choice; g2 is its second best), g2 the values,
g3 the keys, g4 the queries (g2 to g4: right after their linear maps, before norm and rotation), g5 the output after W_o.

Differences. The official code keeps W_g as extra rows of q_proj, per group of a key-value head; here it is a linear of its own
(``gate_proj``), channel for channel in the order of what it multiplies. ``preserve`` is our addition.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State, in_backward
from gatework.core.registry import register
from gatework.mixers.attention import Attention


@register("gated_attention", paper="gated_attention")
class GatedAttention(Attention):
    """Softmax attention with a sigmoid gate on each head's output.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; the gate is computed from the token's own input, so decoding keeps no more
    than :class:`~gatework.mixers.attention.Attention` does.

    Args:
        d_model: width of the stream.
        heads, kv_heads, window, qk_norm, rope, rope_base, causal: as in :class:`~gatework.mixers.attention.Attention`.
        position: what is multiplied: ``g1`` head outputs, ``g2`` values, ``g3`` keys, ``g4`` queries, ``g5`` the projected output.
        gate_form: ``elementwise``, one gate per channel (g1: d_model^2 more parameters); ``headwise``, one per head (g1:
            heads * d_model more parameters; not for g5, which has no heads).
        preserve: start as plain attention, to convert a trained model: W_g = 0 and the gate is ``2 sigmoid(W_g x)`` for good,
            which is exactly 1 at the start.

    Initialisation: W_g like all other weights, normal with standard deviation 0.02: the gates start near 1/2, the branch at half
    strength.

    Metrics: ``gate``, the mean gate over the real tokens that are computed (the paper sees it fall to about 0.1).

    Raises:
        ValueError: as plain attention does; headwise gates at g5.
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
        position: Literal["g1", "g2", "g3", "g4", "g5"] = "g1",
        gate_form: Literal["elementwise", "headwise"] = "elementwise",
        preserve: bool = False,
    ) -> None:
        super().__init__(d_model, heads, kv_heads, window, qk_norm, rope, rope_base, causal)
        if position not in ("g1", "g2", "g3", "g4", "g5"):
            raise ValueError(f"position must be g1, g2, g3, g4 or g5, got {position!r}")
        if gate_form not in ("elementwise", "headwise"):
            raise ValueError(f"gate_form must be elementwise or headwise, got {gate_form!r}")
        if position == "g5" and gate_form == "headwise":
            raise ValueError("position g5 is behind the heads: it takes gate_form elementwise")
        self.position, self.gate_form, self.preserve = position, gate_form, preserve
        gated_heads = self.kv_heads if position in ("g2", "g3") else self.heads
        self.gate_proj = nn.Linear(d_model, gated_heads * (self.head_width if gate_form == "elementwise" else 1), bias=False)
        if preserve:
            nn.init.zeros_(self.gate_proj.weight)
        else:
            nn.init.normal_(self.gate_proj.weight, std=0.02)

    def extra_repr(self) -> str:
        """The settings."""
        return super().extra_repr() + f", position={self.position}, gate_form={self.gate_form}, preserve={self.preserve}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        y = super().forward(x, state, mask, segments, keep)
        if not in_backward():
            gate = self.metrics["gate"]
            if mask is None:
                self.metrics = {"gate": gate.mean()} if gate.numel() else {}
            else:
                real = mask if gate.dim() == 2 or keep is None else mask[keep]
                self.metrics = {"gate": (gate * real).sum() / real.sum().clamp(min=1)}
        return y

    def query(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H K"]:
        """Queries, gated at g4."""
        return self._gated("g4", super().query(x), x)

    def key(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B G K"]:
        """Keys, gated at g3."""
        return self._gated("g3", super().key(x), x)

    def value(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B G K"]:
        """Values, gated at g2."""
        return self._gated("g2", super().value(x), x)

    def output(self, heads: Float[Tensor, "*B H K"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The projected head outputs, gated at g1 (before) or g5 (behind the projection)."""
        y = super().output(self._gated("g1", heads, x), x)
        return self._gated("g5", y[..., None, :], x).squeeze(-2)

    def _gated(self, position: str, what: Tensor, x: Tensor) -> Tensor:
        """``what`` (..., heads, K) times the gates of the tokens ``x``, if this is the gated position."""
        if position != self.position:
            return what
        gate = self.gate_proj(x).sigmoid()
        if self.preserve:
            gate = 2 * gate
        if not in_backward():
            self.metrics = {"gate": gate.detach().mean(-1)}  # By token; `forward` takes the mean.
        return what * gate.unflatten(-1, (what.shape[-2], -1))
