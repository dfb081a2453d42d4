"""MultinomialMoE against the probabilities written out, and the identity that slows its plain gate."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.func import functional_call, jacrev

from gatework.experts.multinomial_moe import MultinomialMoE


def model(seed=0, **settings):
    torch.manual_seed(seed)
    return MultinomialMoE(**({"d_in": 2, "experts": 3, "classes": 4} | settings)).double()


def points(n=12):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("transform", [None, "tanh", "sigmoid"])
def test_the_probabilities(transform):
    made, x = model(transform=transform).requires_grad_(False), points()
    moved = {None: lambda v: v, "tanh": math.tanh, "sigmoid": lambda v: 1 / (1 + math.exp(-v))}[transform]
    said = made.log_probs(x).detach().exp()
    for n, row in enumerate(x.tolist()):
        seen = [moved(v) for v in row]
        gate = [math.exp(sum(w * v for w, v in zip(made.gate_weight[i].tolist(), seen, strict=True)) + float(made.gate_bias[i]))
                for i in range(3)]  # fmt: skip
        for s in range(4):
            p = 0.0
            for i in range(3):
                logits = [float(made.intercept[i, c] + made.slope[i, c] @ x[n]) for c in range(3)] + [0.0]
                p += gate[i] / sum(gate) * math.exp(logits[s]) / sum(map(math.exp, logits))
            assert float(said[n, s]) == pytest.approx(p, abs=1e-12)
            assert float(made(x[n : n + 1], torch.tensor([s]))) == pytest.approx(math.log(p), abs=1e-12)


def test_the_gauge_of_the_gate():
    made, x = model(), points()
    moved = copy.deepcopy(made)
    with torch.no_grad():
        moved.gate_weight += torch.tensor([1.1, -0.4])
        moved.gate_bias -= 0.8
    torch.testing.assert_close(made.log_probs(x), moved.log_probs(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", [None, torch.tanh])
def test_a_change_of_the_gate_looks_like_one_of_the_expert(transform):
    """(iv): with u = exp(b1 M(x) + b0) softmax_s(c + d x): d2u/db1 dc_s = du/dd_s for M(x) = x; with a transformed gate the
    right side is M(x) du/dc_s, which is no derivative after d."""
    x = torch.tensor(0.7, dtype=torch.float64)
    seen = x if transform is None else transform(x)

    def u(p):
        return torch.exp(p[0] * seen + p[1]) * (p[2:4] + p[4:6] * x).softmax(0)[0]

    p = torch.tensor([0.3, -0.1, 0.5, 0.2, 0.9, -0.6], dtype=torch.float64)
    first, second = jacrev(u)(p), jacrev(jacrev(u))(p)
    torch.testing.assert_close(second[0, 2:4], seen * first[2:4], rtol=0, atol=1e-12)
    assert torch.allclose(second[0, 2:4], first[4:6], rtol=0, atol=1e-12) is (transform is None)


def test_gradients():
    made, x = model(transform="tanh"), points(4)
    names = [name for name, _ in made.named_parameters()]
    values = [p.detach().requires_grad_() for p in made.parameters()]
    y = torch.tensor([0, 3, 1, 2])
    assert torch.autograd.gradcheck(lambda *p: functional_call(made, dict(zip(names, p, strict=True)), (x, y)), values)


def test_samples_have_the_probabilities():
    made = model()
    x = points(1).expand(100_000, 2)
    shares = torch.bincount(made.sample(x, torch.Generator().manual_seed(0)), minlength=4) / len(x)
    torch.testing.assert_close(shares.double(), made.log_probs(x[:1])[0].detach().exp(), rtol=0, atol=0.006)


def test_fit_reaches_the_maximum():
    generator = torch.Generator().manual_seed(0)
    true = model(d_in=1, experts=2, classes=3)
    x = torch.rand(2000, 1, generator=generator, dtype=torch.float64) * 4 - 2
    y = true.sample(x, generator)
    fitted = copy.deepcopy(true)
    reached = fitted.fit(x, y, iterations=200)
    assert reached > float(true(x, y).detach().mean())
    assert reached == pytest.approx(float(fitted(x, y).detach().mean()))


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"experts": 0}, {"transform": "relu"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        model(**wrong)
