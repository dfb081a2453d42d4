"""Token dispatch: sort the used slots of a routing by expert, run each expert once on its own tokens, weigh and add
back.

No token is dropped, an empty slot (weight exactly 0) costs nothing, an expert without tokens is not run. The sort is
stable and the sum over a token's slots has a fixed order, so two equal calls agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from gatework.core.routing import Routing


@dataclass
class Dispatch:
    """The used slots of a routing, sorted by expert: R rows.

    Attributes:
        tokens: (R,) the token of each row.
        rows: (N, k) where each slot's row is; R for an empty slot.
        counts: rows of each expert; their sum is R.
        weights: (N, k) the routing's weights.
        full: no slot is empty.

    Rows that fill an expert's up to a multiple hold some used token; no slot names them, so they get no gradient and give none.
    """

    tokens: Int[Tensor, "R"]
    rows: Int[Tensor, "N k"]
    counts: list[int]
    weights: Float[Tensor, "N k"]
    full: bool

    @property
    def n_rows(self) -> int:
        """R, the number of used slots (and of rows that fill up)."""
        return sum(self.counts)

    def gather(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "R D"]:
        """The tokens' vectors in the order of the rows."""
        rows: Tensor = _Gather.apply(x, self.tokens, self.rows, self.full)
        return rows

    def combine(self, y: Float[Tensor, "R D"]) -> Float[Tensor, "N D"]:
        """Each token's weighted sum over its slots, slot 0 first."""
        out: Tensor = _Combine.apply(y, self.weights.to(y.dtype), self.tokens, self.rows, self.full)
        return out


def dispatch(routing: Routing, align: int = 1) -> Dispatch:
    """Sort the used slots of ``routing`` by expert (stable). Waits for the device once, for the counts.

    ``align`` fills the rows of each expert that has any up to a multiple.
    """
    n_experts, k = routing.n_experts, routing.experts.shape[1]
    used = routing.weights.detach() != 0
    keys = torch.where(used, routing.experts, n_experts).flatten()
    counts = torch.bincount(keys, minlength=n_experts + 1).tolist()[:n_experts]
    order = keys.argsort(stable=True)
    n_used = sum(counts)
    full = n_used == len(order)
    rows = torch.empty_like(order)
    if align == 1:
        rows[order] = torch.arange(len(order), device=order.device)
        if not full:
            rows.clamp_(max=n_used)
        return Dispatch(order[:n_used].div(k, rounding_mode="floor"), rows.view(-1, k), counts, routing.weights, full)
    filled = [-(-count // align) * align for count in counts]
    shift = [0, *accumulate(more - count for more, count in zip(filled, counts, strict=True))]
    place = torch.arange(len(order), device=order.device)
    place[:n_used] += torch.tensor(shift[:-1], device=order.device).repeat_interleave(
        torch.tensor(counts, device=order.device), output_size=n_used
    )
    place[n_used:] = sum(filled)
    rows[order] = place
    # What fills up is a used token: padding may hold anything, NaN too, which even a gradient of 0 would not stop.
    used_tokens = order[:n_used].div(k, rounding_mode="floor")
    tokens = used_tokens[:1].repeat(sum(filled)).index_copy_(0, place[:n_used], used_tokens)
    return Dispatch(tokens, rows.view(-1, k), filled, routing.weights, full)


def run_experts(
    x: Float[Tensor, "N D"], routing: Routing, experts: Sequence[Callable[[Tensor], Tensor]], align: int = 1
) -> Float[Tensor, "N D2"]:
    """Run experts of any kind: ``y_n = sum_j weights[n, j] experts[experts[n, j]](x_n)``.

    Each expert works on one contiguous block of a size that caches hold, which beats one pass over all rows of all
    experts.

    Args:
        x: tokens.
        routing: who is chosen, over ``len(experts)`` experts.
        experts: each maps (M, D) to (M, D2) and is called once, with its own tokens, unless it has none.
        align: fill the rows of each expert up to a multiple of this with copies of a used token, whose outputs are
            thrown away (for experts that treat each row alone, where their kernels gain from it).

    Raises:
        ValueError: if the number of experts is not the routing's.
    """
    if len(experts) != routing.n_experts:
        raise ValueError(f"the routing chooses among {routing.n_experts} experts, {len(experts)} were given")
    if x.shape[0] == 1 and not torch.is_grad_enabled():
        return _run_one_token(x, routing, experts)
    plan = dispatch(routing, align)
    segments = plan.gather(x).split(plan.counts)
    outputs = [experts[e](rows) for e, (rows, count) in enumerate(zip(segments, plan.counts, strict=True)) if count]
    if not outputs:
        return x.new_zeros(x.shape) + 0 * x
    return plan.combine(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


def _run_one_token(x: Tensor, routing: Routing, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """The same for a single token without a graph, as in decoding: nothing to sort."""
    chosen = routing.experts[0].tolist()
    used = [slot for slot, weight in enumerate(routing.weights[0].tolist()) if weight != 0]
    if not used:
        return torch.zeros_like(x)
    outputs = torch.cat([experts[chosen[slot]](x) for slot in used])
    weights = routing.weights if len(used) == len(chosen) else routing.weights[:, used]
    return weights.to(outputs.dtype) @ outputs


def _sum_slots(y: Tensor, rows: Tensor, full: bool, weights: Tensor | None = None) -> Tensor:
    """``sum_j weights[n, j] y[rows[n, j]]``, slot by slot; a row index of len(y) is an empty slot, of which there are
    none where ``full``."""
    out = None
    for slot in range(rows.shape[1]):
        index = rows[:, slot]
        if full:
            picked = y.index_select(0, index)
        elif y.shape[0]:
            picked = y.index_select(0, index.clamp(max=y.shape[0] - 1)).mul_((index < y.shape[0])[:, None])
        else:
            picked = y.new_zeros(rows.shape[0], y.shape[1])
        if weights is not None:
            picked.mul_(weights[:, slot, None])
        out = picked if out is None else out.add_(picked)
    return y.new_zeros(rows.shape[0], y.shape[1]) if out is None else out


class _Gather(torch.autograd.Function):
    """Rows of x; the backward sums each token's slots instead of an atomic scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, rows: Tensor, full: bool) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.full = full
        return x.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None, None, None]:
        (rows,) = ctx.saved_tensors
        return _sum_slots(d_rows, rows, ctx.full), None, None, None


class _Combine(torch.autograd.Function):
    """The weighted sum over slots; keeps the experts' outputs for the weights' gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, tokens: Tensor, rows: Tensor, full: bool) -> Tensor:
        ctx.save_for_backward(y, weights, tokens, rows)
        return _sum_slots(y, rows, full, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        y, weights, tokens, rows = ctx.saved_tensors
        d_y = d_weights = None
        picked = d_out.index_select(0, tokens)  # (R, D)
        if ctx.needs_input_grad[1]:
            per_row = torch.linalg.vecdot(picked, y) if y.shape[0] else y.new_zeros(0)
            per_row = torch.cat([per_row, per_row.new_zeros(1)])  # An empty slot's weight gets no gradient.
            d_weights = per_row[rows]
        if ctx.needs_input_grad[0]:
            row_weights = weights.new_zeros(y.shape[0] + 1).index_copy(0, rows.flatten(), weights.flatten())[:-1]
            d_y = picked.mul_(row_weights[:, None])
        return d_y, d_weights, None, None, None


def unstack(weight: Float[Tensor, "E *shape"]) -> Sequence[Tensor] | Tensor:
    """The experts' slices of a stacked weight, by index; their gradients are gathered into one tensor, in which unused
    experts are zero.

    Indexing the stack inside a loop would make each expert's gradient a full-size tensor of zeros; ``unbind`` makes
    zeros for every unused expert first.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return weight
    slices: tuple[Tensor, ...] = _Unstack.apply(weight)
    return slices


class _Unstack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.like = weight.shape, weight.dtype, weight.device
        return weight.unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_slices: Tensor | None) -> Tensor:
        shape, dtype, device = ctx.like
        d_weight = torch.empty(shape, dtype=dtype, device=device)
        for place, d_slice in zip(d_weight.unbind(0), d_slices, strict=True):
            if d_slice is None:
                place.zero_()
            else:
                place.copy_(d_slice)
        return d_weight
