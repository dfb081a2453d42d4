"""``S4PTD``: S4D that starts from HiPPO-LegS itself, diagonalised after a small perturbation.

Yu, Nigmetov, Morozov, Mahoney and Erichson, Robustifying State-space Models for Long Sequences via Approximate Diagonalization,
2023, arXiv 2310.01698. S4D starts from HiPPO-LegS without its low-rank part, whose transfer function has spikes where that of
HiPPO-LegS has none: an input with a little noise at their frequencies is drowned. Here (section 4 of the paper)

    A + E = V diag(lambda) V^-1    b = V^-1 B    c = C V    |E| <= epsilon |A| (spectral norms)

so the transfer function differs from HiPPO-LegS's by at most (2 ln N + 4) epsilon |C| |B| or so at any frequency. The layer is
S4D's, with zero-order hold:

    h_n' = lambda_n h_n + b_n u    o = Re sum_n c_n h_n    y = GLU(W gelu(o + skip u) + bias)

A real E leaves some eigenvalues real, so the modes are no conjugate pairs: all N complex ones are kept, without S4D's factor 2.

What the paper leaves open, and our choices: E minimises log cond(V) on the ball of its norm
(:func:`gatework.ops.hippo.optimised_perturbation`; the paper minimises cond(V) + gamma |E| by gradient descent and gives no more
details), and is the same for all layers. c = C V with a standard normal real C, so that the layer is HiPPO-LegS read out by C; a
complex normal c, as in S4D, would be multiplied by entries of b as large as cond(V). Columns of V are as long as the rows of
V^-1, so b and c are of one size. With N = 64 and epsilon = 0.003, cond(V) is 60, against some 2000 for a random E of a third of
that norm.
"""

from __future__ import annotations

from typing import Literal

import torch

from gatework.core.registry import register
from gatework.mixers.state_space import DiagonalMixer
from gatework.ops import hippo


@register("s4_ptd", paper="ptd")
class S4PTD(DiagonalMixer):
    """S4D that starts from HiPPO-LegS, diagonalised after a perturbation.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``2 * d_model * d_state``
    real numbers whatever the length.

    Args:
        d_model: width of the stream, and number of systems.
        d_state: N, complex modes per channel.
        epsilon: norm of the perturbation, as a share of the matrix's.
        perturbation: "optimised" for the best conditioned eigenvectors, or "random" (Gaussian), for which ``epsilon`` must be
            smaller (0.001 for N = 64), or eigenvalues become unstable.
        dt_min, dt_max: the channels' time steps are drawn log-uniformly between these.

    Initialisation: see the module for the system; skip normal, PyTorch's default for the output projection. The first layer of an
    ``epsilon`` and ``d_state`` finds E in half a second, the others take it over.

    Decoding, padding, packed documents, ``keep`` and training are as in :class:`~gatework.mixers.s4d.S4D`.

    Raises:
        ValueError: for an unstable perturbation, an ``epsilon`` that is not positive, or unless 0 < dt_min <= dt_max.
    """

    copies = 1

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        epsilon: float = 0.003,
        perturbation: Literal["optimised", "random"] = "optimised",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
    ) -> None:
        rate, inverse, vectors = hippo.perturb_then_diagonalise(hippo.perturbation(perturbation, d_state, epsilon))
        b = inverse @ hippo.legs(d_state)[1].to(inverse.dtype)
        c = torch.randn(d_model, d_state, device="cpu").to(vectors.dtype) @ vectors
        super().__init__(d_model, rate, b, c, dt_min, dt_max)
        self.epsilon, self.perturbation = epsilon, perturbation

    def extra_repr(self) -> str:
        """The settings."""
        return f"{super().extra_repr()}, epsilon={self.epsilon}, perturbation={self.perturbation}"
