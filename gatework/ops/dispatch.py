"""Token dispatch: sort the used slots of a routing by expert, run each expert once on its own tokens, weigh and add
back.

No token is dropped, an empty slot (weight exactly 0) costs nothing. The sort is stable and the sum over a token's slots has a
fixed order, so two equal calls agree bit for bit. :func:`run_experts` has four engines, which give the same numbers up to
rounding:

- ``loop``: expert by expert over all tokens; the reference, as simple as can be.
- ``segments``: rows sorted by expert, each expert called with its own; experts without rows are not run. Runs any experts.
- ``grouped``: the same rows in one ``grouped_mm`` per stacked weight; where torch has none for the device, dtype or widths,
  ``segments``.
- ``bmm``: a buffer (E, C, D) with room for the busiest expert's C rows, and one batched product per stacked weight. Computes E C
  rows for the R that are used, and reads all weights: for a few tokens of which most experts get some.

``auto`` chooses by shape (:func:`choose_engine`) and logs the reason once to the logger ``gatework``, at the level DEBUG.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from gatework.core.routing import Routing
from gatework.ops.linear import ROWS, GradientPlaces, linear

#: What runs the experts; ``auto`` chooses among the others.
Engine = Literal["auto", "loop", "segments", "grouped", "bmm"]
ENGINES: tuple[Engine, ...] = ("auto", "loop", "segments", "grouped", "bmm")
#: ``product(rows, weights)``: rows times the transposed (O, I) matrix of their expert, of the stacked weights (E, O, I).
Product = Callable[[Tensor, Tensor], Tensor]
#: Experts over stacked weights: ``stacked(rows, product)`` maps rows (..., D) to (..., D2).
Stacked = Callable[[Tensor, Product], Tensor]

logger = logging.getLogger("gatework")


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


def dispatch(routing: Routing, align: int = 1, buffer: bool = False) -> Dispatch:
    """Sort the used slots of ``routing`` by expert (stable). Waits for the device once, for the counts.

    ``align`` fills the rows of each expert that has any up to a multiple; ``buffer`` fills those of all experts up to the busiest
    one's.
    """
    return _sort(routing, _Keys(routing), align, buffer)


class _Keys:
    """The slots' experts (E for an empty slot), flat, and how often each expert comes."""

    def __init__(self, routing: Routing) -> None:
        n_experts = routing.n_experts
        self.keys = torch.where(routing.weights.detach() != 0, routing.experts, n_experts).flatten()
        self.listed = self.keys.tolist() if self.keys.numel() <= _FEW_SLOTS else None
        if self.listed is None:
            self.counts: list[int] = torch.bincount(self.keys, minlength=n_experts + 1).tolist()[:n_experts]
        else:
            self.counts = [0] * n_experts
            for key in self.listed:
                if key < n_experts:
                    self.counts[key] += 1


#: Up to so many slots a loop in Python sorts faster than a dozen operations on tensors.
_FEW_SLOTS = 128


def _sort(routing: Routing, slots: _Keys, align: int, buffer: bool) -> Dispatch:
    counts, k = slots.counts, routing.experts.shape[1]
    if buffer:
        filled = [max(counts)] * len(counts)
    else:
        filled = [-(-count // align) * align for count in counts]
    n_used = sum(counts)
    full = n_used == slots.keys.numel()
    if slots.listed is not None:
        return _sort_few(routing, slots.listed, filled, full)
    order = slots.keys.argsort(stable=True)
    rows = torch.empty_like(order)
    if filled == counts:
        rows[order] = torch.arange(len(order), device=order.device)
        if not full:
            rows.clamp_(max=n_used)
        return Dispatch(order[:n_used].div(k, rounding_mode="floor"), rows.view(-1, k), counts, routing.weights, full)
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


def _sort_few(routing: Routing, keys: list[int], filled: list[int], full: bool) -> Dispatch:
    k, n_rows, device = routing.experts.shape[1], sum(filled), routing.experts.device
    following = [0, *accumulate(filled)]  # The next row of each expert.
    some_used_token = next((slot // k for slot, key in enumerate(keys) if key < len(filled)), 0)
    tokens, rows = [some_used_token] * n_rows, [n_rows] * len(keys)
    for slot, key in enumerate(keys):
        if key < len(filled):
            row = following[key]
            following[key] += 1
            tokens[row], rows[slot] = slot // k, row
    token_ids = torch.tensor(tokens, dtype=torch.long, device=device)
    row_ids = torch.tensor(rows, dtype=torch.long, device=device).view(-1, k)
    return Dispatch(token_ids, row_ids, filled, routing.weights, full)


def run_experts(
    x: Float[Tensor, "N D"],
    routing: Routing,
    experts: Sequence[Callable[[Tensor], Tensor]],
    align: int = 1,
    engine: Engine = "auto",
    stacked: Stacked | None = None,
    width: int | None = None,
) -> Float[Tensor, "N D2"]:
    """Run experts of any kind: ``y_n = sum_j weights[n, j] experts[experts[n, j]](x_n)``.

    Args:
        x: tokens.
        routing: who is chosen, over ``len(experts)`` experts.
        experts: each maps (M, D) to (M, D2) and is called once, with its own tokens, unless it has none.
        align: ``segments`` fills the rows of each expert up to a multiple of this with copies of a used token, whose outputs
            are thrown away (for experts that treat each row alone, where their kernels gain from it).
        engine: see the module; ``grouped`` and ``bmm`` need ``stacked``.
        stacked: the same experts over stacked weights, where they have such.
        width: D2, for the zeros of a routing without used slots, which asks no expert; None is D.

    Raises:
        ValueError: if the number of experts or of tokens is not the routing's, and for an engine that needs stacked weights
            where there are none.
    """
    if len(routing.experts) != len(x):
        raise ValueError(f"the routing is for {len(routing.experts)} tokens, {len(x)} were given")
    if len(experts) != routing.n_experts:
        raise ValueError(f"the routing chooses among {routing.n_experts} experts, {len(experts)} were given")
    if stacked is None and engine in ("grouped", "bmm"):
        raise ValueError(f"the engine {engine!r} needs experts of stacked weights; modules run by 'loop' or 'segments'")
    width = x.shape[1] if width is None else width
    if engine == "loop":
        return _run_loop(x, routing, experts, width)
    if engine == "auto" and x.shape[0] == 1 and not torch.is_grad_enabled():
        return _run_one_token(x, routing, experts, width)
    if stacked is not None and _few_of_many(x, routing, engine):
        _log_once("grouped", "fewer used slots than experts: sorted without counting them here")
        return _run_few(x, routing, stacked)
    slots = _Keys(routing)
    if stacked is None:
        engine = "segments"
    elif engine in ("auto", "grouped"):
        engine, reason = choose_engine(engine, x, slots.counts)
        _log_once(engine, reason)
    if not any(slots.counts):
        return _nobody(x, width)
    plan = _sort(routing, slots, align if engine == "segments" else 1, engine == "bmm")
    rows = plan.gather(x)
    if engine == "segments" or stacked is None:
        segments = zip(rows.split(plan.counts), plan.counts, strict=True)
        outputs = [experts[e](segment) for e, (segment, count) in enumerate(segments) if count]
        return plan.combine(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
    if engine == "bmm":
        return plan.combine(stacked(rows.view(len(experts), -1, x.shape[1]), _batched).reshape(plan.n_rows, -1))
    return plan.combine(stacked(rows, functools.partial(_grouped, counts=plan.counts)))


def choose_engine(wish: Engine, x: Float[Tensor, "N D"], counts: Sequence[int]) -> tuple[Engine, str]:
    """The engine for experts of stacked weights, and why.

    Args:
        wish: ``auto`` or ``grouped``.
        x: the tokens.
        counts: rows of each expert.
    """
    where = f"{str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    grouped = grouped_works(x.device, x.dtype, x.shape[-1])
    if wish == "grouped":
        return ("grouped", "asked for") if grouped else ("segments", f"torch has no grouped product for {where} and these widths")
    if x.device.type != "cpu":
        return ("grouped", f"one product for all experts, {where}") if grouped else ("segments", f"no grouped product, {where}")
    most = max(counts)
    if most <= ROWS and not torch.is_grad_enabled() and x.dtype in (torch.float32, torch.bfloat16):
        if most <= MOST_BATCHED[x.dtype] and len(counts) * most <= MOST_WASTE * sum(counts):
            return "bmm", f"few rows for each expert ({where}), and most experts have some: one batched product"
        if grouped:
            return "grouped", f"few rows ({where}), of some experts or unequally many: products of all, one activation"
    return "segments", f"each expert's rows and weights fit into caches ({where})"


#: ``auto`` takes ``bmm`` on a CPU, without a graph, up to this number of rows of the busiest expert, beyond which one product for
#: each expert is faster than the batched one ...
MOST_BATCHED = {torch.float32: 8, torch.bfloat16: ROWS}
#: ... and up to this number of rows in the buffer for each used one.
MOST_WASTE = 2.5


def grouped_works(device: torch.device, dtype: torch.dtype, *widths: int) -> bool:
    """Whether torch's ``grouped_mm`` runs here; it wants rows of whole multiples of 16 bytes."""
    return all(width * dtype.itemsize % 16 == 0 for width in widths) and _grouped_runs(device.type, dtype)


@functools.cache
def _grouped_runs(device: str, dtype: torch.dtype) -> bool:
    if not hasattr(F, "grouped_mm"):
        return False
    rows, weights = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(2, 16, 16, dtype=dtype, device=device)
    try:
        with _disable_current_modes():  # A counter of FLOPs is not to see the probe.
            F.grouped_mm(rows, weights.transpose(1, 2), offs=torch.tensor([8, 16], dtype=torch.int32, device=device))
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


@functools.cache
def _log_once(engine: str, reason: str) -> None:
    logger.debug("experts run by the engine %r: %s", engine, reason)


def _batched(rows: Tensor, weights: Tensor) -> Tensor:
    if rows.dtype == torch.float32 and rows.shape[1] <= MOST_BATCHED[torch.float32]:
        # BLAS reads a weight on the left twice as fast when it meets few columns.
        return torch.bmm(weights, rows.transpose(1, 2)).transpose(1, 2).contiguous()
    return torch.bmm(rows, weights.transpose(1, 2))


def _grouped(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and not torch.is_grad_enabled():
        # On a CPU torch's product is a loop over the experts as well, without the faster kernels for few rows.
        segments = zip(rows.split(counts), counts, strict=True)
        return torch.cat([linear(segment, weights[e]) for e, (segment, count) in enumerate(segments) if count])
    ends = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows.device)
    return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)


def _nobody(x: Tensor, width: int) -> Tensor:
    """The output where no slot is used: zeros that x has a gradient through, whatever it holds."""
    return x.new_zeros(len(x), width) + x[:0].sum()


def _run_loop(x: Tensor, routing: Routing, experts: Sequence[Callable[[Tensor], Tensor]], width: int) -> Tensor:
    """The reference: every expert looks for its tokens among all, and adds to their outputs."""
    y = None
    for e, expert in enumerate(experts):
        tokens, slots = torch.where((routing.experts == e) & (routing.weights != 0))
        if len(tokens):
            rows = expert(x[tokens])
            rows = rows * routing.weights[tokens, slots, None].to(rows.dtype)
            y = (rows.new_zeros(len(x), rows.shape[1]) if y is None else y).index_add(0, tokens, rows)
    return _nobody(x, width) if y is None else y


def _run_one_token(x: Tensor, routing: Routing, experts: Sequence[Callable[[Tensor], Tensor]], width: int) -> Tensor:
    """The same for a single token without a graph, as in decoding: nothing to sort."""
    chosen = routing.experts[0].tolist()
    used = [slot for slot, weight in enumerate(routing.weights[0].tolist()) if weight != 0]
    if not used:
        return _nobody(x, width)
    outputs = torch.cat([experts[chosen[slot]](x) for slot in used])
    weights = routing.weights if len(used) == len(chosen) else routing.weights[:, used]
    return weights.to(outputs.dtype) @ outputs


def _few_of_many(x: Tensor, routing: Routing, engine: Engine) -> bool:
    """Whether a few tokens in bfloat16 meet many experts, as in decoding, where every step in Python counts."""
    return (
        engine in ("auto", "grouped") and not torch.is_grad_enabled() and x.dtype == torch.bfloat16 and x.device.type == "cpu"
        and 0 < 2 * routing.experts.numel() <= routing.n_experts and grouped_works(x.device, x.dtype, x.shape[-1])
        and bool((routing.weights != 0).all())
    )  # fmt: skip


def _run_few(x: Tensor, routing: Routing, stacked: Stacked) -> Tensor:
    """``grouped`` for a full routing without a graph: the counts never leave the device."""
    chosen, k = routing.experts.flatten(), routing.experts.shape[1]
    order = chosen.argsort(stable=True)
    ends = torch.bincount(chosen, minlength=routing.n_experts).cumsum(0).to(torch.int32)
    y = stacked(
        x.index_select(0, order.div(k, rounding_mode="floor")), lambda rows, w: F.grouped_mm(rows, w.transpose(1, 2), offs=ends)
    )
    y = torch.empty_like(y).index_copy_(0, order, y).view(*routing.experts.shape, -1)
    return torch.bmm(routing.weights.to(y.dtype)[:, None], y)[:, 0]


def _sum_slots(y: Tensor, rows: Tensor, full: bool, weights: Tensor | None = None) -> Tensor:
    """``sum_j weights[n, j] y[rows[n, j]]``, slot by slot; a row index of len(y) is an empty slot, of which there are
    none where ``full``."""
    if full and rows.numel():
        # One pass instead of k; it adds slot 0 first as well.
        return F.embedding_bag(rows, y, mode="sum", per_sample_weights=weights)
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
    places: GradientPlaces = slices[0].grad_fn.places  # type: ignore[union-attr]
    for expert, one in enumerate(slices):
        places.mark(one, expert)
    return slices


class _Unstack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.places = GradientPlaces(weight)
        slices = weight.unbind(0)
        return slices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *d_slices: Tensor | None) -> Tensor:
        return ctx.places.collect(d_slices)
