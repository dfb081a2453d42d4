"""What the state-space mixers share: the state, the call, how their parameters are made, and the three forms of their systems."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.mixers.base import RecurrentMixer
from gatework.ops.state_space import ComplexScan, DiagonalSystem, Pair, System, bilinear, multiply, state_space, zero_order_hold


@dataclass
class StateSpaceState(State):
    """The states of all groups, real parts before imaginary parts, in float32 or the parameters' dtype where that is finer."""

    modes: Float[Tensor, "B G S"]


class StateSpaceMixer(RecurrentMixer):
    """A mixer that runs a linear time-invariant system; the subclasses below say which, and what follows it.

    ``no_weight_decay`` names the parameters that the papers train without weight decay and at a learning rate of at most 0.001.

    Args:
        d_model: width of the stream, D.
        rate: eigenvalues (N,), whose real parts are negative.
        groups: how many systems start with them, of parameters of their own; None is one, whose modes are the groups.
        dt_min, dt_max: time steps are drawn log-uniformly between these, one per system, or with ``groups`` None per mode.

    Raises:
        ValueError: unless 0 < dt_min <= dt_max.
    """

    state_type = StateSpaceState
    no_weight_decay: ClassVar[tuple[str, ...]] = ("log_step", "log_decay", "frequency", "b")

    def __init__(self, d_model: int, rate: Tensor, groups: int | None, dt_min: float, dt_max: float) -> None:
        super().__init__()
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"time steps are drawn between 0 < dt_min <= dt_max, got {dt_min} and {dt_max}")
        self.d_model, self.dt_min, self.dt_max = d_model, dt_min, dt_max
        shape = (len(rate), 1) if groups is None else (groups, len(rate))
        span = math.log(dt_max) - math.log(dt_min)
        self.log_step = nn.Parameter(torch.rand(shape[0]) * span + math.log(dt_min))
        self.log_decay = parameter((-rate.real).log().view(-1, shape[1]).expand(shape))
        self.frequency = parameter(rate.imag.view(-1, shape[1]).expand(shape))

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, state={self.state_shape}, dt_min={self.dt_min}, dt_max={self.dt_max}"

    @abstractmethod
    def system(self) -> System:
        """The discrete system that the parameters describe, in float32 or better."""

    @abstractmethod
    def inputs(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T MG"]:
        """What enters the system for the tokens ``x``."""

    def rate(self) -> Pair:
        """The eigenvalues -exp(log_decay) + i frequency, (G, N)."""
        return -_precise(self.log_decay).exp(), _precise(self.frequency)

    def time_step(self) -> Float[Tensor, "G 1"]:
        """exp(log_step)."""
        return _precise(self.log_step)[:, None].exp()

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.mixers.base.RecurrentMixer`."""
        modes = state.modes if isinstance(state, StateSpaceState) else None
        y, after = state_space(self.system(), self.inputs(x), state=modes, real=real, segments=segments)
        if isinstance(state, StateSpaceState) and after is not None:
            state.modes = after.to(state.modes.dtype)
        return self.outputs(y, x, kept)

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> StateSpaceState:
        """A zero state; half precisions are kept in float32."""
        dtype = torch.promote_types(dtype or self.log_step.dtype, torch.float32)
        return StateSpaceState(torch.zeros(batch_size, *self.state_shape, dtype=dtype, device=device or self.log_step.device))

    def state_bytes(self, length: int) -> int:
        """Bytes of one sequence's state, the same at every length."""
        groups, size = self.state_shape
        return groups * size * torch.promote_types(self.log_step.dtype, torch.float32).itemsize

    @property
    def state_shape(self) -> tuple[int, int]:
        """Groups, and real numbers in the state of each."""
        groups, modes = self.log_decay.shape
        return groups, 2 * modes


class ChannelMixer(StateSpaceMixer):
    """One system with one input and one output per channel; then skip, GELU, projection and gated linear unit.

    Args:
        rate, b: eigenvalues and input weights, complex (N,), that every channel starts with.
        c: output weights, complex (d_model, N).
    """

    def __init__(self, d_model: int, rate: Tensor, b: Tensor, c: Tensor, dt_min: float, dt_max: float) -> None:
        super().__init__(d_model, rate, d_model, dt_min, dt_max)
        self.b, self.c = parameter(b.expand(d_model, -1)), parameter(c)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.o_proj = nn.Linear(d_model, 2 * d_model)

    def inputs(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The tokens themselves."""
        return x

    def output(self, o: Float[Tensor, "*B D"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Skip, GELU, projection, gated linear unit."""
        return F.glu(self.o_proj(F.gelu(torch.addcmul(o.to(x.dtype), x, self.skip))), -1)


class DiagonalMixer(ChannelMixer):
    """A :class:`ChannelMixer` with diagonal systems; ``copies`` is 2 where each mode stands for a conjugate pair."""

    copies: ClassVar[int]
    discretization: Literal["zoh", "bilinear"] = "zoh"

    def system(self) -> DiagonalSystem:
        """Modes whose outputs' weights are copies gain b c."""
        discretize = zero_order_hold if self.discretization == "zoh" else bilinear
        factor, gain = discretize(self.rate(), self.time_step())
        weight = multiply(gain, multiply(pair(self.b), pair(self.c)))
        return DiagonalSystem(factor, (self.copies * weight[0], self.copies * weight[1]))


class SharedStateMixer(StateSpaceMixer):
    """One diagonal system for all channels together; then skip, GELU and a gate.

    Args:
        rate: eigenvalues, complex (P,).
        b, c: input weights (P, d_model) and output weights (d_model, P), complex.
    """

    copies: ClassVar[int]

    def __init__(self, d_model: int, rate: Tensor, b: Tensor, c: Tensor, dt_min: float, dt_max: float) -> None:
        super().__init__(d_model, rate, None, dt_min, dt_max)
        self.b, self.c = parameter(b), parameter(c)
        self.skip = nn.Parameter(torch.randn(d_model))
        self.gate_proj = nn.Linear(d_model, d_model)

    def system(self) -> ComplexScan:
        """The modes by themselves, whose states are the outputs."""
        return ComplexScan(zero_order_hold(self.rate(), self.time_step())[0])

    def inputs(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T P2"]:
        """gain b x, all real parts before all imaginary parts."""
        gain = zero_order_hold(self.rate(), self.time_step())[1]
        return F.linear(x, torch.cat(multiply(gain, pair(self.b))).to(x.dtype))

    def output(self, o: Float[Tensor, "*B P2"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Output weights, skip, GELU, gate."""
        re, im = self.c.unbind(-1)
        read = F.linear(o.to(x.dtype), self.copies * torch.cat([re, -im], -1))
        y = F.gelu(torch.addcmul(read, x, self.skip))
        return y * self.gate_proj(y).sigmoid()


def parameter(values: Tensor) -> nn.Parameter:
    """Real or complex values, these as (.., 2), as a parameter of the default dtype and device."""
    values = torch.view_as_real(values) if values.is_complex() else values
    return nn.Parameter(torch.empty(values.shape).copy_(values))


def pair(x: Float[Tensor, "*S 2"]) -> Pair:
    """Real and imaginary parts of what a parameter holds, in float32 or better."""
    re, im = _precise(x).unbind(-1)
    return re, im


def shared_weights(d_model: int, blocks: int, inverse: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Input and output weights V^-1 B and C V of a system of ``blocks`` equal blocks, V (n, N) being the eigenvectors of one.

    B is real, of variance 1 / d_model; C complex, of variance 1 / (blocks n) in each part.
    """
    n = len(vectors)
    entering = torch.randn(blocks, n, d_model, device="cpu") * d_model**-0.5
    read = torch.randn(2, blocks, d_model, n, device="cpu") * (blocks * n) ** -0.5
    b = inverse @ entering.to(inverse.dtype)
    c = torch.complex(*read).to(vectors.dtype) @ vectors
    return b.flatten(0, 1), c.transpose(0, 1).flatten(1)


def complex_normal(*shape: int) -> Tensor:
    """Complex numbers of variance 1, half of it in each part."""
    return torch.view_as_complex(torch.randn(*shape, 2, device="cpu") * 0.5**0.5)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
