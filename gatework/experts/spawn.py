"""Experts grown out of a trained feed-forward: the first phase of EvoMoE.

Nie et al., EvoMoE, 2021, arXiv 2112.14397: a dense model is trained first; then each expert is the trained feed-forward with some
of its weights masked out, E_e = M_e * E_base, which breaks the symmetry, and a fresh gate learns to tell them apart. The masked
weights are only set to zero once; they go on training. This phase is not in the released code; the rate of 0.9 is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatework.core.errors import PartError
from gatework.experts.moe import MoE

#: By stacked weight of the mixture, the feed-forward's weights that stand in it, one above the other.
Sources = dict[str, list[Tensor]]


@torch.no_grad()
def spawn_experts(
    feedforward: nn.Module, experts: int = 8, gate: Any = "dense_to_sparse", keep: float = 0.9, optimizer: Optimizer | None = None
) -> MoE:
    """A mixture whose experts are clones of a trained ``glu`` or ``mlp``, each with weights of its own left out.

    With ``keep=1`` and a gate whose weights sum to 1 the mixture computes what the feed-forward computed. Put it in the place of
    the feed-forward, with which it shares the activation::

        block.feedforward = spawn_experts(block.feedforward, experts=4, optimizer=optimizer)

    Args:
        feedforward: has linear layers without bias ``up`` and ``down``, an ``activation``, and, where it is gated, ``gate``.
        experts: number of clones.
        gate: part expression, class or instance of the gate, which starts fresh.
        keep: each weight of each clone is kept with this probability and set to 0 otherwise.
        optimizer: of the feed-forward's weights. It optimizes the mixture's instead from here on; every clone gets a copy of the
            optimizer's state (moments, step count), whole also where weights were left out. The gate's parameters join the group of
            the feed-forward's.

    Returns:
        A :class:`gatework.experts.MoE` of the feed-forward's device, dtype and mode.

    Raises:
        PartError: for another kind of feed-forward, keep outside (0, 1], or an optimizer that does not hold the weights in one
            group or whose state has no copy.
    """
    parts = dict(feedforward.named_children())
    first, up, down = (parts.get(name) for name in ("gate", "up", "down"))
    if set(parts) - {"gate"} != {"up", "activation", "down"} or not isinstance(up, nn.Linear) or not isinstance(down, nn.Linear):
        raise PartError(f"experts are spawned from a glu or an mlp, not from {type(feedforward).__name__}")
    layers: list[nn.Linear] = [first, up] if isinstance(first, nn.Linear) else [up]
    if any(layer.bias is not None for layer in (*layers, down)):
        raise PartError("experts have no biases: spawn them from a feed-forward with bias=false")
    if getattr(feedforward, "order", 2) != 2:
        raise PartError("experts are gated units of order 2: spawn them from a glu with order=2")
    if not 0 < keep <= 1:
        raise PartError(f"keep is a probability in (0, 1], got {keep}")
    sources: Sources = {"w_in": [layer.weight for layer in layers], "w_out": [down.weight]}
    inherited = None if optimizer is None else _inherited(optimizer, sources, experts)
    layer = MoE(up.in_features, up.out_features, experts, gate, feedforward.activation, glu=len(layers) == 2)
    layer.to(down.weight.device, down.weight.dtype).train(feedforward.training)
    for name, weights in sources.items():
        clones = getattr(layer, name)
        clones.copy_(torch.cat(weights))
        if keep < 1:
            clones.mul_(torch.rand_like(clones) < keep)
    if optimizer is not None and inherited is not None:
        _replace(optimizer, layer, sources, inherited)
    return layer


def _inherited(optimizer: Optimizer, sources: Sources, experts: int) -> dict[str, dict[str, Any]]:
    """The optimizer's state of the stacked weights."""
    inherited: dict[str, dict[str, Any]] = {}
    for name, weights in sources.items():
        states = [optimizer.state.get(weight, {}) for weight in weights]
        inherited[name] = {}
        for key, value in states[0].items():
            values = [state.get(key) for state in states]
            if isinstance(value, Tensor) and value.shape == weights[0].shape:
                inherited[name][key] = torch.cat(values).expand(experts, -1, -1).clone()
            elif (not isinstance(value, Tensor) or value.dim() == 0) and all(v == value for v in values):
                inherited[name][key] = value.clone() if isinstance(value, Tensor) else value
            else:
                raise PartError(f"the optimizer's {key!r} cannot be copied to the experts: it is not one entry per weight")
    every = [weight for weights in sources.values() for weight in weights]
    held = [sum(any(p is weight for p in group["params"]) for weight in every) for group in optimizer.param_groups]
    if max(held) != len(every):
        raise PartError("the optimizer does not hold all weights of the feed-forward in one group")
    return inherited


def _replace(
    optimizer: Optimizer, layer: MoE, sources: Sources, inherited: dict[str, dict[str, Any]]
) -> None:
    every = [weight for weights in sources.values() for weight in weights]
    for group in optimizer.param_groups:
        kept = [p for p in group["params"] if all(p is not weight for weight in every)]
        if len(kept) < len(group["params"]):
            group["params"] = [*kept, layer.w_in, layer.w_out, *layer.gate.parameters()]
    for name, weights in sources.items():
        for weight in weights:
            optimizer.state.pop(weight, None)
        if inherited[name]:
            optimizer.state[getattr(layer, name)] = inherited[name]
