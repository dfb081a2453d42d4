"""``PyramidGate``: two streams become one at a level of a pyramid, under a spatial gate from the level before.

Pyramidal Adaptive Cross-Gating for Multimodal Detection (PACGNet), 2025, arXiv 2512.18291, its pyramidal feature-aware multimodal
gating; in the release the class is called ``ADD``. At a level with streams a, b of C channels, after a level of C / 2 channels and
twice the resolution with a0, b0:

    S      = sigmoid(conv_{->1}(SiLU(BN(conv([a0; b0])))))   3x3, stride 2, max(16, C // 4) hidden; resized where sizes differ
    [u; v] = conv(ReLU(BN(conv([a; b]))))                    1x1, max(32, C // 2) hidden channels, 2 C out
    p      = softmax(conv_{2C->2}([u; v]))                   two shares per position
    out    = (p_a u + p_b v) (1 + S)

The token form is ours: all convolutions are linear layers, batch norms layer norms, and the level before has as many tokens (pool
them first), so that an output token sees its own position only. ``modality_dropout`` is the release's option.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.gates.streams import check_streams, norm, pointwise


@register("pyramid_gate", paper="pacg")
class PyramidGate(Component):
    """Fuses two streams of a level, gated by the finer level before.

    ``forward(a, b, before_a, before_b) -> out``: a, b and out are (B, d_model, H, W), the level before (B, d_model // 2, H0, W0),
    of about twice the size; with ``tokens`` (B, T, d_model) and (B, T, d_model // 2).

    Args:
        d_model: channels C of the level, even.
        tokens: the token form.
        modality_dropout: while training, the chance of each sample that one of its streams, drawn anew, is 0 at both levels.

    Initialisation: PyTorch's for each layer.

    Raises:
        ValueError: d_model is odd or below 2, modality_dropout outside [0, 1].
    """

    family = "gate"

    def __init__(self, d_model: int, tokens: bool = False, modality_dropout: float = 0.0) -> None:
        super().__init__()
        if d_model < 2 or d_model % 2:
            raise ValueError(f"d_model must be even and at least 2, got {d_model}")
        if not 0 <= modality_dropout <= 1:
            raise ValueError(f"modality_dropout must be in [0, 1], got {modality_dropout}")
        self.d_model, self.tokens, self.modality_dropout = d_model, tokens, modality_dropout
        narrow, wide = max(16, d_model // 4), max(32, d_model // 2)
        first = nn.Linear(d_model, narrow, bias=False) if tokens else nn.Conv2d(d_model, narrow, 3, 2, 1, bias=False)
        self.spatial = nn.Sequential(first, norm(narrow, tokens), nn.SiLU(), pointwise(narrow, 1, tokens))
        self.interaction = nn.Sequential(
            pointwise(2 * d_model, wide, tokens, bias=False), norm(wide, tokens), nn.ReLU(), pointwise(wide, 2 * d_model, tokens)
        )
        self.share = pointwise(2 * d_model, 2, tokens)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, tokens={self.tokens}, modality_dropout={self.modality_dropout}"

    def forward(
        self,
        a: Float[Tensor, "..."],
        b: Float[Tensor, "..."],
        before_a: Float[Tensor, "..."],
        before_b: Float[Tensor, "..."],
    ) -> Float[Tensor, "..."]:
        """Fuse the level.

        Raises:
            PartError: shapes that differ or are not of the form.
        """
        check_streams(a, b, self.d_model, self.tokens)
        check_streams(before_a, before_b, self.d_model // 2, self.tokens)
        if len(a) != len(before_a):
            raise PartError(f"the level before has {len(before_a)} examples and this one {len(a)}; they are levels of one batch")
        if self.tokens and a.shape[1] != before_a.shape[1]:
            raise PartError(f"the level before has {before_a.shape[1]} tokens and this one {a.shape[1]}; make them equal first")
        if self.training and self.modality_dropout:
            keep_a, keep_b = self._kept(a)
            a, b, before_a, before_b = a * keep_a, b * keep_b, before_a * keep_a, before_b * keep_b
        axis = -1 if self.tokens else 1
        spatial = torch.sigmoid(self.spatial(torch.cat([before_a, before_b], axis)))
        if not self.tokens and spatial.shape[2:] != a.shape[2:]:
            spatial = F.interpolate(spatial, size=a.shape[2:], mode="nearest")
        mixed = self.interaction(torch.cat([a, b], axis))
        shares = self.share(mixed).softmax(axis)
        (u, v), (p_a, p_b) = mixed.chunk(2, axis), shares.chunk(2, axis)
        return (p_a * u + p_b * v) * (1 + spatial)

    def _kept(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """For each sample 0 or 1 by stream, never 0 for both."""
        drop, second = torch.rand(2, len(like), *[1] * (like.dim() - 1), device=like.device)
        lost = drop < self.modality_dropout
        return (~(lost & (second < 0.5))).to(like.dtype), (~(lost & (second >= 0.5))).to(like.dtype)
