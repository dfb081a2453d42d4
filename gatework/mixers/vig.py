"""``BidirectionalGLA2d``: gated linear attention over both directions of a sequence or picture, mixed with its local features.

Liao et al., ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention, 2024, arXiv 2405.18425. With the T tokens
of a grid in the order of its rows, per head, K = expand_k d_model / heads and V = d_model / heads:

    c = silu(depthwise 3 x 3 convolution of x on the grid, zeros around it; without a grid 3 wide along the sequence)
    q = c W_q    k = c W_k    v = c W_v    la_f, la_b = logsigmoid((c W_1) W_2 + b_2) / normalizer
    o = (gla(q, k, v, la_f) + reversed gla of the reversed q, k, v, la_b) / 2
    g = sigmoid(c W_g + b_g)    y = concat_h(g RMSNorm(o_h) + (1 - g) RMSNorm(c_h)) W_o

where gla is S_t = diag(exp la_t) S_{t-1} + k_t^T v_t, o_t = K^-1/2 q_t S_t. Queries, keys and values are shared by the directions,
only the decays are each one's own; a token meets itself in both, hence the half. c_h is the h-th piece of c's channels, which is
why values are as wide as the stream. Each norm has one gain vector of length V for all heads (eps 1e-5).

Defaults are those of the released models (expand_k 0.5; their layer alone has 1). Left out: its rotary positions, which its own
evaluation skips, and its class token. The released code makes q, k and v by one matrix, whose Xavier start sees a wider output;
here they are three, each started by itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, State
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.mixers.base import RecurrentMixer, TwoSided, check_call, check_chunk, check_heads, of_kept
from gatework.ops.linear_recurrence import gated_linear_recurrence


@register("vig", paper="vig")
class BidirectionalGLA2d(TwoSided, RecurrentMixer):
    """Bidirectional gated linear attention with a local convolution.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``, T = rows * columns on a grid; time and memory are linear in T.

    Args:
        d_model: width of the stream.
        heads: H; keys are K = ``expand_k d_model / heads`` wide, values ``d_model / heads``.
        grid: rows and columns of the tokens; None is a sequence of any length.
        expand_k: total key width as a share of ``d_model``.
        decay_rank: width between the two matrices that make the decays.
        normalizer: divides the log-decays; 16 makes a token's memory about 24 tokens long, in each direction, at initialisation.
        chunk: chunk length of the recurrence, a power of two.

    Initialisation: all matrices and the convolution Xavier uniform with gain 2^-2.5, biases 0, gains of the norms 1.

    Padding takes no place in a sequence: its neighbours are neighbours of each other. On a grid it keeps its place and is read as
        zeros, by the convolution and by the recurrence, which it does not decay. Packed documents do not see each other; a grid
        holds one picture.

    There is no decoding. ``keep`` computes queries, gates and the output projection for the kept tokens only.

    Raises:
        ValueError: for sizes that do not divide, or a grid without rows or columns.
    """

    state_type = State

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        grid: tuple[int, int] | None = None,
        expand_k: float = 0.5,
        decay_rank: int = 16,
        normalizer: float = 16.0,
        chunk: int = 64,
    ) -> None:
        super().__init__()
        key_width = round(d_model * expand_k)
        check_heads(d_model, heads)
        if key_width < 1 or key_width % heads:
            raise ValueError(f"the key width {key_width}, expand_k {expand_k} of d_model, is not divisible by heads {heads}")
        if decay_rank < 1 or normalizer <= 0:
            raise ValueError(f"decay_rank must be at least 1 and normalizer positive, got {decay_rank} and {normalizer}")
        check_chunk(chunk)
        if grid is not None:
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"grid is (rows, columns), both at least 1, not {tuple(grid)}")
            self.capabilities = self.capabilities | {
                "any_length": No("the grid fixes the number of tokens"), "packs": No("a grid holds one picture"),
            }
        self.d_model, self.heads, self.grid = d_model, heads, None if grid is None else tuple(grid)
        self.normalizer, self.chunk = normalizer, chunk
        self.convolution = nn.Parameter(torch.empty(d_model, 1, *((3,) if grid is None else (3, 3))))
        self.q_proj = nn.Linear(d_model, key_width, bias=False)
        self.k_proj = nn.Linear(d_model, key_width, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.decay_in = nn.Linear(d_model, decay_rank, bias=False)
        self.decay_out = nn.Linear(decay_rank, 2 * key_width)
        self.g_proj = nn.Linear(d_model, d_model)
        self.norm = nn.RMSNorm(d_model // heads, eps=1e-5)
        self.local_norm = nn.RMSNorm(d_model // heads, eps=1e-5)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        nn.init.xavier_uniform_(self.convolution, gain=2**-2.5)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.decay_in, self.decay_out, self.g_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={self.d_model}, heads={self.heads}, grid={self.grid}"
        return f"{shown}, normalizer={self.normalizer}, chunk={self.chunk}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        if self.grid is None:
            return super().forward(x, state, mask, segments, keep)
        check_call(self, self.d_model, x, state, None, mask, segments, keep)
        rows, columns = self.grid
        if x.shape[1] != rows * columns:
            raise PartError(f"vig was built for {rows * columns} tokens, a grid of {rows} x {columns}, not for {x.shape[1]}")
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        return self.mix(x, None, mask, None, None if keep is None else keep.flatten().nonzero()[:, 0])

    def local(
        self, x: Float[Tensor, "B T D"], real: Bool[Tensor, "B T"] | None, segments: Int[Tensor, "B T"] | None
    ) -> Float[Tensor, "B T D"]:
        """The convolution and its activation; 0 at padding, which ``x`` holds zeros at."""
        if self.grid is not None:
            y = F.conv2d(x.transpose(1, 2).unflatten(2, self.grid), self.convolution, padding=1, groups=self.d_model)
            y = y.flatten(2).transpose(1, 2).to(x.dtype)
        else:
            weight = self.convolution[:, 0].to(x.dtype)
            earlier, later = F.pad(x, (0, 0, 1, 0))[:, :-1], F.pad(x, (0, 0, 0, 1))[:, 1:]
            if segments is not None and x.shape[1]:
                same = segments[:, 1:, None] == segments[:, :-1, None]
                earlier, later = earlier * F.pad(same, (0, 0, 1, 0)), later * F.pad(same, (0, 0, 0, 1))
            y = earlier * weight[:, 0] + x * weight[:, 1] + later * weight[:, 2]
        y = F.silu(y)
        return y if real is None else y.masked_fill(~real[..., None], 0)

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`. On a grid padding may be anywhere."""
        split, c = (self.heads, -1), self.local(x, real, segments)
        q = of_kept(self.q_proj, c, kept).unflatten(-1, split)
        k, v = self.k_proj(c).unflatten(-1, split), self.v_proj(c).unflatten(-1, split)
        logits = self.decay_out(self.decay_in(c))
        log_decay = F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) / self.normalizer
        if real is not None:
            log_decay = log_decay.masked_fill(~real[..., None], 0)
        forth, back = (some.unflatten(-1, split) for some in log_decay.chunk(2, -1))
        # Both directions as one batch.
        q, k, v = (torch.cat([some, some.flip(1)]) for some in (q, k, v))
        ids = None if segments is None else torch.cat([segments, segments.flip(1)])
        o, _ = gated_linear_recurrence(q, k, v, torch.cat([forth, back.flip(1)]), segments=ids, chunk=self.chunk)
        before, after = o.chunk(2)
        return self.outputs((before + after.flip(1)) / 2, c, kept)

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the directions have read and the local features ``x``, mixed by the gate and projected."""
        gate = torch.sigmoid(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        read, own = self.norm(o.to(x.dtype)), self.local_norm(x.unflatten(-1, (self.heads, -1)))
        out: Tensor = self.o_proj(torch.lerp(own, read, gate.to(own.dtype)).flatten(-2))
        return out
