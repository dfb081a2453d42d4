"""``CrateMSSA``: self-attention in which queries, keys and values are one projection onto subspaces.

Pai et al., Masked Completion via Structured Diffusion with White-Box Transformers, 2024, arXiv 2404.02446; the operator is that
of Yu et al., White-Box Transformers via Sparse Rate Reduction, 2023, arXiv 2306.01129, section 2.3. With H subspaces of p =
d_model / H dimensions,

    w_h = x U_h                                   (T, p)
    o_h = softmax(w_h w_h^T / sqrt(p)) w_h
    y   = concat_h(o_h) W_o + b_o

an approximate step of gradient descent on the coding rate of the tokens within the subspaces: tokens move to their like. W_o is
free, as in the official code (the derivation has U^T there). The residual around it is the block's. A masked autoencoder's
decoder subtracts y instead: :class:`gatework.models.MaskedAutoencoder` with ``decoder="inverse"``.

How much a layer compresses is said by the coding rate, here of n tokens of d dimensions Z (n, d), to a precision eps:

    R(Z) = 1/2 logdet(I + d / (n eps^2) Z Z^T)    R^c = sum_h R(Z U_h)

Differences. With one head as wide as the stream the official code has no W_o; here there always is one. Dropout is left out. A
causal form is that of the official language model, decoding is our addition.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.mixers.attention import Attention, Limits
from gatework.mixers.base import KVCache, check_call, put, take


class SubspaceCache(KVCache):
    """A key-value cache whose values are its keys, and which therefore keeps them once."""

    @property
    def nbytes(self) -> int:
        """Bytes that the sequence needs: the used slots, without the room to grow."""
        counts = 0 if self.real is None else self.real.numel() * self.real.element_size()
        return (super().nbytes - counts) // 2 + counts

    def reorder(self, index: Int[Tensor, "B2"]) -> None:
        """Keep the sequences ``index`` of the batch, in that order."""
        super().reorder(index)
        self.values = self.keys

    def append(
        self, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"]
    ) -> tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """Add T real tokens to every row; returns the entries that they may attend to."""
        entries, _ = super().append(keys, values)
        self.values = self.keys
        return entries, entries

    def append_masked(self, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"], mask: Bool[Tensor, "B T"]) -> None:
        """Add the real tokens of every row."""
        super().append_masked(keys, values, mask)
        self.values = self.keys

    def make_room(self, slots: int) -> None:
        """Have room for ``slots`` entries."""
        super().make_room(slots)
        self.values = self.keys


@register("crate_mssa", paper="crate_mae")
class CrateMSSA(Attention):
    """Multi-head subspace self-attention: one projection is q, k and v.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``. It has no positions: permuted tokens give permuted outputs, and a causal
    layer knows the order of its mask alone. Models add positions to their inputs.

    Args:
        d_model: width of the stream.
        heads: subspaces H, each p = ``d_model / heads`` wide.
        causal: each token sees itself and those before it; False sees both sides.

    Parameters: half those of attention, ``2 d_model^2 + d_model``.

    Initialisation: U and W_o normal with standard deviation 0.02, b_o 0.

    Decoding keeps w of all tokens, half of what attention keeps. ``keep`` computes w for all tokens, and scores and output
    projection for the kept ones.

    Source: arXiv 2404.02446.

    Raises:
        ValueError: for a width that the heads do not divide.
    """

    def __init__(self, d_model: int, heads: int = 4, causal: bool = True) -> None:
        super().__init__(d_model, heads, rope=False, causal=causal)
        del self.q_proj, self.k_proj, self.v_proj
        self.subspaces = nn.Linear(d_model, d_model, bias=False)
        self.o_proj = nn.Linear(d_model, d_model)
        for linear in (self.subspaces, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(self.o_proj.bias)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, heads={self.heads}, causal={self.causal}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, SubspaceCache, mask, segments, keep)
        w = self.projected(x)
        entries, limits = w, None
        if isinstance(state, SubspaceCache):
            if mask is not None or state.real is not None:
                limits = Limits.after(state, state.positions(x.shape[1], mask), mask)
            if mask is None:
                entries, _ = state.append(w, w)
            else:
                entries = torch.cat([state.used()[0].to(w.dtype), w], dim=2)
                state.append_masked(w, w, mask)
        elif mask is not None or segments is not None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            limits = Limits.parallel(real.cumsum(1) - 1, mask, segments)
        if keep is None:
            return self.output(self._attend(w, entries, entries, limits).transpose(1, 2), x)
        kept = keep.flatten().nonzero()[:, 0]
        heads_N = self._attend_kept(take(w.transpose(1, 2), kept), kept, keep, entries, entries, limits)
        return put(self.output(heads_N, take(x, kept)), kept, keep.shape)

    def projected(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B H T p"]:
        """w: the tokens in the subspaces."""
        return self.subspaces(x).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def coding_rate(self, x: Float[Tensor, "B T D"], precision: float = 0.1) -> Float[Tensor, "B"]:
        """R^c of each sequence: the sum over the subspaces of the coding rates of w, taken of tokens of length 1.

        ``x`` is what the layer gets. The paper sees it fall from layer to layer.
        """
        return coding_rate(nn.functional.normalize(self.projected(x), dim=-1), precision).sum(1)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> SubspaceCache:
        """An empty cache; dtype and device default to the parameters'."""
        weight = self.subspaces.weight
        shape = (batch_size, self.heads, 0, self.head_width)
        empty = torch.empty(shape, dtype=dtype or weight.dtype, device=device or weight.device)
        return SubspaceCache(empty, empty)

    def state_bytes(self, length: int) -> int:
        """Bytes of w per sequence: ``d_model`` numbers for each token."""
        return self.d_model * length * self.subspaces.weight.element_size()


def coding_rate(tokens: Float[Tensor, "*B n d"], precision: float = 0.1) -> Float[Tensor, "*B"]:
    """R(Z) in nats: what n tokens of d dimensions take to describe to a precision eps.

    Args:
        tokens: Z, as they are; the official measurements scale tokens to length 1 first.
        precision: eps; the default is that of the official measurements, whose ``eps`` of 0.01 is its square.

    The smaller of Z Z^T and Z^T Z is used, in float32 or better: both have the same determinant.
    """
    count, width = tokens.shape[-2:]
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    gram = tokens @ tokens.transpose(-1, -2) if count <= width else tokens.transpose(-1, -2) @ tokens
    one = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(one + width / (max(count, 1) * precision**2) * gram)
    return root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
