"""The smooth step: a cubic that rises from exactly 0 to exactly 1.

Hazimeh et al., The Tree Ensemble Layer, 2020, arXiv 2002.07772.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def smooth_step(x: Float[Tensor, "*shape"], gamma: float = 1.0) -> Float[Tensor, "*shape"]:
    """``-2 (x / gamma)^3 + 3/2 (x / gamma) + 1/2`` between -gamma/2 and gamma/2, exactly 0 below and exactly 1 above.

    Continuously differentiable; the slope at 0 is ``3 / (2 gamma)``, and exactly 0 outside. ``smooth_step(-x)``
    is the complement ``1 - smooth_step(x)`` without its rounding: never negative, and exactly 0 where it should be.
    """
    u = (x / gamma).clamp(-0.5, 0.5) + 0.5
    return u * u * (3 - 2 * u)
