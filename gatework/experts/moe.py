"""``MoE``: the sparse mixture of feed-forward experts.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, equation 1, with gated linear units as
experts (Shazeer, 2020, arXiv 2002.05202), shared experts (DeepSeekMoE, 2401.06066) and, where asked for, the capacity
of GShard (2006.16668):

    y = sum_{e chosen} G_e(x) E_e(x) + sum_{shared} E_s(x)    E(x) = W_out (act(W_gate x) * W_up x)

Dropless by default: tokens are sorted by expert and each expert runs once on its own contiguous block. Experts may also be
feed-forwards of any kind and size, each a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import Experts, No, Part, capability, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import build, register
from gatework.core.routing import Routing
from gatework.ops.dispatch import ENGINES, Engine, Product, run_experts, unstack
from gatework.ops.linear import alignment, linear
from gatework.ops.precision import without_autocast


@register("moe", paper="sparse_moe")
class MoE(Experts):
    """Mixture of feed-forward experts: dropless, stacked weights, any gate.

    ``forward(x (..., d_model)) -> (..., d_model)``. Tensors that the gate names in ``conditions`` follow as keywords, one row
    per token.

    Args:
        d_model: width of the tokens.
        d_ff: hidden width of one expert; None is 4/3 d_model rounded up to a multiple of 8, so that two experts cost
            what one dense gated unit of the usual 8/3 d_model costs.
        experts: E; or a list of E feed-forwards (part expressions, classes or modules) that add to the stream, as
            ``[glu(d_ff=64), glu(d_ff=32), mlp]``. ``d_model`` and, where it is given, ``d_ff`` are offered to them; the other
            settings of experts (``activation``, ``glu``) are then the shared ones' alone.
        gate: part expression, class or instance of a gate; its ``n_experts`` is E.
        activation: part expression or class of the experts' activation; one instance serves all experts.
        glu: experts are gated units ``W_out (act(W_gate x) * W_up x)``; False makes them ``W_out act(W_in x)``.
        shared: experts that every token uses with weight 1, beside the chosen ones.
        capacity: None drops nothing. A factor c lets every expert serve at most C = max(``min_capacity``, ceil(c N k / E))
            tokens (N real tokens, k the gate's slots); what comes beyond is dropped: it contributes 0 and the others' weights stay
            as they are. Usual are 1.25 in training and, set as an attribute, 2 in evaluation.
        min_capacity: least C; usual is 4.
        priority: who comes first where the capacity is short: ``slot`` (all tokens' first choice, in their order,
            then the second, ...) or ``weight`` (the largest weight).
        engine: what runs the experts, of :mod:`gatework.ops.dispatch`: ``loop``, ``segments``, ``grouped``, ``bmm``, or ``auto``,
            which chooses by shape and says why to the logger ``gatework``. Listed experts run by ``loop`` or ``segments``. All
            give the same numbers up to rounding.

    Weights: ``w_in`` (E, 2 d_ff, d_model), the gate's rows first (``glu=False``: (E, d_ff, d_model)), ``w_out`` (E,
        d_model, d_ff), no biases; shared experts likewise in
    ``shared_in`` and ``shared_out``. Listed experts are the modules of ``listed``.

    Initialisation: uniform in +-1 / sqrt(fan-in), PyTorch's default for a linear layer, for each expert alone; listed experts
        as their parts say.

    Side outputs: what the gate says; with a capacity also the metric ``dropped``, the share of the used slots that
    found no place.

    Raises:
        ValueError: sizes below 1, a capacity below 1, with which even evenly spread tokens would find no place.
        PartError: a listed expert that owns its norm and residual; x of another width, a mask that is not one boolean per token; a
            condition that is missing, unknown or not one row per token.
    """

    slots: ClassVar[Mapping[str, str]] = {"experts": "feedforward"}
    capabilities = Experts.capabilities | {
        "compiles": No("tokens are sorted by expert, and the lengths of the segments are data"),
    }

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        experts: int | list[Any] = 8,
        gate: Any = "topk(k=2)",
        activation: Any = "silu",
        glu: bool = True,
        shared: int = 0,
        capacity: float | None = None,
        priority: Literal["slot", "weight"] = "slot",
        min_capacity: int = 1,
        engine: Engine = "auto",
    ) -> None:
        super().__init__()
        listed = None
        if isinstance(experts, list):
            offered = {"d_model": d_model} | ({} if d_ff is None else {"d_ff": d_ff})
            listed = nn.ModuleList([build(expert, "feedforward", **offered) for expert in experts])
            experts = len(listed)
        d_ff = math.ceil(4 * d_model / 3 / 8) * 8 if d_ff is None else d_ff
        if min(d_model, d_ff, experts) < 1 or shared < 0:
            raise ValueError(f"d_model, d_ff and experts must be at least 1 and shared 0: {d_model}, {d_ff}, {experts}, {shared}")
        for expert in listed or ():
            if getattr(expert, "owns_residual", False):
                raise PartError(f"an expert of moe adds to the stream, and {type(expert).__name__} owns its norm and residual")
        if capacity is not None and not 1 <= capacity < math.inf:
            raise ValueError(f"capacity is at least 1, so that evenly spread tokens find a place, got {capacity}")
        if min_capacity < 1 or (capacity is None and min_capacity > 1):
            raise ValueError(f"min_capacity is at least 1 and goes with a capacity, got {min_capacity} with capacity {capacity}")
        if priority not in ("slot", "weight"):
            raise ValueError(f"priority must be 'slot' or 'weight', got {priority!r}")
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        if listed is not None and engine in ("grouped", "bmm"):
            raise ValueError(f"the engine {engine!r} needs experts of stacked weights; listed experts run by 'loop' or 'segments'")
        self.engine: Engine = engine
        self.d_model, self.d_ff, self.experts, self.shared = d_model, d_ff, experts, shared
        self.glu, self.capacity, self.priority, self.min_capacity = glu, capacity, priority, min_capacity
        if capacity is not None:
            answer = No("with a capacity tokens compete for the experts' places")
            self.capabilities = self.capabilities | {"batch_invariant": answer}
        self.gate = build(gate, "gate", d_model=d_model, n_experts=experts)
        for part in (self.gate, *(listed or ())):
            answers = {name: capability(part, name) for name, own in self.capabilities.items() if own and isinstance(part, Part)}
            self.capabilities = self.capabilities | answers
        self.listed = listed
        rows = 2 * d_ff if glu else d_ff
        if listed is None:
            self.w_in = nn.Parameter(torch.empty(experts, rows, d_model))
            self.w_out = nn.Parameter(torch.empty(experts, d_model, d_ff))
        if listed is None or shared:
            self.activation = build(activation, "activation")
        self.shared_in = nn.Parameter(torch.empty(shared, rows, d_model)) if shared else None
        self.shared_out = nn.Parameter(torch.empty(shared, d_model, d_ff)) if shared else None
        for name in ("w_in", "w_out", "shared_in", "shared_out"):
            weight = getattr(self, name, None)
            if weight is not None:
                nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        """The sizes."""
        shown = f"d_model={self.d_model}, d_ff={self.d_ff}, experts={self.experts}, shared={self.shared}, glu={self.glu}"
        shown = f"{shown}, capacity={self.capacity}, priority={self.priority}, min_capacity={self.min_capacity}"
        return f"{shown}, engine={self.engine}"

    def active_parameters(self) -> int:
        """Parameters that one token uses: gate, activation, shared experts and as many experts as the gate has
        slots (of listed experts' mean size)."""
        # Where the weights are parametrized, what is stored counts: a stack of its own, or something that all experts use.
        names = ("w_in", "w_out", "parametrizations.w_in.", "parametrizations.w_out.")
        stacked = sum(p.numel() for name, p in self.named_parameters() if name.startswith(names) and p.dim() == 3)
        stacked += sum(p.numel() for name, p in self.named_parameters() if name.startswith("listed."))
        rest = sum(p.numel() for p in self.parameters()) - stacked
        return rest + stacked // self.experts * int(getattr(self.gate, "k", self.experts))

    def forward(
        self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None, **conditions: Tensor
    ) -> Float[Tensor, "*B D"]:
        """Transform every token; padding (``mask`` False) is routed nowhere and comes out as the shared experts'
        output (0 without them). ``conditions`` go to the gate."""
        tokens, routing = self.route(x, mask, conditions)
        if self.listed is None:
            y = self.run_stacked(tokens, routing, self.w_in, self.w_out)  # Read once: they may be parametrized.
        else:
            y = run_experts(tokens, routing, list(self.listed), engine=self.engine)
        return self.finish(tokens, y).view(x.shape)

    def route(self, x: Tensor, mask: Tensor | None, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Routing]:
        """The tokens as (N, d_model), and who serves them."""
        shape = x.shape
        if shape[-1:] != (self.d_model,):
            raise PartError(f"x is (..., {self.d_model}), not {tuple(shape)}")
        if mask is not None and (mask.shape != shape[:-1] or mask.dtype != torch.bool):
            raise PartError(f"mask has one boolean per token, shape {tuple(shape[:-1])}, not {tuple(mask.shape)} of {mask.dtype}")
        given = {name: self._condition(name, value, shape[:-1]) for name, value in conditions.items()}
        if missing := set(self.gate.conditions) - set(given):
            raise PartError(f"the gate {type(self.gate).__name__} chooses by {', '.join(sorted(missing))} too: give it by keyword")
        x, mask = x.reshape(-1, shape[-1]), None if mask is None else mask.reshape(-1)
        routing = self.gate(x, mask, **given)
        if self.capacity is not None:
            routing = self._within_capacity(routing, len(x) if mask is None else int(mask.sum()))
        return x, routing

    def finish(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Add the shared experts' outputs to those of the chosen ones."""
        if self.shared_in is not None and self.shared_out is not None:
            dtype = self.compute_dtype(x, self.shared_in)
            with without_autocast(x.device):
                x = x.to(dtype)
                for expert in _Experts(self, self.shared_in.to(dtype), self.shared_out.to(dtype)):
                    y = y + expert(x)
        return y

    def _condition(self, name: str, value: Tensor, tokens: torch.Size) -> Tensor:
        if name not in self.gate.conditions:
            raise PartError(f"the gate {type(self.gate).__name__} takes no {name}: its conditions are {list(self.gate.conditions)}")
        if value.shape[: len(tokens)] != tokens:
            raise PartError(f"{name} has one row per token, shape {(*tokens, '...')}, not {tuple(value.shape)}")
        return value.reshape(-1, *value.shape[len(tokens) :])

    def compute_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """What experts of stacked weights compute in."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return torch.promote_types(x.dtype, weight.dtype)

    def run_stacked(self, x: Tensor, routing: Routing, w_in: Tensor, w_out: Tensor) -> Tensor:
        """The chosen of the experts with these weights on tokens (N, d_model), weighed and summed."""
        dtype = self.compute_dtype(x, w_in)
        with without_autocast(x.device):
            x = x.to(dtype)
            experts = _Experts(self, w_in.to(dtype), w_out.to(dtype))
            align = alignment(routing.experts.numel() / len(w_in), w_out[0].numel(), dtype, x.device)
            return run_experts(x, routing, experts, align, self.engine, experts.stacked)

    def _within_capacity(self, routing: Routing, n_real: int) -> Routing:
        assert self.capacity is not None
        n_tokens, k = routing.experts.shape
        limit = max(self.min_capacity, math.ceil(self.capacity * n_real * k / self.experts))
        used = routing.weights.detach() != 0
        # Slots in the order in which they claim their place; a stable sort by expert keeps it within each expert.
        if self.priority == "slot":
            order = torch.arange(n_tokens * k, device=used.device).view(n_tokens, k).t().flatten()
        else:
            order = routing.weights.detach().flatten().argsort(descending=True, stable=True)
        keys = torch.where(used, routing.experts, self.experts).flatten()[order]
        by_expert = keys.argsort(stable=True)
        starts = torch.bincount(keys, minlength=self.experts + 1).cumsum(0).roll(1)
        starts[0] = 0
        place = torch.empty_like(keys)
        place[order[by_expert]] = torch.arange(len(keys), device=keys.device) - starts[keys[by_expert]]
        kept = place.view(n_tokens, k) < limit
        if not in_backward():
            self.metrics = {"dropped": (used & ~kept).sum() / used.sum().clamp(min=1)}
        weights = torch.where(kept, routing.weights, 0)
        return Routing(weights, routing.experts, routing.n_experts, routing.logits, routing.probs)


class _Experts(Sequence[Callable[[Tensor], Tensor]]):
    """The experts' functions, one by one over slices of the stacked weights, or all at once."""

    def __init__(self, layer: MoE, w_in: Tensor, w_out: Tensor) -> None:
        self.layer, self.w_in, self.w_out = layer, w_in, w_out
        self.slices: tuple[Sequence[Tensor] | Tensor, Sequence[Tensor] | Tensor] | None = None

    def __len__(self) -> int:
        return len(self.w_in)

    def __getitem__(self, expert: Any) -> Any:
        if self.slices is None:
            self.slices = unstack(self.w_in), unstack(self.w_out)
        return partial(self._run, self.slices[0][expert], self.slices[1][expert])

    def _run(self, w_in: Tensor, w_out: Tensor, x: Tensor) -> Tensor:
        return linear(self._hidden(linear(x, w_in)).to(x.dtype), w_out)

    def stacked(self, rows: Tensor, product: Product) -> Tensor:
        """All experts on their rows."""
        return product(self._hidden(product(rows, self.w_in)).to(rows.dtype), self.w_out)

    def _hidden(self, h: Tensor) -> Tensor:
        return self.layer.activation.gated(h) if self.layer.glu else self.layer.activation(h)
