"""``FourierKArAt``: attention whose softmax is replaced by learned sums of sines and cosines.

Maity et al., Kolmogorov-Arnold Attention: Is Learnable Attention Better For Vision Transformers?, 2025, arXiv 2503.10632 (v3),
sections 3 and 4, equation 2. With the scores S = q k^T / sqrt(K) of a head over N tokens, row t of its attention matrix is

    Phi_tp = sum_j sum_{m=1..G} a_pjm cos(m S_tj) + b_pjm sin(m S_tj)      p = 1 .. r
    A_t    = W Phi_t                                                      W (N, r)
    y      = concat_h(A V) W_o

so every pair of an output row p and a place j has its own function of the score, N x r of them for each head, and each attention
matrix has at most rank r. Rows are no distributions: they have any sign and sum, and nothing is normalised.

What is computed. A V = Phi (W^T V): with U = W^T V (r rows) the N x N matrix is never formed. The harmonics come from one sine
and one cosine of S by (c_1 + i s_1)^m, and the backward pass computes them again from S, so that training keeps S and not 2 G
matrices of its size.

Differences. The base function that KANs add to the sum is 0, as in the paper's experiments. The projection of the rows onto the
simplex, which is optional in the paper and made its results worse, is left out. The paper does not say how W starts: see
:class:`FourierOperator`. No official code was found.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatework.core.contracts import No, State
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.mixers.base import TwoSided, check_call, check_heads
from gatework.ops.precision import without_autocast


class FourierOperator(nn.Module):
    """Phi and W of all heads of a layer: from scores and values to what the heads read.

    ``forward(scores (B, H, T, N), values (B, H, N, K)) -> (B, H, T, K)``; with ``real`` (B, N) the places of padding take no part.

    Args:
        heads: H.
        tokens: N.
        rank: r.
        grid_size: G, the number of harmonics.

    Parameters: ``cosine`` and ``sine`` (H, G, N, r), a and b; ``projection`` (H, N, r), W. In all ``H N r (2 G + 1)``.

    Initialisation: a and b normal with standard deviation 1, W normal with ``1 / (N sqrt(G r))``, our choice, with which a row of
    attention has length 1, and a head writes as much as its values hold.
    """

    def __init__(self, heads: int, tokens: int, rank: int, grid_size: int) -> None:
        super().__init__()
        self.cosine = nn.Parameter(torch.randn(heads, grid_size, tokens, rank))
        self.sine = nn.Parameter(torch.randn(heads, grid_size, tokens, rank))
        self.projection = nn.Parameter(torch.randn(heads, tokens, rank) / (tokens * (grid_size * rank) ** 0.5))

    def extra_repr(self) -> str:
        """The sizes."""
        heads, grid_size, tokens, rank = self.cosine.shape
        return f"heads={heads}, tokens={tokens}, rank={rank}, grid_size={grid_size}"

    def forward(
        self, scores: Float[Tensor, "B H T N"], values: Float[Tensor, "B H N K"], real: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B H T K"]:
        """What the heads read."""
        cosine, sine, projection = (p.to(scores.dtype) for p in (self.cosine, self.sine, self.projection))
        if real is not None:
            real = real[:, None, None, :].to(scores.dtype)
            values = values * real.transpose(-1, -2)
        rows: Tensor = _Rows.apply(scores, cosine, sine, real)
        return rows @ (projection.transpose(-1, -2) @ values)

    def matrix(self, scores: Float[Tensor, "B H T N"]) -> Float[Tensor, "B H T N"]:
        """The attention matrices A, for looking at them."""
        cosine, sine, projection = (p.to(scores.dtype) for p in (self.cosine, self.sine, self.projection))
        return _Rows.apply(scores, cosine, sine, None) @ projection.transpose(-1, -2)


def _harmonics(scores: Tensor, real: Tensor | None, count: int) -> list[tuple[Tensor, Tensor]]:
    """cos(m S) and sin(m S) for m = 1 .. count, 0 at padding."""
    cosine, sine = scores.cos(), scores.sin()
    if real is not None:
        cosine, sine = cosine * real, sine * real
    found = [(cosine, sine)]
    for _ in range(count - 1):
        c, s = found[-1]
        found.append(((c * cosine).addcmul_(s, sine, value=-1), (s * cosine).addcmul_(c, sine)))
    return found


class _Rows(torch.autograd.Function):
    """Phi (B, H, T, r) from scores (B, H, T, N) and coefficients (H, G, N, r); keeps the scores alone."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, cosine: Tensor, sine: Tensor, real: Tensor | None) -> Tensor:
        ctx.save_for_backward(scores, cosine, sine, real)
        rows = scores.new_zeros(*scores.shape[:-1], cosine.shape[-1])
        for m, (c, s) in enumerate(_harmonics(scores, real, cosine.shape[1])):
            rows += c @ cosine[:, m]
            rows += s @ sine[:, m]
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        scores, cosine, sine, real = ctx.saved_tensors
        d_scores, d_cosine, d_sine = torch.zeros_like(scores), torch.empty_like(cosine), torch.empty_like(sine)
        for m, (c, s) in enumerate(_harmonics(scores, real, cosine.shape[1])):
            d_c, d_s = d_rows @ cosine[:, m].transpose(-1, -2), d_rows @ sine[:, m].transpose(-1, -2)
            d_scores.add_((c * d_s).addcmul_(s, d_c, value=-1), alpha=m + 1)
            d_cosine[:, m] = (c.transpose(-1, -2) @ d_rows).sum(0)
            d_sine[:, m] = (s.transpose(-1, -2) @ d_rows).sum(0)
        return d_scores, d_cosine, d_sine, None


@register("fourier_karat", paper="fourier_karat")
class FourierKArAt(TwoSided):
    """Attention with learned Fourier functions in place of the softmax.

    ``forward(x (B, tokens, d_model)) -> (B, tokens, d_model)``, not causal. The coefficients belong to places, so a layer has one
    length, and what it learns at one place it does not know at another.

    Args:
        d_model: width of the stream.
        tokens: N, the number of tokens, the same for all sequences.
        heads: heads H, each K = ``d_model / heads`` wide.
        rank: r, the most that the rank of an attention matrix can be.
        grid_size: G, harmonics per function; the paper takes 3, and 1 for its larger models.

    The coefficients are each layer's own (the paper's GnB). :func:`universal` makes the layers of a model share one set (GnU).

    Padding takes no part: its places add nothing to Phi and are read by nobody. Outputs that are not to be kept are set to 0, and
    computed all the same.

    Initialisation: W_q, W_k, W_v and W_o normal with standard deviation 0.02, no biases; the coefficients as in
    :class:`FourierOperator`.

    Source: arXiv 2503.10632.

    Raises:
        ValueError: sizes that do not fit.
        PartError: another number of tokens, a state, ``segments``.
    """

    capabilities = TwoSided.capabilities | {
        "packs": No("its coefficients belong to the places of one sequence of a fixed length"),
        "keeps": No("its few products over a small, fixed number of tokens are made for all of them"),
        "any_length": No("its coefficients belong to places"),
    }

    def __init__(self, d_model: int, tokens: int, heads: int = 4, rank: int = 12, grid_size: int = 3) -> None:
        super().__init__()
        check_heads(d_model, heads)
        if tokens < 1 or rank < 1 or grid_size < 1:
            raise ValueError(f"tokens, rank and grid_size must be at least 1, got {tokens}, {rank} and {grid_size}")
        self.d_model, self.tokens, self.heads, self.head_width = d_model, tokens, heads, d_model // heads
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
        self.operator = FourierOperator(heads, tokens, rank, grid_size)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, None, mask, segments, keep)
        if x.shape[1] != self.tokens:
            raise PartError(f"fourier_karat was built for {self.tokens} tokens, not {x.shape[1]}")
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        with without_autocast(x.device):
            exact = torch.promote_types(x.dtype, torch.float32)
            scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * self.head_width**-0.5
            heads = self.operator(scores, v.to(exact), mask)
        y: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2).to(v.dtype))
        return y if keep is None else y.masked_fill(~keep[..., None], 0)



def universal(model: nn.Module) -> int:
    """Let all :class:`FourierKArAt` layers of a model use the operators of the first one: the paper's universal configuration.

    The operators of the others are dropped; head h of every layer has the same functions from now on. Call it before the optimizer
    is made. In a ``state_dict`` the shared values stand under the name of each layer.

    Returns:
        The number of layers that share.

    Raises:
        PartError: no such layer, or layers of different sizes.
    """
    layers = [module for module in model.modules() if isinstance(module, FourierKArAt)]
    if not layers:
        raise PartError("there is no FourierKArAt layer in this model")
    if len({repr(layer.operator) for layer in layers}) > 1:
        raise PartError("FourierKArAt layers of different sizes cannot share: give all the same heads, rank and grid_size")
    for layer in layers:
        layer.operator = layers[0].operator
    return len(layers)
