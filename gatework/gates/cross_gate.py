"""``SymmetricCrossGate``: two streams of features of one scene refine each other through gates.

Pyramidal Adaptive Cross-Gating for Multimodal Detection (PACGNet), 2025, arXiv 2512.18291, its symmetric cross-gating; in the
release the class is called ``RIFusion``. For streams a and b of one shape, stream a:

    r_a = Drop(a + DSConv(a))            DSConv: depthwise 3x3, BN, SiLU, 1x1, BN, SiLU
    m   = sigmoid(conv_{C->1}(r_b))      where the other stream sees something
    G   = BN(conv(SiLU(BN(conv(r_b)))))  what it sees, through max(1, C // 4) channels
    a'  = BN(a + r_a (1 + m) + Drop(sigmoid(conv_{C->C}(G)) G))

and stream b with the roles swapped, from the same r_a and r_b and with weights of its own.

The token form is ours: 1x1 convolutions are linear layers, batch norms layer norms, and the depthwise convolution, which mixes
neighbours, is left out (its norm scales the channels), so that a token meets its own partner only.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.registry import register
from gatework.gates.streams import check_streams, norm, pointwise


@register("cross_gate", paper="pacg")
class SymmetricCrossGate(Component):
    """Two streams that gate each other, position by position.

    ``forward(a, b) -> (a', b')``, all (B, d_model, H, W), or (B, T, d_model) with ``tokens``. Pictures are normalised by batch
    statistics in training.

    Args:
        d_model: channels C of each stream.
        tokens: the token form.
        dropout: of the refined streams and of what crosses.

    Initialisation: PyTorch's for each layer.

    Raises:
        ValueError: d_model below 1 (below 8 with ``tokens``, where a layer norm over one channel is a constant), dropout outside
            [0, 1).
    """

    family = "gate"

    def __init__(self, d_model: int, tokens: bool = False, dropout: float = 0.1) -> None:
        super().__init__()
        if d_model < (8 if tokens else 1):
            raise ValueError(f"d_model must be at least {8 if tokens else 1}{' with tokens' * tokens}, got {d_model}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.d_model, self.tokens = d_model, tokens
        self.a, self.b = _Stream(d_model, tokens, dropout), _Stream(d_model, tokens, dropout)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, tokens={self.tokens}"

    def forward(self, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> tuple[Tensor, Tensor]:
        """Refine both streams.

        Raises:
            PartError: the streams' shapes differ or are not of the form.
        """
        check_streams(a, b, self.d_model, self.tokens)
        r_a, r_b = self.a.refined(a), self.b.refined(b)
        return self.a(a, r_a, r_b), self.b(b, r_b, r_a)


class _Stream(nn.Module):
    """One stream's layers; the other guides it."""

    def __init__(self, d: int, tokens: bool, dropout: float) -> None:
        super().__init__()
        narrow = max(1, d // 4)
        depthwise = [] if tokens else [nn.Conv2d(d, d, 3, padding=1, groups=d, bias=False)]
        self.refine = nn.Sequential(
            *depthwise, norm(d, tokens), nn.SiLU(), pointwise(d, d, tokens, bias=False), norm(d, tokens), nn.SiLU()
        )
        self.mask = pointwise(d, 1, tokens)
        self.guide = nn.Sequential(
            pointwise(d, narrow, tokens, bias=False), norm(narrow, tokens), nn.SiLU(),
            pointwise(narrow, d, tokens, bias=False), norm(d, tokens),
        )  # fmt: skip
        self.gate = pointwise(d, d, tokens)
        self.norm = norm(d, tokens)
        self.dropout = nn.Dropout(dropout)

    def refined(self, x: Tensor) -> Tensor:
        out: Tensor = self.dropout(x + self.refine(x))
        return out

    def forward(self, x: Tensor, refined: Tensor, other: Tensor) -> Tensor:
        guide = self.guide(other)
        crossed = self.dropout(torch.sigmoid(self.gate(guide)) * guide)
        out: Tensor = self.norm(x + refined * (1 + torch.sigmoid(self.mask(other))) + crossed)
        return out
