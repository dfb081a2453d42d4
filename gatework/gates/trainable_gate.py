"""``TrainableGate``: gates that are exactly 0 or 1 and learn which channels to close.

Kim et al., Plug-in, Trainable Gate for Streamlining Arbitrary Neural Networks, 2019 (AAAI 2020), arXiv 1904.10921. For each channel
a scalar w, with a gradient shape g and a large M:

    TG(w) = b(w) + s(w) g(w)    b(w) = 1 if w >= 0 else 0    s(w) = (M w - floor(M w)) / M, in [0, 1/M)
    dTG/dw = g(w) + O(1/M) almost everywhere            y = x TG(w)

The saw-tooth s is invisible in the value and has slope 1, so that a step function gets the gradient g. Here the limit of large M is
computed: the value is exactly b(w), the gradient exactly g(w) times the incoming one. ``literal`` is the equation itself, M = 1e5,
left to autograd.

Loss, over all gates that were put into a model together (:func:`gatework.gates.attach`), rho the share of channels to close:

    penalty * (rho - mean(1 - TG(w)))^2

Differences: a public implementation (nn-comp) keeps w in [0, 1] and switches at 0.5; here w is free and switches at 0, as in the
paper. The initial range of w and the weight of the loss are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import ChannelGate, in_backward
from gatework.core.registry import register

#: M of the saw-tooth in the literal form.
TEETH = 1e5


@register("trainable_gate", paper="trainable_gate")
class TrainableGate(ChannelGate):
    """Gates of exactly 0 or 1 that learn which channels to close.

    ``forward(x (..., d_model)) -> x * b(w)``. Train the gates with the other weights, as fine-tuning of a trained model;
    :func:`gatework.gates.compact` then removes what is closed. Give the gates a rate of their own and no weight decay: w starts
    within 0.1 of the switch.

    Args:
        d_model: number of channels.
        target: rho, the share of channels to close, in [0, 1).
        penalty: weight of the loss that pulls towards ``target``.
        gradient: g, the gradient that a gate gets: ``one``, or ``sigmoid``, the derivative of the logistic function, which fades
            for gates that are far from the switch.
        literal: compute TG by the equation while training, in float64, with its saw-tooth of up to 1e-5; float32 rounds most of it
            away.
        freeze: the share of the run, at its end, in which gates keep their values whatever the optimizer's momentum does.

    Initialisation: w is uniform in [0, 0.1), all channels open.

    Side outputs: loss ``target`` (training), given by the first gate for all that were attached together; metric ``pruned``, the
        share of this gate's closed channels.

    Raises:
        ValueError: d_model below 1, target or freeze outside [0, 1), a negative penalty.
    """

    kept: Tensor

    def __init__(
        self,
        d_model: int,
        target: float = 0.5,
        penalty: float = 1.0,
        gradient: Literal["one", "sigmoid"] = "one",
        literal: bool = False,
        freeze: float = 0.0,
    ) -> None:
        super().__init__()
        if d_model < 1 or penalty < 0:
            raise ValueError(f"d_model must be at least 1 and penalty 0, got {d_model} and {penalty}")
        if not (0 <= target < 1 and 0 <= freeze < 1):
            raise ValueError(f"target and freeze are shares in [0, 1), got {target} and {freeze}")
        if gradient not in ("one", "sigmoid"):
            raise ValueError(f"gradient must be 'one' or 'sigmoid', got {gradient!r}")
        self.target, self.penalty, self.gradient, self.literal, self.freeze = target, penalty, gradient, literal, freeze
        self.weight = nn.Parameter(torch.empty(d_model).uniform_(0, 0.1))
        #: All gates whose pruned share is one number, this one included; None is this one alone.
        self.group: Sequence[TrainableGate] | None = None
        if freeze:
            self.register_buffer("kept", self.weight.detach().clone())

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"d_model={len(self.weight)}, target={self.target}, penalty={self.penalty}, gradient={self.gradient}"
        return f"{shown}, literal={self.literal}, freeze={self.freeze}"

    def values(self) -> Float[Tensor, "D"]:
        """The gates that evaluation multiplies with, 0 or 1."""
        return (self.weight >= 0).to(self.weight.dtype)

    def _values(self) -> Tensor:
        """The gates with their gradient."""
        if not (self.literal and self.training):
            gates: Tensor = _Step.apply(self.weight, _slope(self.weight, self.gradient).detach())
            return gates
        w = self.weight.double()
        teeth = (TEETH * w - (TEETH * w).floor()) / TEETH
        return ((w >= 0).double() + teeth * _slope(w, self.gradient)).to(self.weight.dtype)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Keep the open channels, set the others to 0."""
        gates = self._values()
        losses = {}
        if self.training and self.penalty and (self.group is None or self.group[0] is self):
            every = gates if self.group is None else torch.cat([gates, *(gate._values() for gate in self.group[1:])])
            wide = every.to(torch.promote_types(every.dtype, torch.float32))
            losses["target"] = self.penalty * (self.target - (1 - wide).mean()).square()
        if not in_backward():
            self.losses, self.metrics = losses, {"pruned": (self.weight < 0).float().mean()}
        return x * gates.to(x.dtype)

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Keep the gates where they were when the last share of the run began."""
        if not self.freeze:
            return
        if step <= math.ceil((1 - self.freeze) * total_steps):
            self.kept.copy_(self.weight)
        else:
            self.weight.copy_(self.kept)


def _slope(w: Tensor, gradient: str) -> Tensor:
    return torch.ones_like(w) if gradient == "one" else w.sigmoid() * (1 - w.sigmoid())


class _Step(torch.autograd.Function):
    """b(w), with the gradient ``slope``."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return (w >= 0).to(w.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return grads[0] * slope, None
