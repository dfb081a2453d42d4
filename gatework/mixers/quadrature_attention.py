"""``QuadratureAttention``: attention over samples of a function, each of which counts by the space it stands for.

Berner et al., Principled Approaches for Extending Neural Architectures to Function Spaces for Operator Learning, 2025, arXiv
2506.10973: what sums over points has to be an integral, so that a model means the same on any grid. With w_s the quadrature weight
of point s (:func:`gatework.ops.quadrature.trapezoid`, or the area of its cell), q, k, v of width K = d_model / heads, per head

    A_ts = w_s exp(q_t . k_s / sqrt(K)) / sum_r w_r exp(q_t . k_r / sqrt(K))    o_t = sum_s A_ts v_s    y = concat_h(o) W_o + b_o

which is a softmax over q_t . k_s / sqrt(K) + log w_s. Equal weights are plain attention over both sides; a point split in two of
half its weight changes nothing; as a grid gets finer, outputs converge as the quadrature rule does, on grids of any density. Plain
attention converges on even grids only.

There are no positions: add coordinates to the inputs. The paper's text was not at hand when this was written, and its released code
has no attention of this form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.mixers.base import TwoSided, check_call, check_heads


@register("quadrature_attention", paper="neural_operator_recipe")
class QuadratureAttention(TwoSided):
    """Attention over both sides, with a quadrature weight for every token.

    ``forward(x (B, T, d_model), quadrature=w (B, T)) -> (B, T, d_model)``; without ``quadrature`` all weights are equal.

    Args:
        d_model: width of the stream.
        heads: heads H, each ``d_model / heads`` wide.

    Weights are positive; only their ratios count. A weight of 0 hides a token, as padding does.

    Initialisation: all matrices normal with standard deviation 0.02, the output's bias 0.

    There is no decoding. ``keep`` computes keys and values for all tokens, and the rest for the kept ones.

    Source: arXiv 2506.10973.

    Raises:
        ValueError: widths that do not divide.
        PartError: a state, or weights that are not one number per token.
    """

    def __init__(self, d_model: int, heads: int = 4) -> None:
        super().__init__()
        check_heads(d_model, heads)
        self.d_model, self.heads, self.head_width = d_model, heads, d_model // heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.o_proj.bias)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, heads={self.heads}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
        quadrature: Float[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the points; ``quadrature`` are their weights, the rest is as in :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, None, mask, segments, keep)
        if quadrature is not None and quadrature.shape != x.shape[:2]:
            raise PartError(f"quadrature has one weight per token, shape {tuple(x.shape[:2])}, not {tuple(quadrature.shape)}")
        places = None
        if keep is not None:
            # Each row's kept tokens side by side, the rest of a shorter row in vain.
            most = int(keep.sum(1).max()) if keep.numel() else 0
            places = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        asked = x if places is None else x.gather(1, places[..., None].expand(-1, -1, self.d_model))
        queries, keys, values = (self._split(linear(of)) for linear, of in self._projections(asked, x))
        bias = self._bias(mask, segments, quadrature, places)
        if bias is not None:
            bias = bias.to(queries.dtype)
        heads = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
        y: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        if places is None or keep is None:
            return y
        y = y * keep.gather(1, places)[..., None]
        return y.new_zeros(x.shape).scatter(1, places[..., None].expand_as(y), y)

    def _projections(self, asked: Tensor, x: Tensor) -> tuple[tuple[nn.Module, Tensor], ...]:
        return (self.q_proj, asked), (self.k_proj, x), (self.v_proj, x)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def _bias(
        self, mask: Tensor | None, segments: Tensor | None, quadrature: Tensor | None, places: Tensor | None
    ) -> Float[Tensor, "B 1 #M S"] | None:
        """What is added to the scores: log w, and minus infinity for what is not seen."""
        bias = None
        if quadrature is not None:
            # Before the logarithm is rounded to the scores' precision: equal weights are exactly 0.
            largest = quadrature.amax(1, keepdim=True) if quadrature.shape[1] else 1
            bias = (quadrature / largest).to(torch.promote_types(quadrature.dtype, torch.float32)).log()[:, None]
        if mask is None and segments is None:
            return None if bias is None else bias[:, None]
        some = mask if mask is not None else segments
        assert some is not None
        place = torch.arange(some.shape[1], device=some.device)
        query = place[None] if places is None else places
        own = place == query[..., None]
        seen = torch.ones_like(own) if mask is None else mask[:, None]
        if segments is not None:
            of_query = segments if places is None else segments.gather(1, places)
            seen = seen & (of_query[..., None] == segments[:, None])
        # Padding sees itself, so that no row of the softmax is empty.
        hidden = ~(seen | own)
        zero = torch.zeros((), device=some.device) if bias is None else bias
        return zero.masked_fill(hidden, -torch.inf)[:, None]
