"""``S4``: a linear system per channel whose matrix is HiPPO's, normal plus low rank.

Gu, Goel and Ré, Efficiently Modeling Long Sequences with Structured State Spaces, 2021, arXiv 2111.00396. Per channel, with N/2
complex modes that stand for N (each beside its conjugate):

    x' = (Lambda - P P*) x + b u    o = 2 Re sum_n c_n x_n    Lambda = -exp(log_decay) + i frequency    step = exp(log_step)
    x_t = A x_{t-1} + B u_t    A = (1 - step/2 (Lambda - P P*))^-1 (1 + step/2 (Lambda - P P*))    B = (1 - step/2 (..))^-1 step b
    y = GLU(W gelu(o + skip u) + bias)

with A's diagonal plus rank-one form by Woodbury's identity (:class:`gatework.ops.state_space.LowRankSystem`), so that one step of
decoding costs O(N). Since P P* is subtracted and Re Lambda < 0, no value of the parameters makes the system unstable.

Differences from the paper and its code. The convolution is computed in chunks (:mod:`gatework.ops.state_space`), for which powers
of A up to a chunk's length are enough; it runs at any length and gives the state. The paper's algorithm, the kernel of all T tokens
from Cauchy sums at the roots of unity, is :meth:`S4.kernel`: the same numbers, but without a compiled routine of its own slower,
and with N / 2 complex numbers of memory per channel and token. The parameter is c itself; the code's is c (1 - A^L), which
belongs to one length L and must be changed when a longer sequence comes. The code clips the imaginary part of b at 2, whose phase
is arbitrary; here b starts real and positive, unclipped. There is no dropout inside.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from gatework.core.registry import register
from gatework.mixers.state_space import ChannelMixer, complex_normal, pair, parameter
from gatework.ops.hippo import normal_plus_low_rank
from gatework.ops.state_space import LowRankSystem, cauchy_kernel


@register("s4", paper="s4")
class S4(ChannelMixer):
    """A linear state space per channel, normal plus low rank.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``d_model * d_state`` real
    numbers whatever the length.

    Args:
        d_model: width of the stream, and number of systems.
        d_state: N, real numbers in a channel's state, even.
        dt_min, dt_max: the channels' time steps are drawn log-uniformly between these.

    Initialisation: Lambda, P and b of HiPPO-LegS (:func:`gatework.ops.hippo.normal_plus_low_rank`) in every channel; c complex
    normal of variance 1, skip normal, PyTorch's default for the output projection.

    Decoding keeps the state x. Padding leaves it as it is, packed documents start with an empty one.

    ``keep`` skips what follows the system (GELU, projection, GLU); the system itself is run for all tokens.

    Training: the paper's learning rate for ``log_step``, ``log_decay``, ``frequency``, ``p`` and ``b`` is at most 0.001, without
    weight decay (``no_weight_decay`` names them).

    Raises:
        ValueError: for an odd ``d_state``, or unless 0 < dt_min <= dt_max.
    """

    no_weight_decay = (*ChannelMixer.no_weight_decay, "p")

    def __init__(self, d_model: int, d_state: int = 64, dt_min: float = 0.001, dt_max: float = 0.1) -> None:
        rate, p, b, _ = normal_plus_low_rank(d_state)
        super().__init__(d_model, rate, b, complex_normal(d_model, d_state // 2), dt_min, dt_max)
        self.p = parameter(p.expand(d_model, -1))

    def system(self) -> LowRankSystem:
        """The trapezoidal rule's."""
        return LowRankSystem.bilinear(self.rate(), pair(self.p), pair(self.b), pair(self.c), self.time_step())

    def kernel(self, length: int) -> Float[Tensor, "D L"]:
        """What the channels' outputs are a convolution with, for ``length`` tokens, by the paper's algorithm."""
        return cauchy_kernel(self.rate(), pair(self.p), pair(self.b), pair(self.c), self.time_step(), length)
