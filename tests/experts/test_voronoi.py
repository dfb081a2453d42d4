"""The Voronoi loss by hand, and its zero."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gatework.experts.gaussian_moe import GaussianMoE
from gatework.experts.multinomial_moe import MultinomialMoE
from gatework.experts.voronoi import Atoms, voronoi_loss


def atoms(bias, **values):
    made = {name: torch.tensor(value, dtype=torch.float64)[:, None] for name, value in values.items()}
    return Atoms(torch.tensor(bias, dtype=torch.float64), made, slow=("gate", "intercept"))


TRUE = {"bias": [0.0, 0.0], "gate": [0.0, 3.0], "slope": [1.0, -1.0], "intercept": [0.0, 2.0], "variance": [1.0, 0.5]}


def test_an_exact_fit_by_hand():
    """The first atom is right, so that the gauge is known; the second is off in every parameter."""
    fitted = atoms([0.0, 0.1], gate=[0.0, 3.3], slope=[1.0, -1.4], intercept=[0.0, 2.0], variance=[1.0, 0.5])
    found = voronoi_loss(fitted, atoms(**TRUE))
    # In the gauge of the first cell, and in that of the second, whichever is less.
    first = math.exp(0.1) * math.hypot(0.3, 0.4) + (math.exp(0.1) - 1)
    second = math.exp(-0.1) * 0.3 + 0.4 + (1 - math.exp(-0.1))
    assert found.loss == pytest.approx(min(first, second), abs=1e-12)
    assert found.cells.tolist() == [0, 1]
    assert found.errors["slope"] == pytest.approx(0.4 if second < first else math.exp(0.1) * 0.4, abs=1e-12)


def test_one_atom_too_many_by_hand():
    """Two atoms share the second true one, each with half its weight, apart by 0.2 in the intercept and 0.1 in the variance."""
    half = -math.log(2)
    split = {"intercept": [0.0, 2.2, 1.8], "variance": [1.0, 0.6, 0.4]}
    fitted = atoms([0.0, half, half], gate=[0.0, 3.0, 3.0], slope=[1.0, -1.0, -1.0], **split)
    plain, d2 = (voronoi_loss(fitted, atoms(**TRUE), overfitted) for overfitted in (False, True))
    assert plain.cells.tolist() == d2.cells.tolist() == [0, 1, 1]
    assert plain.loss == pytest.approx(math.hypot(0.2, 0.1), abs=1e-12)
    assert d2.loss == pytest.approx(0.2**4 + 0.1**2, abs=1e-12)
    assert d2.errors == pytest.approx({"gate": 0, "slope": 0, "intercept": 0.2, "variance": 0.1, "weight": 0}, abs=1e-12)


@pytest.mark.parametrize("make", [lambda: GaussianMoE(2, 3), lambda: MultinomialMoE(2, 3, 4)], ids=["gaussian", "multinomial"])
def test_zero_up_to_order_and_gauge_only(make):
    """(vi) of the specification."""
    torch.manual_seed(0)
    true = make().double()
    moved = copy.deepcopy(true)
    with torch.no_grad():
        for p in moved.parameters():
            p.copy_(p[torch.tensor([2, 0, 1])])
        moved.gate_weight += torch.tensor([0.8, -2.1])
        moved.gate_bias += 1.3
    assert voronoi_loss(moved.atoms(), true.atoms()).loss < 1e-12
    for name, _ in true.named_parameters():
        other = copy.deepcopy(moved)
        with torch.no_grad():
            getattr(other, name)[1] += 0.05
        assert voronoi_loss(other.atoms(), true.atoms()).loss > 0.01, name


def test_models_of_two_kinds_are_refused():
    with pytest.raises(ValueError, match="the fitted model has"):
        voronoi_loss(GaussianMoE(1, 2).atoms(), MultinomialMoE(1, 2, 3).atoms())
