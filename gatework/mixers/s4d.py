"""``S4D``: one diagonal linear system per channel, as good as S4 and much simpler.

Gu, Gupta, Goel and Ré, On the Parameterization and Initialization of Diagonal State Space Models, 2022, arXiv 2206.11893. Per
channel, with N/2 complex modes that stand for N (each beside its conjugate, hence the factor 2):

    h_n' = lambda_n h_n + b_n u    o = 2 Re sum_n c_n h_n    lambda_n = -exp(log_decay_n) + i frequency_n    step = exp(log_step)
    zero-order hold:  h_t = e^z h_{t-1} + step (e^z - 1)/z b u_t                            z = step lambda
    bilinear:         h_t = (1 + z/2)/(1 - z/2) h_{t-1} + step/(1 - z/2) b u_t
    y = GLU(W gelu(o + skip u) + bias)

Initialisations, n = 0 .. N/2 - 1 (section 4 of the paper):

    lin   lambda_n = -1/2 + i pi n                          b = 1: damped Fourier modes
    inv   lambda_n = -1/2 + i (N / pi)(N / (2n + 1) - 1)    b = 1: close to the eigenvalues of the next
    legs  lambda, b of HiPPO-LegS without its low-rank part (:func:`gatework.ops.hippo.normal_plus_low_rank`)
    real  lambda_n = -(n + 1)                               b = 1: exponentials, for comparison

Differences from the released code: the convolution is computed in chunks (:mod:`gatework.ops.state_space`) instead of by Fourier
transforms. b of ``legs``, which theory would halve and the code does not (nor do we), is real and positive here; the code leaves
its phase to the eigenvector routine and clips its imaginary part at 2. There is no dropout inside. The mode n = 0 of ``lin`` is
real, and 2 Re counts it twice, as published.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gatework.core.registry import register
from gatework.mixers.state_space import DiagonalMixer, complex_normal
from gatework.ops.hippo import normal_plus_low_rank


@register("s4d", paper="s4d")
class S4D(DiagonalMixer):
    """A diagonal linear state space per channel.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``d_model * d_state`` real
    numbers whatever the length.

    Args:
        d_model: width of the stream, and number of systems.
        d_state: N, real numbers in a channel's state, even.
        init: where the eigenvalues start, see the module: "lin", "inv", "legs" or "real".
        discretization: "zoh" (zero-order hold) or "bilinear".
        dt_min, dt_max: the channels' time steps are drawn log-uniformly between these; with Re lambda = -1/2 a step remembers
            2 / step tokens, so 20 to 2000.

    Initialisation: see the module for the eigenvalues and b; c complex normal of variance 1, skip normal, PyTorch's default for the
    output projection.

    Decoding keeps h without its input weights, which are folded into those of the outputs. Padding leaves the state as it is,
    packed documents start with an empty one.

    ``keep`` skips what follows the system (GELU, projection, GLU); the system itself is run for all tokens.

    Training: the paper's learning rate for ``log_step``, ``log_decay``, ``frequency`` and ``b`` is at most 0.001, without weight
    decay (``no_weight_decay`` names them).

    Raises:
        ValueError: for an odd ``d_state``, an unknown ``init`` or ``discretization``, or unless 0 < dt_min <= dt_max.
    """

    copies = 2

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        init: Literal["lin", "inv", "legs", "real"] = "lin",
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        if discretization not in ("zoh", "bilinear"):
            raise ValueError(f"discretization is 'zoh' or 'bilinear', not {discretization!r}")
        rate, b = diagonal_start(init, d_state)
        super().__init__(d_model, rate, b, complex_normal(d_model, d_state // 2), dt_min, dt_max)
        self.init, self.discretization = init, discretization

    def extra_repr(self) -> str:
        """The settings."""
        return f"{super().extra_repr()}, init={self.init}, discretization={self.discretization}"


def diagonal_start(init: str, n: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and input weights, complex (n/2,), of an initialisation by name.

    Raises:
        ValueError: for an odd n or an unknown name.
    """
    if n < 2 or n % 2:
        raise ValueError(f"d_state must be even and at least 2, got {n}")
    index = torch.arange(n // 2, dtype=torch.float64, device="cpu")
    half = torch.full_like(index, -0.5)
    if init == "legs":
        rate, _, b, _ = normal_plus_low_rank(n)
        return rate, b
    if init == "lin":
        rate = torch.complex(half, math.pi * index)
    elif init == "inv":
        rate = torch.complex(half, n / math.pi * (n / (2 * index + 1) - 1))
    elif init == "real":
        rate = torch.complex(-(index + 1), torch.zeros_like(index))
    else:
        raise ValueError(f"init is 'lin', 'inv', 'legs' or 'real', not {init!r}")
    return rate, torch.ones_like(rate)
