"""The HiPPO-LegS matrix and its diagonalisations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatework.ops import hippo

FREQUENCIES = torch.logspace(-2, 5, 1500, dtype=torch.float64)


def norm(x: Tensor) -> float:
    return torch.linalg.matrix_norm(x, 2).item()


def unit(n: int) -> tuple[Tensor, Tensor]:
    """Input and output vectors of length 1."""
    b = hippo.legs(n)[1]
    c = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return (b / b.norm()).to(torch.complex128), (c / c.norm()).to(torch.complex128)


def transfer(n: int) -> Tensor:
    """c (i s - A)^-1 b at all frequencies, from the matrix itself."""
    b, c = unit(n)
    matrices = 1j * FREQUENCIES[:, None, None] * torch.eye(n) - hippo.legs(n)[0]
    return torch.linalg.solve(matrices, b.expand(len(matrices), -1)[..., None])[..., 0] @ c


def diagonal_transfer(rate: Tensor, weight: Tensor) -> Tensor:
    return (weight / (1j * FREQUENCIES[:, None] - rate)).sum(-1)


def error_of(e: Tensor) -> float:
    """The largest error of the transfer function at any frequency, after perturbing by ``e``."""
    b, c = unit(len(e))
    rate, inverse, vectors = hippo.perturb_then_diagonalise(e)
    return (diagonal_transfer(rate, (c @ vectors) * (inverse @ b)) - transfer(len(e))).abs().max().item()


def test_the_matrix():
    a, b = hippo.legs(3)
    r3, r5, r15 = math.sqrt(3), math.sqrt(5), math.sqrt(15)
    torch.testing.assert_close(a, torch.tensor([[-1, 0, 0], [-r3, -2, 0], [-r5, -r15, -3]], dtype=torch.float64))
    torch.testing.assert_close(b, torch.tensor([1, r3, r5], dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_normal_plus_low_rank(n):
    """V (Lambda - P~ P~*) V* = A with a unitary V, conjugates being implied; B~ = V* B, real and positive."""
    a, b = hippo.legs(n)
    rate, p, entering, half = hippo.normal_plus_low_rank(n)
    vectors = torch.cat([half, half.conj()], 1)
    rates, low_rank = torch.cat([rate, rate.conj()]), torch.cat([p, p.conj()])
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(n, dtype=torch.complex128), rtol=0, atol=1e-12)
    whole = vectors @ (rates.diag() - low_rank[:, None] * low_rank.conj()) @ vectors.mH
    torch.testing.assert_close(whole, a.to(whole.dtype), rtol=0, atol=1e-11 * n)
    torch.testing.assert_close(rate.real, torch.full_like(rate.real, -0.5))
    assert (rate.imag > 0).all()
    assert (rate.imag.diff() > 0).all()
    torch.testing.assert_close(entering, half.mH @ b.to(half.dtype), rtol=0, atol=1e-11)
    torch.testing.assert_close(entering.imag, torch.zeros_like(entering.imag), rtol=0, atol=1e-12)
    assert (entering.real > 0).all()
    torch.testing.assert_close(p, entering / math.sqrt(2))


@pytest.mark.parametrize("n", [0, 1, 7])
def test_conjugate_pairs_need_an_even_state(n):
    with pytest.raises(ValueError, match=f"even number of entries, got {n}"):
        hippo.normal_plus_low_rank(n)


@pytest.mark.parametrize("kind", ["optimised", "random"])
@pytest.mark.parametrize("n", [1, 5, 32])
def test_perturbing_is_backward_stable(kind, n):
    """V Lambda V^-1 - A = E to rounding, and E has the norm that was asked for."""
    torch.manual_seed(0)
    e = hippo.perturbation(kind, n, 1e-3)
    a = hippo.legs(n)[0]
    rate, inverse, vectors = hippo.perturb_then_diagonalise(e)
    torch.testing.assert_close((vectors * rate) @ inverse - a, e.to(rate.dtype), rtol=0, atol=1e-12 * norm(a))
    torch.testing.assert_close(inverse @ vectors, torch.eye(n, dtype=rate.dtype), rtol=0, atol=1e-9)
    assert norm(e) <= 1e-3 * norm(a) * (1 + 1e-12)
    assert norm(e) == pytest.approx(1e-3 * norm(a)) or kind == "optimised"
    assert rate.real.max() < hippo.STABLE
    torch.testing.assert_close(torch.linalg.vector_norm(inverse, dim=1), torch.linalg.vector_norm(vectors, dim=0))


def test_the_low_rank_part_as_perturbation_is_s4d_legs():
    n = 16
    p = hippo.legs(n)[1] / math.sqrt(2)
    rate, inverse, vectors = hippo.perturb_then_diagonalise(p[:, None] * p)
    half, _, _, half_vectors = hippo.normal_plus_low_rank(n)
    both = torch.cat([half.conj().flip(0), half])
    torch.testing.assert_close(rate, both, rtol=0, atol=1e-10)
    b, c = unit(n)
    weight = (c @ half_vectors) * (half_vectors.mH @ b)
    ours = diagonal_transfer(rate, (c @ vectors) * (inverse @ b))
    s4d = diagonal_transfer(both, torch.cat([weight.conj().flip(0), weight]))
    torch.testing.assert_close(ours, s4d, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [16, 32])
def test_transfer_functions_stay_close_at_every_frequency(n):
    """The paper's bound, (2 ln N + 4) epsilon for vectors of length 1, and S4D's spike in comparison."""
    torch.manual_seed(1)
    bound = 2 * math.log(n) + 4
    half, _, _, vectors = hippo.normal_plus_low_rank(n)
    b, c = unit(n)
    weight = (c @ vectors) * (vectors.mH @ b) / 2  # Half of V* B, as theory wants it.
    s4d = diagonal_transfer(torch.cat([half, half.conj()]), torch.cat([weight, weight.conj()]))
    spike = (s4d - transfer(n)).abs().max().item()
    assert spike > transfer(n).abs().max()
    for kind in ("optimised", "random"):
        for epsilon in (1e-4, 1e-3):
            error = error_of(hippo.perturbation(kind, n, epsilon))
            assert error < bound * epsilon
            assert error < spike / 10


def test_the_error_is_linear_in_the_perturbation():
    torch.manual_seed(2)
    e = hippo.random_perturbation(16, 1e-5)
    whole, half = error_of(e), error_of(e / 2)
    assert whole / half == pytest.approx(2, rel=0.02)


def test_optimised_perturbations_are_better_conditioned():
    torch.manual_seed(3)
    conditions = {
        kind: torch.linalg.cond(hippo.perturb_then_diagonalise(hippo.perturbation(kind, 32, 1e-3))[2]).item()
        for kind in ("optimised", "random")
    }
    assert conditions["optimised"] < conditions["random"] / 3
    assert hippo.optimised_perturbation(32, 1e-3) is hippo.optimised_perturbation(32, 1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("optimised", 0, 0.1), "d_state must be at least 1"),
        (("random", 8, 0.0), "epsilon positive and finite, got 8 and 0.0"),
        (("random", 8, math.nan), "got 8 and nan"),
        (("optimised", 8, math.inf), "got 8 and inf"),
        (("best", 8, 0.1), "'optimised' or 'random', not 'best'"),
    ],
)
def test_perturbations_that_there_are_not(given, message):
    with pytest.raises(ValueError, match=message):
        hippo.perturbation(*given)


def test_an_unstable_perturbation_is_refused():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"a perturbation of 1\.0e-01 of the matrix makes it unstable"):
        hippo.perturb_then_diagonalise(hippo.random_perturbation(32, 0.1))
