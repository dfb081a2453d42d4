"""``SelfGated``: what the activations of the form ``x * g(x)`` share."""

from __future__ import annotations

from abc import abstractmethod

from jaxtyping import Float
from torch import Tensor

from gatework.core.contracts import Activation


class SelfGated(Activation):
    """An activation ``y = x * g(x)`` whose gate ``g`` is also available alone.

    A gated linear unit of order 1 multiplies its values by :meth:`gate` instead of by the whole activation
    (``glu(activation=silu, order=1)`` is the sigmoid GLU).
    """

    @abstractmethod
    def gate(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``g(x)``, element by element."""
