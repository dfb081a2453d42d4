"""The load loss against appendix A of the paper."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import PartError, Routing
from gatework.gates import Load
from gatework.gates.base import top_k
from gatework.gates.load import expected_load

N, E = 7, 5


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    clean, noise, raw = (torch.randn(N, E, dtype=torch.float64, generator=generator) for _ in range(3))
    scale = 0.2 + raw.abs()
    return clean, scale, clean + scale * noise


def reference(clean, scale, noisy, k, real):
    load = [0.0] * E
    for n in real:
        for e in range(E):
            threshold = sorted((noisy[n, j].item() for j in range(E) if j != e), reverse=True)[k - 1]
            z = (clean[n, e].item() - threshold) / scale[n, e].item()
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return load


@pytest.mark.parametrize("k", [1, 2, 4])
def test_by_the_equations(k):
    clean, scale, noisy = drawn()
    routing = Routing(torch.ones(N, k, dtype=torch.float64), top_k(noisy, k), E, noisy)
    mask = torch.arange(N) % 3 != 1
    for given, real in ((None, range(N)), (mask, [n for n in range(N) if mask[n]])):
        load = reference(clean, scale, noisy, k, real)
        mean = sum(load) / E
        expected = 0.3 * sum((value - mean) ** 2 for value in load) / E / mean**2
        loss = Load(0.3)(routing, given, clean=clean, scale=scale)
        assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_zero_logits_have_no_loss():
    zeros = torch.zeros(N, E, dtype=torch.float64)
    routing = Routing(torch.ones(N, 2, dtype=torch.float64), top_k(zeros, 2), E, zeros)
    assert Load(1.0)(routing, clean=zeros, scale=torch.ones_like(zeros)).item() == pytest.approx(0, abs=1e-20)


def test_expected_load_is_the_expected_number_of_choices():
    clean, scale, _ = drawn()
    generator = torch.Generator().manual_seed(2)
    total, chosen, draws = 0.0, torch.zeros(E, dtype=torch.float64), 4000
    for _ in range(draws):
        h = clean + scale * torch.randn(clean.shape, dtype=torch.float64, generator=generator)
        total = total + expected_load(clean, h, scale, 2) / draws
        chosen += torch.bincount(h.topk(2).indices.flatten(), minlength=E) / draws
    assert total.sum().item() == pytest.approx(2 * N, rel=0.02)
    torch.testing.assert_close(total, chosen, rtol=0.05, atol=0.05)


def test_all_chosen_have_no_loss():
    clean, scale, noisy = drawn()
    routing = Routing(torch.ones(N, E, dtype=torch.float64), top_k(noisy, E), E, noisy)
    assert Load()(routing, clean=clean, scale=scale) is None


def test_gradients():
    clean, scale, noisy = (t.requires_grad_() for t in drawn())
    routing = lambda h: Routing(torch.ones(N, 2, dtype=torch.float64), top_k(h, 2), E, h)
    assert torch.autograd.gradcheck(lambda c, s, h: Load(1.0)(routing(h), clean=c, scale=s), (clean, scale, noisy))


def test_wrong_use():
    with pytest.raises(ValueError, match="weight must be at least 0"):
        Load(-1.0)
    with pytest.raises(PartError, match="load needs the noisy logits of a routing, clean and scale: what noisy_topk gives"):
        Load()(Routing(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), 2))
