"""What the activations of the form ``x * g(x)`` share: the contract, a backward that saves ``x`` alone, expanded gates.

A gate ``g: R -> (0, 1)`` with its slope ``g'`` and an optional scalar ``a`` makes

    g_a(x) = (1 + 2a) g(x) - a,      y = x g_a(x),
    dy/dx = g_a(x) + x (1 + 2a) g'(x),      dy/da = x (2 g(x) - 1)

(Huang 2024, arXiv 2405.20768; without ``a`` it is the plain gate). For the backward pass ``x`` and ``a`` are kept, nothing
else; everything is recomputed from them, in float32 where ``x`` has a half precision.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Activation

#: A differentiable elementwise function that returns a new tensor.
Curve = Callable[[Tensor], Tensor]


class SelfGated(Activation):
    """An activation ``y = x * g(x)`` whose gate ``g`` is also available alone.

    A gated linear unit of order 1 multiplies its values by :meth:`gate` instead of by the whole activation
    (``glu(activation=silu, order=1)`` is the sigmoid GLU).
    """

    @abstractmethod
    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``g(x)``, element by element."""


class ExpandedGate(SelfGated):
    """``x * ((1 + 2a) g(x) - a)`` with a trainable scalar ``a`` that starts at 0; a subclass gives ``g`` and its slope.

    The gate's range grows from (0, 1) to (-a, 1 + a). One scalar per instance, that is, per feed-forward block; its learning
    rate is that of the other weights and it gets **no weight decay**: ``no_weight_decay`` names it.
    """

    no_weight_decay = ("alpha",)

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(()))

    @staticmethod
    @abstractmethod
    def curve(x: Tensor) -> Tensor:
        """The base gate ``g``."""

    @staticmethod
    @abstractmethod
    def slope(x: Tensor) -> Tensor:
        """The derivative of :meth:`curve`."""

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""
        return self_gated(x, self.curve, self.slope, self.alpha)

    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The expanded gate ``(1 + 2a) g(x) - a``."""
        return gated(x, self.curve, self.slope, self.alpha)


def self_gated(x: Tensor, curve: Curve, slope: Curve, alpha: Tensor | None = None) -> Tensor:
    """``x * g_a(x)`` for the gate ``curve`` with derivative ``slope``; saves ``x`` (and ``alpha``) only.

    Args:
        x: any shape, any floating dtype; the result has both.
        curve: the gate g.
        slope: its derivative g'; both must be finite for every finite input.
        alpha: scalar; None is 0 and untrained.
    """
    out: Tensor = _Gated.apply(x, alpha, curve, slope, True)
    return out


def gated(x: Tensor, curve: Curve, slope: Curve, alpha: Tensor | None = None) -> Tensor:
    """``g_a(x)``, the gate alone; arguments and memory as in :func:`self_gated`."""
    out: Tensor = _Gated.apply(x, alpha, curve, slope, False)
    return out


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _expand(g: Tensor, alpha: Tensor | None) -> Tensor:
    if alpha is None:
        return g
    a = alpha.to(g.dtype)
    return torch.addcmul(-a, 1 + 2 * a, g)


class _Gated(torch.autograd.Function):
    """The backward is made of differentiable operations on what was saved, so it can be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor | None, curve: Curve, slope: Curve, times_x: bool) -> Tensor:
        v = _wide(x)
        g = _expand(curve(v), alpha)
        return (g * v if times_x else g).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, alpha, ctx.curve, ctx.slope, ctx.times_x = inputs
        ctx.save_for_backward(x, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha = ctx.saved_tensors
        v, dy = _wide(x), _wide(grad)
        need_x, need_alpha = ctx.needs_input_grad[:2]
        g: Tensor = ctx.curve(v) if ctx.times_x or need_alpha else v
        grad_x: Tensor | None = None
        grad_alpha: Tensor | None = None
        if need_x:
            d = ctx.slope(v)
            if alpha is not None:
                d = d * (1 + 2 * alpha.to(v.dtype))
            if ctx.times_x:
                d = torch.addcmul(_expand(g, alpha), v, d)
            grad_x = (dy * d).to(x.dtype)
        if need_alpha:
            d = 2 * g - 1
            grad_alpha = (dy * (d * v if ctx.times_x else d)).sum().to(alpha.dtype)
        return grad_x, grad_alpha, None, None, None
