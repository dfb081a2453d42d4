"""``ParaLSTM``: a long short-term memory with peepholes whose steps, nonlinear as they are, run side by side.

Danieli et al., ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models, 2025, arXiv 2510.21450. With
b_* = u B_* + bias_* as in :mod:`gatework.mixers.paragru`, and one gate f that both forgets and lets in,

    f = sigmoid(a_f h_{t-1} + p_f c_{t-1} + b_f)    g = tanh(a_g h_{t-1} + b_g)    c_t = f c_{t-1} + (1 - f) g
    o = sigmoid(a_o h_{t-1} + p_o c_t + b_o)        h_t = o tanh(c_t)

The a_* and p_* are vectors, so the Jacobian of a step is a 2 x 2 matrix of diagonals over the state (c, h): with
k_f = (c_{t-1} - g) f (1 - f), k_g = (1 - f)(1 - g^2), k_o = tanh(c_t) o (1 - o) and q = o (1 - tanh(c_t)^2) + k_o p_o,

    dc/dc = f + k_f p_f    dc/dh = k_f a_f + k_g a_g    dh/dc = q dc/dc    dh/dh = q dc/dh + k_o a_o

The layer around the cell, and how its steps are solved, are ParaGRU's. The initial values are those of the official code, which
counts the outputs of one head for the input weights, where it counts all of them for ParaGRU's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gatework.core.registry import register
from gatework.mixers.paragru import ParaRNN
from gatework.ops.newton import Cell


class LSTMCell(Cell):
    """Gates f, g, o; values f, g, o, tanh(c_t); states c, h; weights a_f, a_g, a_o, p_f, p_o. Local: k_f, k_g, k_o, q."""

    name = "paralstm"
    states, gates, values, weights, derivatives, doubled = 2, 3, 4, 5, 4, 1

    @staticmethod
    def steps(weight: Tensor, gates: Tensor, before: Tensor, after: Tensor, values: Tensor) -> Iterator[None]:
        """One step after the other."""
        w_fg, (w_o, p_f, p_o) = weight[:2, None, None], weight[2:]
        arrays = gates[:, :2], gates[:, 2], *before.unbind(1), *after.unbind(1), values[:, :2], *values.unbind(1)
        for fg_in, o_in, c, h, new_c, new_h, fg, f, g, o, squashed in zip(*arrays, strict=True):
            torch.addcmul(fg_in, h, w_fg, out=fg)
            f.addcmul_(c, p_f)
            fg.sigmoid_()
            torch.lerp(g.mul_(2).sub_(1), c, f, out=new_c)
            torch.addcmul(o_in, h, w_o, out=o).addcmul_(new_c, p_o).sigmoid_()
            torch.mul(new_c, 2, out=squashed).sigmoid_().mul_(2).sub_(1)
            torch.mul(o, squashed, out=new_h)
            yield

    @staticmethod
    def linearise(weight: Tensor, before: Tensor, after: Tensor, values: Tensor, jacobian: Tensor, local: Tensor) -> None:
        """Jacobian and the factors of the derivatives by the gates."""
        c, (f, g, o, squashed), (by_f, by_g, by_o, through) = before[:, 0], values.unbind(1), local.unbind(1)
        a_f, a_g, a_o, p_f, p_o = weight
        (cc, ch), (hc, hh) = (row.unbind(1) for row in jacobian.unbind(1))
        some = torch.addcmul(f, f, f, value=-1)
        torch.sub(c, g, out=by_f).mul_(some)
        torch.neg(f, out=by_g).add_(1)
        by_g.addcmul_(torch.mul(by_g, g, out=some), g, value=-1)
        torch.addcmul(o, o, o, value=-1, out=by_o).mul_(squashed)
        torch.mul(o, squashed, out=some)
        torch.addcmul(o, some, squashed, value=-1, out=through).addcmul_(by_o, p_o)
        torch.addcmul(f, by_f, p_f, out=cc)
        torch.mul(by_f, a_f, out=ch).addcmul_(by_g, a_g)
        torch.mul(through, cc, out=hc)
        torch.mul(through, ch, out=hh).addcmul_(by_o, a_o)

    @staticmethod
    def gradients(before: Tensor, after: Tensor, values: Tensor, local: Tensor, adjoint: Tensor, by_weight: Tensor) -> None:
        """Gradients of the gates' inputs, in place, and of the weights."""
        local[:, :2] *= torch.addcmul(adjoint[:, 0], local[:, 3], adjoint[:, 1])[:, None]
        local[:, 2] *= adjoint[:, 1]
        by_weight[:, :3].addcmul_(local[:, :3], before[:, 1, None])
        by_weight[:, 3].addcmul_(local[:, 0], before[:, 0])
        by_weight[:, 4].addcmul_(local[:, 2], after[:, 0])


@register("paralstm", paper="pararnn")
class ParaLSTM(ParaRNN):
    """A nonlinear recurrence (LSTM) trained in parallel by Newton's method.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps 2 d_model numbers and the
    convolution's last 3 inputs whatever the length.

    Args:
        d_model: width of the stream, of the convolution and of both states.
        heads: blocks of the input weights B; the recurrence itself is apart for every channel.
        conv_width: tokens that the causal convolution before the cell sees.
        chunk: steps of a chunk of the parallel form. Newton's method corrects the states at the borders of chunks and steps inside
            them. None chooses by length, width and device; 1 corrects all states, as the paper does; T or more is the plain loop.
        iterations: None iterates until the result is the sequential one. A number makes training passes without a state stop
            after so many Newton iterations with chunks of 1, converged or not, as the paper does with 3; evaluation and decoding
            stay exact.

    Initialisation: a and p normal with standard deviation 2 / sqrt(5 d_model); B uniform up to sqrt(3 heads / d_model); the bias of
        f falls from 0 to -1 over the channels, the others are 0. Linear layers as PyTorch starts them, gains 1.

    Metrics: ``iterations``, Newton iterations of the last pass (0 where one chunk or the first guess was enough; 8 are followed by
        stepping). ``residual``, where their number is fixed: the largest |s_t - f(s_{t-1}, x_t)| of the last pass. If it grows,
        another function is trained than evaluation computes.

    Padding: passes the states unchanged. Packed documents start with states 0.

    ``keep`` computes gate, norm and output projection for the kept tokens only.

    Raises:
        ValueError: for a width that the heads do not divide, and ``chunk``, ``conv_width`` or ``iterations`` out of range.
    """

    cell = LSTMCell

    @property
    def fan_out(self) -> int:
        """What the initial input weights count as their outputs: those of one head."""
        return self.d_model // self.heads
