"""The HiPPO-LegS matrix and the ways to diagonalise it that state-space layers start from; all in float64 on the CPU.

    A_nk = -sqrt((2n + 1)(2k + 1)) for n > k, -(n + 1) for n = k, 0 for n < k        B_n = sqrt(2n + 1)

makes the state of x' = A x + B u the coefficients of the input's history in Legendre polynomials (Gu et al., HiPPO: Recurrent
Memory with Optimal Polynomial Projections, 2020, arXiv 2008.07669).

A itself cannot be diagonalised in practice: it is so far from normal that the condition number of its eigenvectors grows as 2^N.
Two ways around that:

- **Normal plus low rank** (Gu et al., Efficiently Modeling Long Sequences with Structured State Spaces, 2021, arXiv 2111.00396):
  with P_n = sqrt(n + 1/2), A + P P^T is -1/2 plus a skew-symmetric matrix, so A = V (Lambda - P~ P~*) V* with a unitary V,
  Re Lambda = -1/2, P~ = V* P.
- **Perturb, then diagonalise** (Yu et al., Robustifying State-space Models for Long Sequences via Approximate Diagonalization,
  2023, arXiv 2310.01698): A + E = V Lambda V^-1 with a small E, |E| = epsilon |A|. At every frequency the transfer function
  c (i s - A)^-1 b, for c and b of length 1, changes by at most (2 ln N + 4) epsilon or so. That of Lambda and V from the form above
  without its low-rank part, which is E = P P^T and not small, has spikes.
"""

from __future__ import annotations

import functools
import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

#: Eigenvalues of a perturbed matrix have real parts below this.
STABLE = -1e-4


def legs(n: int) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N"]]:
    """The matrix A and the vector B of HiPPO-LegS with ``n`` states."""
    index = torch.arange(n, dtype=torch.float64, device="cpu")
    root = (2 * index + 1).sqrt()
    return -(root[:, None] * root).tril(-1) - (index + 1).diag(), root


def normal_plus_low_rank(
    n: int,
) -> tuple[Complex[Tensor, "N2"], Complex[Tensor, "N2"], Complex[Tensor, "N2"], Complex[Tensor, "N N2"]]:
    """Lambda, P~, B~ and V of HiPPO-LegS with ``n`` states, of each conjugate pair the half with Im Lambda > 0, ascending.

    The whole is that half beside its conjugate: A = 2 Re(V Lambda V*) - P P^T. An eigenvector's phase is arbitrary; here it makes
    B~ = V* B real and positive, and with it P~ = B~ / sqrt(2).

    Raises:
        ValueError: if ``n`` is odd, since the eigenvalues then are no pairs.
    """
    if n < 2 or n % 2:
        raise ValueError(f"a state of conjugate pairs has an even number of entries, got {n}")
    a, b = legs(n)
    # A + P P^T + 1/2 is skew-symmetric, so times -i it is Hermitian.
    skew = a + b[:, None] * b / 2 + torch.eye(n, dtype=torch.float64, device="cpu") / 2
    frequency, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    frequency, vectors = frequency[n // 2 :], vectors[:, n // 2 :]
    entering = vectors.mH @ b.to(vectors.dtype)
    vectors = vectors * (entering / entering.abs())
    entering = vectors.mH @ b.to(vectors.dtype)
    return torch.complex(torch.full_like(frequency, -0.5), frequency), entering * 0.5**0.5, entering, vectors


def random_perturbation(n: int, epsilon: float) -> Float[Tensor, "N N"]:
    """A Gaussian matrix of spectral norm ``epsilon`` |A|, drawn from the default generator."""
    e = torch.randn(n, n, dtype=torch.float64, device="cpu")
    return e * (epsilon * _norm(legs(n)[0]) / _norm(e))


@functools.lru_cache(maxsize=32)
def optimised_perturbation(n: int, epsilon: float, steps: int = 100) -> Float[Tensor, "N N"]:
    """The matrix of at most the spectral norm ``epsilon`` |A| whose sum with A has the best conditioned eigenvectors.

    Adam for ``steps`` steps on log cond(V), on the ball of that norm, from a fixed Gaussian matrix on its surface; eigenvalues
    whose real part comes above -1/4 are pushed back. The same arguments give the same matrix, which is kept: do not write into it.
    """
    a = legs(n)[0]
    bound = epsilon * _norm(a)
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.enable_grad():
        e = torch.randn(n, n, dtype=torch.float64, device="cpu", generator=generator)
        e = (e * (bound / _norm(e))).requires_grad_()
        optimizer = torch.optim.Adam([e], lr=float(bound) * 0.1 / n**0.5)
        for _ in range(steps):
            rate, vectors = torch.linalg.eig(a + e)
            loss = (_norm(vectors) * _norm(torch.linalg.inv(vectors))).log() + (rate.real + 0.25).relu().sum()
            (e.grad,) = torch.autograd.grad(loss, e)
            optimizer.step()
            with torch.no_grad():
                e *= (bound / _norm(e)).clamp(max=1)
    return e.detach()


def perturbation(kind: str, n: int, epsilon: float) -> Float[Tensor, "N N"]:
    """The perturbation E of HiPPO-LegS by name, "optimised" or "random".

    Raises:
        ValueError: for another name, no states, or an ``epsilon`` that is not positive and finite.
    """
    if n < 1 or not 0 < epsilon < math.inf:
        raise ValueError(f"d_state must be at least 1 and epsilon positive and finite, got {n} and {epsilon}")
    if kind not in ("optimised", "random"):
        raise ValueError(f"perturbation is 'optimised' or 'random', not {kind!r}")
    return optimised_perturbation(n, epsilon) if kind == "optimised" else random_perturbation(n, epsilon)


def perturb_then_diagonalise(
    e: Float[Tensor, "N N"],
) -> tuple[Complex[Tensor, "N"], Complex[Tensor, "N N"], Complex[Tensor, "N N"]]:
    """Lambda, V^-1 and V with A + E = V Lambda V^-1 for HiPPO-LegS, ordered by Im Lambda.

    Each column of V is as long as its row of V^-1, of all scalings the one with the least Frobenius condition number. A real E
    leaves some eigenvalues real, so they are no conjugate pairs to be halved: all N are returned.

    Raises:
        ValueError: where A + E is not stable.
    """
    a, _ = legs(len(e))
    rate, vectors = torch.linalg.eig(a + e)
    if rate.real.max() > STABLE:
        size = float(_norm(e) / _norm(a))
        raise ValueError(f"a perturbation of {size:.1e} of the matrix makes it unstable: take a smaller epsilon")
    order = rate.imag.argsort()
    rate, vectors = rate[order], vectors[:, order]
    inverse = torch.linalg.inv(vectors)
    scale = (torch.linalg.vector_norm(inverse, dim=1) / torch.linalg.vector_norm(vectors, dim=0)).sqrt()
    return rate, inverse / scale[:, None], vectors * scale


def _norm(x: Tensor) -> Tensor:
    """The spectral norm."""
    return torch.linalg.matrix_norm(x, 2)
