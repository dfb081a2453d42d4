"""``GPSA``: gated positional self-attention, which can start as a convolution and choose to look elsewhere.

d'Ascoli et al., ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases, 2021, arXiv 2103.10697, section 3.
With q, k, v of width K = d_model / heads and r_ts what there is to say of the place of s as seen from t, head h reads

    P_ts = softmax_s(q_t . k_s / sqrt(K))          what the token holds
    R_ts = softmax_s(w_h . r_ts)                   where it stands, whatever it holds
    o_t  = (1 - g_h) P_t V + g_h R_t V             g_h = sigmoid(lambda_h)
    y    = concat_h(o) W_o + b_o

On a grid r = (dx, dy, dx^2 + dy^2), columns and rows from t to s. R is then the product of a softmax over the rows and one over
the columns, so that R V costs T (rows + columns) products instead of T^2 and no T x T matrix is formed for it. On a line
r = (d, d^2), and a causal layer has the causal mask in both softmaxes; this is our addition, as is decoding.

At the start R is local: w_h = strength (2 c_x, 2 c_y, -1) makes R_ts = softmax(-strength |(dx, dy) - c_h|^2), centred where the
head's place in a sqrt(heads) x sqrt(heads) stencil is, W_v is the identity and g about 0.73: each head is a blurred shift, and the
layer a blurred convolution. For heads = 9, lambda and the strength to infinity it is a 3 x 3 convolution.

Differences. The official code divides the rows by their sums, which are 1, and has a bias in front of the positional softmax,
where it changes nothing: both are left out. It recomputes its distances only when the number of tokens changes and takes the
grid for square; here the grid is said. Heads that fill no square stencil start at random there and are refused here. The class
token, which ConViT adds behind its last positional layer, is the model's business. Dropout is left out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, State, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.mixers.attention import Attention, Limits


@register("gpsa", paper="gpsa")
class GPSA(Attention):
    """Gated positional self-attention: starts as a soft convolution.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``. Per head a gate weighs attention by content against attention by relative
    position alone.

    Args:
        d_model: width of the stream.
        heads: heads H, each ``d_model / heads`` wide; on a grid a square such as 4 or 9.
        causal: each token sees itself and those before it; False sees both sides. A grid has no order: it needs False.
        grid: (rows, columns) of the tokens, row by row; None is a line of any length.
        strength: of the locality at the start; the heads' positional attention falls to 1 / e within ``strength**-0.5`` tokens of
            its centre.

    On a line the heads' centres are the token itself and the H - 1 before it (causal), or H neighbouring places about it, which for
    an even H lie between the tokens. A token's position on a line counts the real tokens before it, so padding takes none; on a
    grid it is its place.

    Initialisation: W_q, W_k and W_o normal with standard deviation 0.02, b_o 0, W_v the identity, lambda 1, positional weights
    local as said in the module's text.

    Decoding (a causal line) keeps the keys and values of all tokens, as attention does; of R only the new rows are computed.
    ``keep`` computes keys and values for all tokens, and queries, both softmaxes and the output projection for the kept ones.

    Metrics: ``gate``, g by head (H); the paper sees it fall in late layers.

    Source: arXiv 2103.10697.

    Raises:
        ValueError: sizes that do not fit, a causal grid, heads on a grid that are no square, a strength that is not positive.
        PartError: on a grid, another number of tokens, or ``segments``.
    """

    def __init__(
        self, d_model: int, heads: int = 4, causal: bool = True, grid: tuple[int, int] | None = None, strength: float = 1.0
    ) -> None:
        super().__init__(d_model, heads, rope=False, causal=causal)
        if strength <= 0:
            raise ValueError(f"strength must be positive, got {strength}")
        side = math.isqrt(heads)
        if grid is not None:
            if causal:
                raise ValueError("a grid has no order: give causal=False")
            if len(grid) != 2 or min(grid) < 1:
                raise ValueError(f"grid is (rows, columns), both at least 1, not {tuple(grid)}")
            if side * side != heads:
                raise ValueError(f"heads on a grid make a square stencil: a square such as 4 or 9, not {heads}")
            self.capabilities = self.capabilities | {
                "any_length": No("it was built for a grid"), "packs": No("a grid holds one picture"),
            }
        self.grid, self.strength = None if grid is None else (grid[0], grid[1]), strength
        self.o_proj = nn.Linear(d_model, d_model)
        nn.init.normal_(self.o_proj.weight, std=0.02)
        nn.init.zeros_(self.o_proj.bias)
        nn.init.eye_(self.v_proj.weight)
        self.gate_logit = nn.Parameter(torch.ones(heads))
        head = torch.arange(heads, dtype=torch.get_default_dtype())
        if grid is not None:
            middle = (side - 1) / 2
            centres = [(head // side) - middle, (head % side) - middle]
        else:
            centres = [-head if causal else head - (heads - 1) / 2]
        #: By head the weights of (dx, dy) or d, and of the squared distance.
        self.position = nn.Parameter(strength * torch.stack([*(2 * centre for centre in centres), -torch.ones(heads)], 1))

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, heads={self.heads}, causal={self.causal}, grid={self.grid}, strength={self.strength}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        if self.grid is not None:
            rows, columns = self.grid
            if x.dim() == 3 and x.shape[1] != rows * columns:
                raise PartError(f"gpsa was built for a grid of {rows} x {columns} = {rows * columns} tokens, not {x.shape[1]}")
        y = super().forward(x, state, mask, segments, keep)
        if not in_backward():
            self.metrics = {"gate": self.gate_logit.detach().sigmoid()}
        return y

    def gates(self) -> Float[Tensor, "H"]:
        """g by head: the share of the attention by position."""
        return self.gate_logit.sigmoid()

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, limits: Limits | None) -> Tensor:
        content = super()._attend(queries, keys, values, limits)
        position = self._positional(queries.shape[2], None, values.to(content.dtype), limits)
        return self._gated(content, position, self.gates()[:, None, None])

    def _attend_kept(
        self, queries_N: Tensor, rows: Tensor, keep: Tensor, keys: Tensor, values: Tensor, limits: Limits | None
    ) -> Tensor:
        content_N = super()._attend_kept(queries_N, rows, keep, keys, values, limits)
        if not len(rows):
            return content_N
        # Each row's kept tokens side by side, the rest of a shorter row in vain.
        places = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(keep.sum(1).max())]
        position = self._positional(keep.shape[1], places, values.to(content_N.dtype), limits)
        return self._gated(content_N, position.transpose(1, 2)[keep.gather(1, places)], self.gates()[:, None])

    def _gated(self, content: Tensor, position: Tensor, gate: Tensor) -> Tensor:
        return torch.lerp(content, position.to(content.dtype), gate.to(content.dtype))

    def _positional(self, new: int, places: Tensor | None, values: Tensor, limits: Limits | None) -> Tensor:
        """R V for the last ``new`` of the S entries, or for those at the places (B, M) among them."""
        entries, device = values.shape[2], values.device
        if limits is None and places is None and new == entries:
            if self.grid is None:
                return torch.einsum("hts,bhsk->bhtk", self._line(0, new, device).to(values.dtype), values)
            columns, rows = (self._line(axis, self.grid[1 - axis], device).to(values.dtype) for axis in (0, 1))
            by_row = torch.einsum("hcd,bhrdk->bhrck", columns, values.unflatten(2, self.grid))
            return torch.einsum("hrs,bhsck->bhrck", rows, by_row).flatten(2, 3)
        place = torch.arange(new, device=device)[None] if places is None else places
        query, entry, allowed = place + (entries - new), torch.arange(entries, device=device)[None], None
        if limits is not None:
            allowed = limits.allowed(self.causal, None, places)
            if self.grid is None:
                entry = limits.entry
                query = limits.query if places is None else limits.query.expand(len(places), -1).gather(1, places)
        elif self.causal:
            allowed = entry[:, None, :] <= query[:, :, None]
        scores = self._scores(query, entry)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        weights = scores.softmax(-1).to(values.dtype)
        return torch.einsum("hts,bhsk->bhtk", weights[0], values) if len(weights) == 1 else weights @ values

    def _weights(self) -> Tensor:
        return self.position.to(torch.promote_types(self.position.dtype, torch.float32))

    def _line(self, axis: int, length: int, device: torch.device) -> Float[Tensor, "H T T"]:
        """R along one axis."""
        weights, index = self._weights(), torch.arange(length, device=device)
        distance = (index[None] - index[:, None]).to(weights.dtype)
        scores = weights[:, axis, None, None] * distance + weights[:, -1, None, None] * distance.square()
        if self.causal:
            scores = scores.masked_fill(distance > 0, -torch.inf)
        return scores.softmax(-1)

    def _scores(self, query: Int[Tensor, "#B M"], entry: Int[Tensor, "#B S"]) -> Float[Tensor, "#B H M S"]:
        """w . r of every query and entry, by their places."""
        weights = self._weights()

        def offset(t: Tensor, s: Tensor) -> Tensor:
            return (s[:, None, :] - t[:, :, None]).to(weights.dtype)[:, None]

        if self.grid is None:
            axes = [offset(query, entry)]
        else:
            columns = self.grid[1]
            axes = [offset(query % columns, entry % columns), offset(query // columns, entry // columns)]
        parts = [*axes, torch.stack([axis.square() for axis in axes]).sum(0)]
        return torch.stack([weights[:, i, None, None] * part for i, part in enumerate(parts)]).sum(0)
