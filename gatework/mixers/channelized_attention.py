"""``ChannelizedAttention``: attention whose projections keep the heads apart, or let them mix by scalars.

Kerce and Fox, The Dual-Stream Transformer: Channelized Architecture for Interpretable Language Modeling, 2026, arXiv 2603.07461.
The width d_model = H p is H channels of p. Each of the four projections of attention is one of

    independent   y_h = W_h x_h                        block-diagonal: head h knows channel h alone
    kronecker     y_g = sum_h M_gh W_h x_h             (M kron I_p) blockdiag(W): heads exchange whole vectors by scalars M (H, H)
    dense         y = W x

Where any of them is not dense, each channel of the input is first divided by its own root mean square, so that no norm over the
whole width carries one head's scale into another; the norm in front of the mixer then changes a channel by its gains alone. The
method's two streams are a depth policy of their own, :class:`gatework.depth.DualStream`.

Reconstructed: of the paper only the abstract and summaries could be read. Those name the three mixings, norms by channel and the
amplification of logits, but not which projections mix nor how they start; the Kronecker form may be M kron I alone, which is what
it is here for W = I. Hence a setting for each projection.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.mixers.attention import Attention

Mixing = Literal["independent", "kronecker", "dense"]
MIXINGS = ("independent", "kronecker", "dense")


class ChannelProjection(nn.Module):
    """A linear map that is block-diagonal over the heads' channels, with or without a mixing of the heads.

    ``forward(x (..., H p)) -> (..., H p)``.

    Args:
        heads: H.
        width: p.
        mixes: whether there is M.

    Parameters: ``weight`` (H, p, p), each head's block (out, in); ``mixing`` (H, H), M, or None.

    Initialisation: blocks normal with standard deviation ``0.02 sqrt(H)``, so that outputs start as large as those of a dense map
    with 0.02; M the identity.
    """

    def __init__(self, heads: int, width: int, mixes: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.02 * heads**0.5 * torch.randn(heads, width, width))
        self.mixing = nn.Parameter(torch.eye(heads)) if mixes else None

    def extra_repr(self) -> str:
        """The sizes."""
        return f"heads={self.weight.shape[0]}, width={self.weight.shape[1]}, mixes={self.mixing is not None}"

    def dense(self) -> Float[Tensor, "D D"]:
        """The same map as one matrix (out, in)."""
        blocks = torch.block_diag(*self.weight)
        if self.mixing is None:
            return blocks
        return torch.kron(self.mixing, torch.eye(self.weight.shape[1], dtype=blocks.dtype, device=blocks.device)) @ blocks

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Apply the map."""
        count, width, _ = self.weight.shape
        channels = x.reshape(-1, count, width).transpose(0, 1)
        y = channels @ self.weight.transpose(-1, -2)
        if self.mixing is not None:
            # All tokens' vectors side by side: one product for the exchange between heads.
            y = (self.mixing @ y.flatten(1)).view_as(y)
        return y.transpose(0, 1).reshape(x.shape)


@register("channelized_attention", paper="dual_stream")
class ChannelizedAttention(Attention):
    """Softmax attention with projections that are structured by head.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``. All dense it is :class:`~gatework.mixers.attention.Attention`.

    Args:
        d_model: width of the stream.
        heads: heads H, each p = ``d_model / heads`` wide.
        mixing: of all four projections: ``independent``, ``kronecker`` (the paper's recommendation) or ``dense``.
        q, k, v, o: the same for one projection (of queries, keys, values, outputs); None is ``mixing``.
        amplification: gamma, by which the attention logits are multiplied in evaluation (the paper's test of whether heads choose
            or average takes 1 to 16); see :func:`amplify`.
        rope, rope_base, causal: as in :class:`~gatework.mixers.attention.Attention`.

    Parameters per projection: independent ``d_model p``, kronecker ``d_model p + heads^2``, dense ``d_model^2``; FLOPs per token
    twice ``d_model p``, ``d_model (p + heads)``, ``d_model^2``.

    The norm by channel has eps 1e-6 and no gains: those of the block's norm in front of it do.

    Initialisation: dense projections normal with standard deviation 0.02, the others as in :class:`ChannelProjection`.

    Decoding keeps the keys and values of all tokens, as attention does, and ``keep`` computes what it does there.

    Source: arXiv 2603.07461.

    Raises:
        ValueError: as plain attention does; an unknown mixing, an amplification that is not positive.
    """

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        mixing: Mixing = "kronecker",
        q: Mixing | None = None,
        k: Mixing | None = None,
        v: Mixing | None = None,
        o: Mixing | None = None,
        amplification: float = 1.0,
        rope: bool = True,
        rope_base: float = 10000.0,
        causal: bool = True,
    ) -> None:
        super().__init__(d_model, heads, rope=rope, rope_base=rope_base, causal=causal)
        self.mixings = {name: given or mixing for name, given in (("q", q), ("k", k), ("v", v), ("o", o))}
        for name, chosen in self.mixings.items():
            if chosen not in MIXINGS:
                raise ValueError(f"the mixing of {name} must be independent, kronecker or dense, got {chosen!r}")
            if chosen != "dense":
                setattr(self, f"{name}_proj", ChannelProjection(heads, self.head_width, chosen == "kronecker"))
        if amplification <= 0:
            raise ValueError(f"amplification must be positive, got {amplification}")
        self.amplification = amplification

    def extra_repr(self) -> str:
        """The settings."""
        mixings = ", ".join(f"{name}={chosen}" for name, chosen in self.mixings.items())
        shown = f"d_model={self.d_model}, heads={self.heads}, {mixings}, amplification={self.amplification}"
        return f"{shown}, rope={self.rope}, rope_base={self.rope_base}, causal={self.causal}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        if x.shape[-1] == self.d_model and set(self.mixings.values()) != {"dense"}:
            x = F.rms_norm(x.unflatten(-1, (self.heads, self.head_width)), (self.head_width,), eps=1e-6).flatten(-2)
        return super().forward(x, state, mask, segments, keep)

    def _queries(self, x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        queries = super()._queries(x, cos, sin)
        return queries if self.training or self.amplification == 1 else queries * self.amplification


def amplify(model: nn.Module, factor: float) -> int:
    """Multiply the attention logits of all :class:`ChannelizedAttention` layers of a model by ``factor`` in evaluation.

    Returns:
        The number of layers.

    Raises:
        ValueError: a factor that is not positive.
    """
    if factor <= 0:
        raise ValueError(f"the factor must be positive, got {factor}")
    layers = [module for module in model.modules() if isinstance(module, ChannelizedAttention)]
    for layer in layers:
        layer.amplification = factor
    return len(layers)
