"""``PFN``: a prior-data fitted network, which reads a data set and says the density of y at new x.

Müller et al., Transformers Can Do Bayesian Inference, 2021 (ICLR 2022), arXiv 2112.10510, section 3; the official code was read.
Trained on data sets drawn from a prior, to predict the points that it is not given from those that it is, it approximates the
posterior predictive distribution: the expected loss is the posterior's entropy plus the mean Kullback-Leibler divergence to it.

A context point enters as W_x x + W_y y + b, a query as W_x x + b. There are no positions; context points attend to all context
points, a query to all context points and to itself. So a prediction depends neither on the context's order nor on other queries.
The head is a GELU MLP to one logit per bar (:class:`gatework.learners.BarDistribution`).

Differences: the blocks are this library's, pre-norm with RMS norms, where the code's are PyTorch's post-norm ones; x and y are not
projected with two biases, which is the same. Queries run behind the context instead of beside it under a mask, which computes the
same: per query M + 1 scores for a context of M, instead of as many as there are points.

With a causal ``mixer`` in place of that attention the context is read in its order, into the mixer's decoding state, and each query
continues from a copy of it. Queries stay independent, but the order of the context matters: train on random orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import DepthPolicy, No, SequenceMixer, State
from gatework.core.errors import PartError
from gatework.feedforward.mlp import MLP
from gatework.models.trunk import trunk


class PFN(nn.Module):
    """Logits of bars at query points, given a context of points with their y.

    ``forward(x (B, n, inputs + 2)) -> (B, queries, bars)``: a point is its x, its y (ignored for a query) and a last channel
    that is 1 for the context and 0 for the queries. The context comes first and is as long in every row. :meth:`predict` takes
    the three apart.

    Args:
        inputs: width of x.
        bars: bars of the distribution.
        d_model, layers, heads, d_ff: sizes; the head's hidden width is ``d_ff``, or ``2 d_model`` where that is None.
        mixer: None for the paper's attention, or causal mixers that decode, as a pattern that repeats along the layers.
        feedforward, depth: as in :class:`gatework.models.Decoder`.

    Initialisation: the paper's attention and an ``mlp`` start with a last matrix of 0, so that every block starts as the identity;
        all else is PyTorch's, or the part's own.

    Raises:
        PartError: unknown parts, sizes that do not fit, a mixer that is not causal or does not decode.

    Example:
        >>> x = torch.rand(2, 9, 3)
        >>> x[..., 2] = torch.arange(9) < 6
        >>> PFN(inputs=1, bars=20, d_model=32, layers=1)(x).shape
        torch.Size([2, 3, 20])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("inputs", "bars")

    def __init__(
        self,
        inputs: int,
        bars: int,
        d_model: int = 64,
        layers: int = 3,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: Any = None,
        feedforward: Any = "mlp",
        depth: Any = "stack",
    ) -> None:
        super().__init__()
        if min(inputs, bars) < 1:
            raise PartError(f"inputs and bars must be at least 1, got {inputs} and {bars}")
        self.inputs, self.ordered = inputs, mixer is not None
        self.encode_x, self.encode_y = nn.Linear(inputs, d_model), nn.Linear(1, d_model, bias=False)
        self.depth: DepthPolicy = trunk(
            mixer or ContextAttention, feedforward, depth, d_model=d_model, layers=layers, heads=heads, d_ff=d_ff,
            purpose="a network that reads its context into a state", needs=("causal", "decodes") if self.ordered else (),
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        hidden = 2 * d_model if d_ff is None else d_ff
        self.head = nn.Sequential(nn.Linear(d_model, hidden), nn.GELU(), nn.Linear(hidden, bars))
        for module in self.depth.modules():
            if isinstance(module, MLP):
                nn.init.zeros_(module.down.weight)

    def forward(self, x: Float[Tensor, "B n C"]) -> Float[Tensor, "B q bars"]:
        """Logits at the queries, which are the last points of every row."""
        if x.dim() != 3 or x.shape[-1] != self.inputs + 2:
            wanted = f"(batch, points, {self.inputs + 2})"
            raise PartError(f"x has the shape {wanted}: each point's x, y and whether it is context, not {tuple(x.shape)}")
        given = x[..., -1] != 0
        context = int(given[0].sum()) if len(x) else 0
        if not torch.equal(given, (torch.arange(x.shape[1], device=x.device) < context).expand_as(given)):
            raise PartError("the context comes first in every row and is as long in all of them")
        points = x[..., : self.inputs]
        return self.predict(points[:, :context], x[:, :context, self.inputs], points[:, context:])

    def predict(
        self, x: Float[Tensor, "B m I"], y: Float[Tensor, "B m"], queries: Float[Tensor, "B q I"]
    ) -> Float[Tensor, "B q bars"]:
        """Logits at ``queries``, given a context of points ``x`` with their ``y``."""
        known, asked = self.encode_x(x) + self.encode_y(y[..., None]), self.encode_x(queries)
        batch, count, width = asked.shape
        state = self.depth.init_state(batch, dtype=known.dtype)
        if x.shape[1] or not self.ordered:  # An empty set is read too: without, the queries would be taken for it.
            self.depth(known, state=state)
        if self.ordered:
            state.reorder(torch.arange(batch, device=x.device).repeat_interleave(count))
            asked = asked.reshape(batch * count, 1, width)
        logits: Tensor = self.head(self.norm(self.depth(asked, state=state)))
        return logits.reshape(batch, count, -1)


@dataclass
class Context(State):
    """Keys and values of the context, (B, H, M, K) both; None before it was read."""

    keys: Float[Tensor, "B H M K"] | None = None
    values: Float[Tensor, "B H M K"] | None = None


class ContextAttention(SequenceMixer):
    """Attention of a set: the first call with a state reads the context, later calls are queries.

    Without a state, and in the first call, every token sees every token. A query sees the context and itself, so that it leaves
    nothing behind in the state.

    Args:
        d_model: width of the stream.
        heads: H, each ``d_model / heads`` wide.

    Initialisation: PyTorch's for q, k and v, the output projection 0; biases everywhere, as in the paper's code.

    Raises:
        ValueError: widths that do not divide.
    """

    capabilities = SequenceMixer.capabilities | {
        name: No("it sees its context as a set, and queries see no other query") for name in ("causal", "decodes", "packs", "keeps")
    }

    def __init__(self, d_model: int, heads: int = 4) -> None:
        super().__init__()
        if heads < 1 or d_model % heads:
            raise ValueError(f"d_model {d_model} is not divisible by heads {heads}")
        self.heads = heads
        self.qkv, self.o_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.zeros_(self.o_proj.bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the context, or let queries read it; there is no padding, and what is not kept is 0."""
        if mask is not None or segments is not None:
            raise PartError("sets come without padding and one to a row")
        queries, keys, values = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if isinstance(state, Context) and state.keys is not None and state.values is not None:
            read = _own_and(queries, keys, values, state.keys.to(keys.dtype), state.values.to(values.dtype))
        else:
            read = F.scaled_dot_product_attention(queries, keys, values)
            if isinstance(state, Context):
                state.keys, state.values = keys, values
        y: Tensor = self.o_proj(read.transpose(1, 2).flatten(2))
        return y if keep is None else y * keep[..., None]

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Context:
        """A state that has not seen its context."""
        return Context()

    def state_bytes(self, length: int) -> int:
        """Bytes of the keys and values of a context of ``length`` points."""
        return 2 * self.o_proj.in_features * length * self.o_proj.weight.element_size()


def _own_and(
    queries: Float[Tensor, "B H q K"], keys: Float[Tensor, "B H q K"], values: Float[Tensor, "B H q K"],
    seen_keys: Float[Tensor, "B H M K"], seen_values: Float[Tensor, "B H M K"],
) -> Float[Tensor, "B H q K"]:
    """Attention of every query to M entries and to its own."""
    scale = queries.shape[-1] ** -0.5
    scores = torch.cat([queries @ seen_keys.mT, (queries * keys).sum(-1, keepdim=True)], -1) * scale
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1).to(values.dtype)
    return weights[..., :-1] @ seen_values + weights[..., -1:] * values
