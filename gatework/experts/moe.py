"""``MoE``: the sparse mixture of feed-forward experts.

Shazeer et al., Outrageously Large Neural Networks, 2017, arXiv 1701.06538, equation 1, with gated linear units as
experts (Shazeer, 2020, arXiv 2002.05202), shared experts (DeepSeekMoE, 2401.06066) and, where asked for, the capacity
of GShard (2006.16668):

    y = sum_{e chosen} G_e(x) E_e(x) + sum_{shared} E_s(x)    E(x) = W_out (act(W_gate x) * W_up x)

Dropless by default: tokens are sorted by expert and each expert runs once on its own contiguous block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import Experts, No, in_backward
from gatework.core.registry import build, register
from gatework.core.routing import Routing
from gatework.ops.dispatch import run_experts, unstack
from gatework.ops.linear import alignment, linear
from gatework.ops.precision import without_autocast


@register("moe", paper="sparse_moe")
class MoE(Experts):
    """Mixture of feed-forward experts: dropless, stacked weights, any gate.

    ``forward(x (..., d_model)) -> (..., d_model)``.

    Args:
        d_model: width of the tokens.
        d_ff: hidden width of one expert; None is 4/3 d_model rounded up to a multiple of 8, so that two experts cost
            what one dense gated unit of the usual 8/3 d_model costs.
        experts: E.
        gate: part expression, class or instance of a gate; its ``n_experts`` is E.
        activation: part expression or class of the experts' activation; one instance serves all experts.
        glu: experts are gated units ``W_out (act(W_gate x) * W_up x)``; False makes them ``W_out act(W_in x)``.
        shared: experts that every token uses with weight 1, beside the chosen ones.
        capacity: None drops nothing. A factor c lets every expert serve at most ceil(c N k / E) tokens (N real and
            padded tokens, k the gate's slots); what comes beyond is
            dropped: it contributes 0 and the others' weights stay as they are.
        priority: who comes first where the capacity is short: ``slot`` (all tokens' first choice, in their order,
            then the second, ...) or ``weight`` (the largest weight).

    Weights: ``w_in`` (E, 2 d_ff, d_model), the gate's rows first (``glu=False``: (E, d_ff, d_model)), ``w_out`` (E,
        d_model, d_ff), no biases; shared experts likewise in
    ``shared_in`` and ``shared_out``.

    Initialisation: uniform in +-1 / sqrt(fan-in), PyTorch's default for a linear layer, for each expert alone.

    Side outputs: what the gate says; with a capacity also the metric ``dropped``, the share of the used slots that
    found no place.

    Raises:
        ValueError: sizes below 1, a capacity that is not positive.
    """

    capabilities = Experts.capabilities | {
        "compiles": No("tokens are sorted by expert, and the lengths of the segments are data"),
    }

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        experts: int = 8,
        gate: Any = "topk(k=2)",
        activation: Any = "silu",
        glu: bool = True,
        shared: int = 0,
        capacity: float | None = None,
        priority: Literal["slot", "weight"] = "slot",
    ) -> None:
        super().__init__()
        d_ff = math.ceil(4 * d_model / 3 / 8) * 8 if d_ff is None else d_ff
        if min(d_model, d_ff, experts) < 1 or shared < 0:
            raise ValueError(f"d_model, d_ff and experts must be at least 1 and shared 0: {d_model}, {d_ff}, {experts}, {shared}")
        if capacity is not None and capacity <= 0:
            raise ValueError(f"capacity is a positive factor, got {capacity}")
        if priority not in ("slot", "weight"):
            raise ValueError(f"priority must be 'slot' or 'weight', got {priority!r}")
        self.d_model, self.d_ff, self.experts, self.shared = d_model, d_ff, experts, shared
        self.glu, self.capacity, self.priority = glu, capacity, priority
        if capacity is not None:
            answer = No("with a capacity tokens compete for the experts' places")
            self.capabilities = self.capabilities | {"batch_invariant": answer}
        self.gate = build(gate, "gate", d_model=d_model, n_experts=experts)
        self.activation = build(activation, "activation")
        rows = 2 * d_ff if glu else d_ff
        self.w_in = nn.Parameter(torch.empty(experts, rows, d_model))
        self.w_out = nn.Parameter(torch.empty(experts, d_model, d_ff))
        self.shared_in = nn.Parameter(torch.empty(shared, rows, d_model)) if shared else None
        self.shared_out = nn.Parameter(torch.empty(shared, d_model, d_ff)) if shared else None
        for weight in (self.w_in, self.w_out, self.shared_in, self.shared_out):
            if weight is not None:
                nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        """The sizes."""
        shown = f"d_model={self.d_model}, d_ff={self.d_ff}, experts={self.experts}, shared={self.shared}, glu={self.glu}"
        return f"{shown}, capacity={self.capacity}, priority={self.priority}"

    def active_parameters(self) -> int:
        """Parameters that one token uses: gate, activation, shared experts and as many experts as the gate has
        slots."""
        # Where the weights are parametrized, what is stored counts: a stack of its own, or something that all experts use.
        names = ("w_in", "w_out", "parametrizations.w_in.", "parametrizations.w_out.")
        stacked = sum(p.numel() for name, p in self.named_parameters() if name.startswith(names) and p.dim() == 3)
        rest = sum(p.numel() for p in self.parameters()) - stacked
        return rest + stacked // self.experts * int(getattr(self.gate, "k", self.experts))

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Transform every token; padding (``mask`` False) is routed nowhere and comes out as the shared experts'
        output (0 without them)."""
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        routing = self.gate(x, None if mask is None else mask.reshape(-1))
        if self.capacity is not None:
            routing = self._within_capacity(routing)
        w_in, w_out = self.w_in, self.w_out  # Read once: they may be parametrized.
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        else:
            dtype = torch.promote_types(x.dtype, w_in.dtype)
        with without_autocast(x.device):
            x = x.to(dtype)
            experts = _Experts(self, unstack(w_in.to(dtype)), unstack(w_out.to(dtype)))
            rows = routing.experts.numel() / self.experts
            y = run_experts(x, routing, experts, alignment(rows, w_out[0].numel(), dtype, x.device))
            if self.shared_in is not None and self.shared_out is not None:
                for expert in _Experts(self, unstack(self.shared_in.to(dtype)), unstack(self.shared_out.to(dtype))):
                    y = y + expert(x)
        return y.view(shape)

    def _within_capacity(self, routing: Routing) -> Routing:
        assert self.capacity is not None
        n_tokens, k = routing.experts.shape
        limit = math.ceil(self.capacity * n_tokens * k / self.experts)
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
    """The experts' functions, over their slices of the stacked weights."""

    def __init__(self, layer: MoE, w_in: Sequence[Tensor] | Tensor, w_out: Sequence[Tensor] | Tensor) -> None:
        self.layer, self.w_in, self.w_out = layer, w_in, w_out

    def __len__(self) -> int:
        return len(self.w_in)

    def __getitem__(self, expert: Any) -> Any:
        return partial(self._run, self.w_in[expert], self.w_out[expert])

    def _run(self, w_in: Tensor, w_out: Tensor, x: Tensor) -> Tensor:
        h = linear(x, w_in)
        h = self.layer.activation.gated(h) if self.layer.glu else self.layer.activation(h)
        return linear(h.to(x.dtype), w_out)
