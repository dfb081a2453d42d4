"""The Switch balance loss against its equations."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError, Routing
from gatework.gates import Switch
from gatework.gates.base import switch_loss, top_k

E = 5


def routing(probs: torch.Tensor, k: int) -> Routing:
    experts = top_k(probs, k)
    return Routing(probs.gather(1, experts), experts, probs.shape[1], None, probs)


def random_probs(n: int, generator: torch.Generator) -> torch.Tensor:
    return torch.softmax(3 * torch.randn(n, E, dtype=torch.float64, generator=generator), 1)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_by_the_equations(k):
    probs = random_probs(8, torch.Generator().manual_seed(0))
    mask = torch.arange(8) % 3 != 0
    found = routing(probs, k)
    for given, real in ((None, range(8)), (mask, [n for n in range(8) if mask[n]])):
        if given is not None:
            found.weights = found.weights * given[:, None]
        expected = 0.0
        for e in range(E):
            f = sum(e in found.experts[n].tolist() for n in real) / (len(real) * k)
            expected += 0.02 * E * f * sum(probs[n, e].item() for n in real) / len(real)
        assert Switch(0.02)(found, given).item() == pytest.approx(expected, rel=1e-12)


def test_by_hand_with_an_empty_slot():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]], dtype=torch.float64)
    chosen = torch.tensor([[0, 1], [1, 2]])
    full = Routing(torch.ones(2, 2, dtype=torch.float64), chosen, 3, None, probs)
    assert Switch(1.0)(full).item() == pytest.approx(3 * (0.25 * 0.4 + 0.5 * 0.4 + 0.25 * 0.2))
    assert switch_loss(probs, chosen, None).item() == pytest.approx(Switch(1.0)(full).item())
    holed = Routing(torch.tensor([[0.7, 0.0], [0.6, 0.3]], dtype=torch.float64), chosen, 3, None, probs)
    assert Switch(1.0)(holed).item() == pytest.approx(3 * (0.4 + 0.4 + 0.2) / 3)


def test_the_weight_when_uniform_and_least_there():
    uniform = torch.full((E, E), 1 / E, dtype=torch.float64)
    even = Routing(uniform[:, :1], torch.arange(E)[:, None], E, None, uniform)
    assert Switch(0.1)(even).item() == pytest.approx(0.1)
    probs = random_probs(200, torch.Generator().manual_seed(3))
    skewed = (probs + torch.tensor([1.0, 0, 0, 0, 0])) / 2
    assert Switch(0.1)(routing(skewed, 2)).item() > 0.12


def test_the_gradient_goes_through_the_probabilities_alone():
    probs = random_probs(6, torch.Generator().manual_seed(1)).requires_grad_()
    found = routing(probs, 2)
    Switch(0.5)(found).backward()
    shares = torch.bincount(found.experts.flatten(), minlength=E).double() / found.experts.numel()
    torch.testing.assert_close(probs.grad, (0.5 * E * shares / 6).expand(6, E), rtol=0, atol=1e-15)


def test_nobody_real():
    probs = random_probs(3, torch.Generator().manual_seed(1))
    nothing = Routing(torch.zeros(3, 1, dtype=torch.float64), top_k(probs, 1), E, None, probs)
    assert Switch(1.0)(nothing, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_wrong_use():
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        Switch(-1.0)
    with pytest.raises(PartError, match="switch needs the probabilities of a routing, and this gate has none"):
        Switch()(Routing(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), 2))
