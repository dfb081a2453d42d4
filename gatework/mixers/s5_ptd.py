"""``S5PTD``: S5 that starts from HiPPO-LegS itself, diagonalised after a small perturbation.

Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long Sequences via Approximate Diagonalization,
2023, arXiv 2310.01698; :mod:`gatework.mixers.s4_ptd` has the method and our choice of the perturbation E. The layer is S5's, of P
complex modes:

    A + E = V diag(lambda) V^-1    b = V^-1 B    c = C V
    h_t = e^z h_{t-1} + step (e^z - 1)/z b u_t    z = step lambda, a step per mode
    y = g * sigmoid(W g + bias)    g = gelu(Re(c h) + skip * u)

The modes are no conjugate pairs: all P are kept, without S5's factor 2. As in S5, each mode draws a time step of its own, so the
system is exactly the perturbed HiPPO-LegS only where ``dt_min`` = ``dt_max``.
"""

from __future__ import annotations

from typing import Literal

from gatework.core.registry import register
from gatework.mixers.state_space import SharedStateMixer, shared_weights
from gatework.ops import hippo


@register("s5_ptd", paper="ptd")
class S5PTD(SharedStateMixer):
    """S5 that starts from HiPPO-LegS, diagonalised after a perturbation.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``2 * d_state`` real numbers
    whatever the length.

    Args:
        d_model: width of the stream.
        d_state: P, complex modes.
        hippo_blocks: into how many equal blocks the state is divided at the start, each a HiPPO-LegS matrix of its size.
        epsilon: norm of the perturbation, as a share of the matrix's.
        perturbation: "optimised" for the best conditioned eigenvectors, or "random" (Gaussian, the same in all blocks), for which
            ``epsilon`` must be smaller (0.001 for 64 modes), or eigenvalues become unstable.
        dt_min, dt_max: the modes' time steps are drawn log-uniformly between these.

    Initialisation: see the module for the system; B real normal of variance 1 / d_model, C complex normal of variance 2 /
    d_state, skip normal, PyTorch's default for the gate.

    Decoding, padding, packed documents, ``keep`` and training are as in :class:`~gatework.mixers.s5.S5`.

    Raises:
        ValueError: if ``d_state`` is not divisible into ``hippo_blocks`` blocks, for an unstable perturbation, an ``epsilon``
            that is not positive, or unless 0 < dt_min <= dt_max.
    """

    copies = 1

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        hippo_blocks: int = 1,
        epsilon: float = 0.003,
        perturbation: Literal["optimised", "random"] = "optimised",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        if hippo_blocks < 1 or d_state % hippo_blocks:
            raise ValueError(f"d_state {d_state} is not divisible into hippo_blocks {hippo_blocks}")
        size = d_state // hippo_blocks
        rate, inverse, vectors = hippo.perturb_then_diagonalise(hippo.perturbation(perturbation, size, epsilon))
        b, c = shared_weights(d_model, hippo_blocks, inverse, vectors)
        super().__init__(d_model, rate.repeat(hippo_blocks), b, c, dt_min, dt_max)
        self.hippo_blocks, self.epsilon, self.perturbation = hippo_blocks, epsilon, perturbation

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"{super().extra_repr()}, hippo_blocks={self.hippo_blocks}"
        return f"{shown}, epsilon={self.epsilon}, perturbation={self.perturbation}"
