"""``MesaOptimizer``: one layer of linear self-attention that learns one step of gradient descent, and the theory that says so.

Zheng et al., On Mesa-Optimization in Autoregressively Trained Transformers: Emergence and Capability, 2024, arXiv 2405.16845.
A sequence x_{t+1} = W x_t has a W of its own, diagonal with numbers of absolute value 1. From e_t = [0; x_t; x_{t-1}] (x_0 = 0) the
layer f_t = e_t + W_PV E_t E_t^* W_KQ e_t / (t - 1) predicts x_{t+1} by the first rows of f_t. Trained by gradient descent from
W_KQ = a in block (3, 2), W_PV = b in block (1, 2) and 0 elsewhere, it keeps that form, and then predicts

    y_t = (a b / (t - 1)) sum over i < t of x_{i+1} x_i^* x_t

which is one step of gradient descent at rate a b / (t - 1) on the context's least squares, 1/2 sum |x_{i+1} - W x_i|^2, from
W = 0 (theorem 4.1). a b goes to k1 / (k2 + k3 mean over t = 2 .. T - 1 of 1 / (t - 1)) (equation 7) with k1 = E|x_j|^4,
k2 = E|x_j|^6, k3 = sum over r != j of E|x_j|^2 |x_r|^4: the minimum of the loss 1/2 sum over t of E|y_t - x_{t+1}|^2 among these.
So the step recovers W where |x_1j|^2 is one constant wherever it is not 0, and does not for a Gaussian start.

In the paper's code the layer has no rows of zeros and no residual, which is the same prediction. Complex numbers are pairs (Re, Im)
of neighbouring channels here, as in the task ``in_context_ar``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.mixers.linear_self_attention import LinearSelfAttention

#: Law of the first vector of a sequence.
Start = Literal["gaussian", "sparse", "sign"]


class MesaOptimizer(nn.Module):
    """One linear self-attention layer on ``[0; x_t; x_{t-1}]``, which predicts the next vector.

    ``forward(x (B, T, width)) -> (B, T, width)``: y_t, of which y_1 is 0 by the form that the layer starts from.

    Args:
        width: channels of a vector, real ones; with ``complex`` twice the paper's d.
        a: start of block (3, 2) of W_KQ.
        b: start of block (1, 2) of W_PV.
        complex: whether channels are pairs (Re, Im) and weights complex.

    Weights: ``attention.kq`` and ``attention.pv``.

    Initialisation: ``a`` and ``b`` times the identity in their blocks, 0 elsewhere.

    Raises:
        PartError: a width below 1, or an odd one with ``complex``.

    Example:
        >>> MesaOptimizer(width=10)(torch.randn(2, 7, 10)).shape
        torch.Size([2, 7, 10])
    """

    def __init__(self, width: int, a: float = 0.1, b: float = 0.1, complex: bool = True) -> None:
        super().__init__()
        if width < 1 or (complex and width % 2):
            raise PartError(f"width must be at least 1, and even where its channels are pairs, got {width}")
        self.width = width
        self.attention = LinearSelfAttention(3 * width, complex=complex)
        with torch.no_grad():
            kq, pv = (torch.view_as_complex(w.zero_()) if complex else w.zero_() for w in (self.attention.kq, self.attention.pv))
            d = len(kq) // 3
            kq[2 * d :, d : 2 * d].fill_diagonal_(a)
            pv[:d, d : 2 * d].fill_diagonal_(b)

    def forward(self, x: Float[Tensor, "B T W"]) -> Float[Tensor, "B T W"]:
        """Predictions of the next vectors."""
        if x.shape[-1] != self.width:
            raise PartError(f"this model was built for vectors of width {self.width}, not {x.shape[-1]}")
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        y: Tensor = self.attention(torch.cat([torch.zeros_like(x), x, before], -1))
        return y[..., : self.width]  # The first rows of e_t are 0: the residual adds nothing.

    def rate(self) -> float:
        """a b: the mean over the two blocks' diagonals of the products of their (real parts of) entries."""
        kq, pv = (w.detach()[..., 0] if w.dim() == 3 else w.detach() for w in (self.attention.kq, self.attention.pv))
        d = len(kq) // 3
        return float((kq[2 * d :, d : 2 * d].diagonal() * pv[:d, d : 2 * d].diagonal()).mean())


def optimal_rate(start: str, dimensions: int, length: int, scale: float = 1.0) -> float:
    """a b at the minimum of the population loss, k1 / (k2 + k3 mean 1/(t - 1)).

    Args:
        start: law of x_1: "gaussian" with independent coordinates N(0, scale^2), "sparse" with one coordinate, any, at +-scale,
            "sign" with every one at +-scale.
        dimensions: d, of complex numbers.
        length: T, at least 3.
        scale: of the start.

    Raises:
        PartError: no such law, a length below 3, dimensions below 1.
    """
    if length < 3 or dimensions < 1:
        raise PartError(f"length must be at least 3 and dimensions at least 1, got {length} and {dimensions}")
    # E|x_j|^4, E|x_j|^6 and E|x_j|^2 |x_r|^4 of coordinates of scale 1.
    moments = {"gaussian": (3.0, 15.0, 3.0), "sparse": (1 / dimensions, 1 / dimensions, 0.0), "sign": (1.0, 1.0, 1.0)}
    if start not in moments:
        raise PartError(f"the laws of the start are {', '.join(moments)}, not {start!r}")
    k1, k2, cross = moments[start]
    mean = sum(1 / (t - 1) for t in range(2, length)) / (length - 2)
    return k1 / (k2 + (dimensions - 1) * cross * mean) / scale**2


def one_gradient_step(x: Float[Tensor, "B T W"], rate: float, complex: bool = True) -> Float[Tensor, "B T W"]:
    """What one step of gradient descent at ``rate / (t - 1)`` on the least squares of the first t vectors, from W = 0, predicts for
    the next; 0 at t = 1. ``complex``: whether channels are pairs (Re, Im)."""
    z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if complex else x
    batch, length, width = z.shape
    gradient, y = z.new_zeros(batch, width, width), [torch.zeros_like(z[:, 0])] if length else []
    for t in range(1, length):
        gradient = gradient - z[:, t, :, None] * z[:, t - 1, None, :].conj()  # Of the pairs up to x_t, where W = 0.
        y.append((-rate / t * gradient @ z[:, t, :, None])[..., 0])
    out = torch.stack(y, 1) if y else z
    return torch.view_as_real(out).flatten(-2) if complex else out
