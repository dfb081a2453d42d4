"""``ParaGRU``: a gated recurrent unit whose steps, nonlinear as they are, run side by side; and what it shares with ``ParaLSTM``.

Danieli et al., ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language Models, 2025, arXiv 2510.21450. With u the
layer's input after a projection, a causal convolution over 4 tokens and SiLU, and b_* = u B_* + bias_* (B block-diagonal: every
head sees its own share of u),

    z = sigmoid(a_z h_{t-1} + b_z)    r = sigmoid(a_r h_{t-1} + b_r)    c = tanh(a_c h_{t-1} r + b_c)
    h_t = (1 - z) h_{t-1} + z c
    y = (RMSNorm(h) * silu(x W_gate)) W_out

The a_* are vectors: a channel of h meets itself only, so the Jacobian of a step is diagonal,

    J = 1 - z + (c - h) z (1 - z) a_z + z (1 - c^2) a_c (r + h r (1 - r) a_r)

and Newton's method on all steps at once costs linear recurrences (:mod:`gatework.ops.newton`). The cell is that of ``nn.GRU`` with
diagonal hidden weights, no hidden bias and the update gate turned around.

The paper trains with three Newton iterations whatever their residual, and decodes step by step. That is the same function only
where three suffice, which they do not once the weights a have grown. Here the parallel form iterates until it has converged, and
steps through the sequence where it does not; ``iterations=3`` trains as the paper does and reports the residual. The initial values
are those of the official code. The layer around the cell is the paper's figure; its norm's epsilon is not said there (1e-6 here).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State, in_backward
from gatework.core.registry import register
from gatework.mixers.base import RecurrentMixer, ShortConvolution, check_heads
from gatework.ops.newton import Cell, newton_recurrence


@dataclass
class ParaRNNState(State):
    """The last states of the cell (B, S, D), in float32 or the parameters' dtype where that is finer, and what its convolution
    has seen last (B, 3, D)."""

    states: Float[Tensor, "B S D"]
    tail: Float[Tensor, "B W D"]


class ParaRNN(RecurrentMixer):
    """A recurrent cell between convolution and gated norm; a method says its ``cell`` and :meth:`reset_input_weight`."""

    state_type = ParaRNNState
    cell: ClassVar[type[Cell]]

    def __init__(
        self, d_model: int, heads: int = 2, conv_width: int = 4, chunk: int | None = None, iterations: int | None = None
    ) -> None:
        super().__init__()
        check_heads(d_model, heads)
        if (chunk is not None and chunk < 1) or (iterations is not None and iterations < 0):
            raise ValueError(f"chunk must be at least 1 and iterations at least 0, got {chunk} and {iterations}")
        self.d_model, self.heads, self.chunk, self.iterations = d_model, heads, chunk, iterations
        width, gates = d_model // heads, self.cell.gates
        self.x_proj = nn.Linear(d_model, d_model, bias=False)
        self.g_proj = nn.Linear(d_model, d_model, bias=False)
        self.convolution = ShortConvolution(d_model, conv_width)
        bound = (6 / (width + self.fan_out)) ** 0.5
        self.input_weight = nn.Parameter(torch.empty(heads, width, gates * width).uniform_(-bound, bound))
        bias = torch.zeros(gates, d_model)
        bias[0] = -torch.linspace(0, 1, d_model)
        self.bias = nn.Parameter(bias)
        self.recurrent_weight = nn.Parameter(torch.randn(self.cell.weights, d_model) * 2 / (5 * d_model) ** 0.5)
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    @property
    def fan_out(self) -> int:
        """What the initial input weights count as their outputs."""
        return self.d_model

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, heads={self.heads}, chunk={self.chunk}, iterations={self.iterations}"

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        past = state if isinstance(state, ParaRNNState) else None
        u, tail = self.convolution(self.x_proj(x), None if past is None else past.tail, real, segments)
        split = (self.heads, self.d_model // self.heads)
        first = None if past is None else past.states.transpose(0, 1).unflatten(-1, split)
        inexact = self.iterations is not None and self.training and past is None
        states, done, residual = newton_recurrence(
            self.cell, self.gate_inputs(u), self.recurrent_weight.unflatten(-1, split), first, segments=segments,
            chunk=1 if inexact else self.chunk, iterations=self.iterations if inexact else None,
        )
        if not in_backward():
            self.metrics = {"iterations": done} | ({"residual": residual} if inexact else {})
        states = states.flatten(-2)
        if past is not None and x.shape[1]:
            last = states[:, :, -1].transpose(0, 1)
            if real is not None:
                count = real.sum(1)[:, None, None]
                place = (count - 1).clamp(min=0).expand_as(past.states)[:, :, None]
                last = torch.where(count > 0, states.transpose(0, 1).gather(2, place)[:, :, 0], past.states)
            past.states, past.tail = last.to(past.states.dtype), tail.to(past.tail.dtype)
        return self.outputs(states[-1], x, kept)

    def gate_inputs(self, u: Float[Tensor, "B T D"]) -> Float[Tensor, "B T G H K"]:
        """What the gates add to their parts of the state: B u + bias, each head by itself."""
        by_head = u.unflatten(-1, (self.heads, -1)).flatten(0, 1).transpose(0, 1)
        bias = self.bias.unflatten(-1, (self.heads, -1)).transpose(0, 1).flatten(1)[:, None]
        product = torch.baddbmm(bias, by_head, self.input_weight)
        return product.unflatten(-1, (self.cell.gates, -1)).unflatten(1, u.shape[:2]).movedim(0, 3)

    def output(self, o: Float[Tensor, "*B D"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Norm, gate and output projection."""
        out: Tensor = self.o_proj(self.norm(o.to(x.dtype)) * F.silu(self.g_proj(x)))
        return out

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> ParaRNNState:
        """Zeros; the cell's states of half precisions are kept in float32."""
        dtype, device = dtype or self.bias.dtype, device or self.bias.device
        exact = torch.promote_types(dtype, torch.float32)
        states = torch.zeros(batch_size, self.cell.states, self.d_model, dtype=exact, device=device)
        return ParaRNNState(states, self.convolution.init_tail(batch_size, dtype, device))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's states and convolution tail, the same at every length."""
        dtype = self.bias.dtype
        tail = (self.convolution.weight.shape[1] - 1) * dtype.itemsize
        return self.d_model * (self.cell.states * torch.promote_types(dtype, torch.float32).itemsize + tail)


class GRUCell(Cell):
    """Gates and values z, r, c; weights a_z, a_r, a_c. Local: the derivatives of h_t by the gates' inputs."""

    name = "paragru"
    states, gates, values, weights, derivatives, doubled = 1, 3, 3, 3, 3, 2

    @staticmethod
    def steps(weight: Tensor, gates: Tensor, before: Tensor, after: Tensor, values: Tensor) -> Iterator[None]:
        """One step after the other."""
        w_zr, w_c = weight[:2, None, None], weight[2]
        arrays = gates[:, :2], gates[:, 2], before[:, 0], after[:, 0], values[:, :2], *values.unbind(1)
        for zr_in, c_in, h, new, zr, z, r, c in zip(*arrays, strict=True):
            torch.addcmul(zr_in, h, w_zr, out=zr).sigmoid_()
            torch.mul(h, r, out=new)
            torch.addcmul(c_in, new, w_c, out=c).sigmoid_().mul_(2).sub_(1)
            torch.lerp(h, c, z, out=new)
            yield

    @staticmethod
    def linearise(weight: Tensor, before: Tensor, after: Tensor, values: Tensor, jacobian: Tensor, local: Tensor) -> None:
        """Jacobian and derivatives by the gates."""
        h, j = before[:, 0], jacobian[:, 0, 0]
        (z, r, c), (by_z, by_r, by_c), (a_z, a_r, a_c) = values.unbind(1), local.unbind(1), weight
        slope = torch.addcmul(z, z, z, value=-1)
        torch.sub(c, h, out=by_z).mul_(slope)
        torch.mul(z, c, out=by_c)
        torch.addcmul(z, by_c, c, value=-1, out=by_c)
        torch.mul(h, by_c, out=by_r).mul_(a_c).mul_(torch.addcmul(r, r, r, value=-1, out=slope))
        torch.mul(by_c, a_c, out=j).mul_(r).sub_(z).add_(1).addcmul_(by_z, a_z).addcmul_(by_r, a_r)

    @staticmethod
    def gradients(before: Tensor, after: Tensor, values: Tensor, local: Tensor, adjoint: Tensor, by_weight: Tensor) -> None:
        """Gradients of the gates' inputs, in place, and of the weights."""
        local *= adjoint
        h, r = before[:, 0], values[:, 1]
        by_weight[:, :2].addcmul_(local[:, :2], h[:, None])
        by_weight[:, 2].addcmul_(local[:, 2], h * r)


@register("paragru", paper="pararnn")
class ParaGRU(ParaRNN):
    """A nonlinear recurrence (GRU) trained in parallel by Newton's method.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps d_model numbers and the
    convolution's last 3 inputs whatever the length.

    Args:
        d_model: width of the stream, of the convolution and of the state.
        heads: blocks of the input weights B; the recurrence itself is apart for every channel.
        conv_width: tokens that the causal convolution before the cell sees.
        chunk: steps of a chunk of the parallel form. Newton's method corrects the states at the borders of chunks and steps inside
            them. None chooses by length, width and device; 1 corrects all states, as the paper does; T or more is the plain loop.
        iterations: None iterates until the result is the sequential one. A number makes training passes without a state stop
            after so many Newton iterations with chunks of 1, converged or not, as the paper does with 3; evaluation and decoding
            stay exact.

    Initialisation: a normal with standard deviation 2 / sqrt(5 d_model); B uniform up to sqrt(6 / (d_model / heads + d_model));
        the bias of z falls from 0 to -1 over the channels, the others are 0. Linear layers as PyTorch starts them, gains 1.

    Metrics: ``iterations``, Newton iterations of the last pass (0 where one chunk or the first guess was enough; 8 are followed by
        stepping). ``residual``, where their number is fixed: the largest |h_t - f(h_{t-1}, x_t)| of the last pass. If it grows,
        another function is trained than evaluation computes.

    Padding: passes the state unchanged. Packed documents start with state 0.

    ``keep`` computes gate, norm and output projection for the kept tokens only.

    Raises:
        ValueError: for a width that the heads do not divide, and ``chunk``, ``conv_width`` or ``iterations`` out of range.
    """

    cell = GRUCell
