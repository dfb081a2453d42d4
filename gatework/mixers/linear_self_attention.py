"""``LinearSelfAttention``: attention without a softmax, on one head as wide as the stream, averaged over the tokens before.

Zheng et al., On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability, 2024, arXiv 2405.16845,
equation 3, without its residual. For token t of a sequence, counted from 1:

    S_t = sum over i <= t of x_i x_i^*    y_t = W_PV S_t W_KQ x_t / max(t - 1, 1)

The paper merges the products of keys' and queries' and of projection's and values' matrices into W_KQ and W_PV, and so does this.
It divides by rho_t = t - 1, the number of pairs of neighbours that the context holds, and predicts from t = 2 on; here t = 1
divides by 1. With ``complex`` the D channels are D/2 complex numbers, (Re, Im) side by side, the weights are complex, and x_i^* is
the conjugate transpose, as in the paper, whose processes are complex; without it everything is real.
:class:`gatework.models.MesaOptimizer` is the paper's whole model.

Computed by the linear recurrence without decay, in chunks: with q = W_KQ x, key and value of a token are both x itself. In the
complex case x^* q has the real part x . q and the imaginary part x . (-i q), each a real inner product of the pairs, so that
two queries read one real memory: y = o(q) + i o(-i q).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.mixers.base import RecurrentMixer, check_chunk, put, take
from gatework.ops.linear_recurrence import gated_linear_recurrence


@dataclass
class LinearSelfAttentionState(State):
    """The memory S, (B, D, D), in float32 or the parameters' dtype where that is finer, and the number of tokens in it, (B,)."""

    memory: Float[Tensor, "B D D"]
    count: Int[Tensor, "B"]


@register("linear_self_attention", paper="mesa_ar")
class LinearSelfAttention(RecurrentMixer):
    """Linear self-attention with merged weights, averaged over the tokens.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time is linear in T, decoding keeps ``d_model**2`` numbers and a count.

    Args:
        d_model: width D of the stream.
        complex: whether the channels are pairs (Re, Im) of complex numbers and the weights complex.
        chunk: chunk length of the parallel form, a power of two.

    Weights: ``kq`` and ``pv``, (D, D); with ``complex`` (D/2, D/2, 2), the last axis holding (Re, Im).

    Initialisation: normal, ``kq`` with standard deviation 1/D, so that scores of tokens with a root mean square of 1 have about
        variance 1, ``pv`` with D^-1/2 (the paper starts from multiples of the identity in two blocks).

    Padding is no token: it is in no sum and in no count. Packed documents start with an empty sum.

    ``keep`` computes ``kq`` and ``pv`` for the kept tokens only; the sum runs over all.

    Raises:
        ValueError: a width below 1, an odd one with ``complex``, a chunk that is no power of two.
    """

    state_type = LinearSelfAttentionState

    def __init__(self, d_model: int, complex: bool = False, chunk: int = 64) -> None:
        super().__init__()
        if d_model < 1 or (complex and d_model % 2):
            raise ValueError(f"d_model must be at least 1, and even where its channels are pairs, got {d_model}")
        check_chunk(chunk)
        self.d_model, self.complex, self.chunk = d_model, complex, chunk
        shape = (d_model // 2, d_model // 2, 2) if complex else (d_model, d_model)
        self.kq = nn.Parameter(torch.randn(shape) / d_model)
        self.pv = nn.Parameter(torch.randn(shape) * d_model**-0.5)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, complex={self.complex}, chunk={self.chunk}"

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        own = state if isinstance(state, LinearSelfAttentionState) else None
        q = self._queries(x) if kept is None else put(self._queries(take(x, kept)), kept, x.shape[:2])
        rows = x[:, :, None].expand(-1, -1, q.shape[2], -1)
        memory = None if own is None else own.memory[:, None].expand(-1, q.shape[2], -1, -1)
        o, memory = gated_linear_recurrence(q, rows, rows, None, state=memory, segments=segments, scale=1.0, chunk=self.chunk)
        count = self._count(x, own, real, segments)
        if own is not None:
            own.memory = memory[:, 0].to(own.memory.dtype)
            own.count = own.count + (x.shape[1] if real is None else real.sum(1))
        o = o / (count - 1).clamp(min=1)[..., None, None].to(o.dtype)
        return self.outputs(o, x, kept)

    def _queries(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B H D"]:
        """W_KQ x and, where numbers are complex, -i times it."""
        q = _times(x, self.kq)
        return torch.stack([q, _turned(q, -1)], -2) if self.complex else q[..., None, :]

    def output(self, o: Float[Tensor, "*B H D"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """W_PV times what the queries have read."""
        read = o[..., 0, :] + _turned(o[..., 1, :], 1) if self.complex else o[..., 0, :]
        return _times(read.to(x.dtype), self.pv)

    def _count(self, x: Tensor, state: LinearSelfAttentionState | None, real: Tensor | None, segments: Tensor | None) -> Tensor:
        """t: how many tokens of its document each token has seen, itself included, (B or 1, T)."""
        place = torch.arange(1, x.shape[1] + 1, device=x.device)[None]
        if segments is not None:
            starts = torch.ones_like(segments, dtype=torch.bool)
            starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
            return place - ((place - 1) * starts).cummax(1).values
        return place if state is None else place + state.count[:, None]

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LinearSelfAttentionState:
        """An empty sum; half precisions are kept in float32."""
        dtype, device = torch.promote_types(dtype or self.kq.dtype, torch.float32), device or self.kq.device
        memory = torch.zeros(batch_size, self.d_model, self.d_model, dtype=dtype, device=device)
        return LinearSelfAttentionState(memory, torch.zeros(batch_size, dtype=torch.long, device=device))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's sum and count, the same at every length."""
        return self.d_model**2 * torch.promote_types(self.kq.dtype, torch.float32).itemsize + 8


def _times(x: Float[Tensor, "*B D"], weight: Tensor) -> Float[Tensor, "*B D"]:
    """``weight x`` for real weights (D, D), or complex ones (D/2, D/2, 2) and pairs."""
    if weight.dim() == 3:
        re, im = weight.unbind(-1)
        # The real matrix of the same map on pairs: each number a + ib is the block [[a, -b], [b, a]].
        blocks = torch.stack([torch.stack([re, -im], -1), torch.stack([im, re], -1)], 1)
        weight = blocks.flatten(2).flatten(0, 1)
    return F.linear(x, weight)


def _turned(x: Float[Tensor, "*B D"], sign: int) -> Float[Tensor, "*B D"]:
    """Pairs (Re, Im) times i (``sign`` 1) or -i."""
    re, im = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-sign * im, sign * re], -1).flatten(-2)
