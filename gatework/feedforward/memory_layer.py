"""``MemoryLayer``: a feed-forward whose hidden layer is a softmax over the few best of very many slots.

Wang and Sun, Is the Reversal Curse a Binding Problem? Uncovering Limitations of Transformers from a Basic Generalization
Failure, 2025, arXiv 2504.01928, in the released code's form. With keys K and values V, one row of D numbers per slot, m slots:

    s = K x / sqrt(D)    S = the k slots with the largest s    w = softmax(s over S)    y = sum over i in S of w_i V_i

An input writes to the k value rows that it reads and to no others, which keeps apart what is stored under different keys:
a step on one input moves the output of another only as far as their weights w overlap.

The scores of all slots are one product, N D m multiply-adds. The rest is done for k slots: reading k value rows and, backward,
k keys and k values, where a softmax over all slots has five more products of that size. (The released code computes the
scores' gradient and the output densely.)

Differences: inputs, keys and values start otherwise, see there; the released model sets its keys to the entities' embeddings and
holds them fixed, which :class:`gatework.models.EntityModel` does too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatework.core.contracts import FeedForward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.feedforward.base import hidden_width


@register("memory_layer", paper="concept_jepa")
class MemoryLayer(FeedForward):
    """A softmax over the k best of many memory slots, which reads k values.

    ``y = sum_i w_i values_i`` with ``w`` the softmax of ``keys x / sqrt(d_model)`` over its k largest entries. With
    ``k = d_ff`` it is an MLP with a softmax for its activation.

    Args:
        d_model: width D of the input and the output.
        d_ff: number of slots m; None is ``16 * d_model``.
        k: slots that an input reads. With 1 every weight is 1 and the keys get no gradient: they are then to be set, not learnt.

    Weights: ``keys`` and ``values``, both (m, D).

    Initialisation: keys standard normal (scores of inputs with a root mean square of 1 then have variance 1), values normal with
        standard deviation 0.02.

    Raises:
        ValueError: widths below 1, ``k`` out of 1 .. ``d_ff``.
    """

    def __init__(self, d_model: int, d_ff: int | None = None, k: int = 32) -> None:
        super().__init__()
        d_ff = hidden_width(d_model, d_ff, factor=16, multiple=1)
        if not 1 <= k <= d_ff:
            raise ValueError(f"k must be between 1 and the {d_ff} slots, got {k}")
        self.k = k
        self.keys = nn.Parameter(torch.randn(d_ff, d_model))
        self.values = nn.Parameter(0.02 * torch.randn(d_ff, d_model))

    def extra_repr(self) -> str:
        """The settings."""
        slots, d_model = self.keys.shape
        return f"d_model={d_model}, slots={slots}, k={self.k}"

    def active_parameters(self) -> int:
        """Parameters that one token uses: all keys and k values."""
        return self.keys.numel() + self.k * self.keys.shape[1]

    def read(self, x: Float[Tensor, "N D"]) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
        """The k slots of each input, best first, and their weights, which sum to 1."""
        if x.dim() != 2 or x.shape[1] != self.keys.shape[1]:
            raise PartError(f"MemoryLayer reads inputs of shape (tokens, {self.keys.shape[1]}), not {tuple(x.shape)}")
        scores, slots = _Best.apply(x, self.keys.to(x.dtype), self.k)
        return scores.to(torch.promote_types(x.dtype, torch.float32)).softmax(-1).to(x.dtype), slots

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Transform every token; ``mask`` changes nothing, tokens do not meet here."""
        if x.shape[-1:] != self.keys.shape[1:]:
            raise PartError(f"MemoryLayer was built for width {self.keys.shape[1]}, not for inputs of shape {tuple(x.shape)}")
        weights, slots = self.read(x.reshape(-1, x.shape[-1]))
        y = F.embedding_bag(slots, self.values.to(weights.dtype), mode="sum", per_sample_weights=weights)
        return y.view_as(x)


class _Best(torch.autograd.Function):
    """The k largest of ``keys x / sqrt(D)`` and their places; backward works on these k alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, slots = (x * x.shape[1] ** -0.5 @ keys.t()).topk(k)
        ctx.save_for_backward(x, keys, slots)
        ctx.mark_non_differentiable(slots)
        return scores, slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor, d_slots: Tensor | None) -> tuple[Tensor | None, ...]:
        x, keys, slots = ctx.saved_tensors
        d_scores = d_scores.to(x.dtype) * x.shape[1] ** -0.5  # Autocast gives scores of lower precision.
        d_x = d_keys = None
        if ctx.needs_input_grad[0]:
            d_x = F.embedding_bag(slots, keys, mode="sum", per_sample_weights=d_scores)
        if ctx.needs_input_grad[1]:
            rows = d_scores[..., None] * x[:, None]
            d_keys = torch.zeros_like(keys).index_add_(0, slots.flatten(), rows.flatten(0, 1))
        return d_x, d_keys, None
