"""GaussianMoE against the density written out, and the identities behind its rates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.func import functional_call, jacrev

from gatework.experts.gaussian_moe import GaussianMoE

VARIANTS = [
    {}, {"top_k": 2}, {"top_k": 1}, {"temperature": True}, {"activation": "sigmoid", "temperature": True}, {"activation": "tanh"},
    {"activation": "gelu", "top_k": 2},
]  # fmt: skip


def model(seed=0, experts=3, d_in=2, **settings):
    torch.manual_seed(seed)
    made = GaussianMoE(d_in, experts, **settings).double()
    with torch.no_grad():
        made.log_variance.normal_(0, 0.5)
        if made.log_tau is not None:
            made.log_tau.fill_(0.4)
    return made


def plain(made):
    return copy.deepcopy(made).requires_grad_(False)


def data(n=20, d=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, torch.randn(n, generator=generator, dtype=torch.float64)


def density(made, x, y):
    """p(y | x) for one point, from the equations."""
    act = {None: lambda s: s, "sigmoid": lambda s: 1 / (1 + math.exp(-s)), "tanh": math.tanh}
    act["gelu"] = lambda s: s * 0.5 * (1 + math.erf(s / math.sqrt(2)))
    tau = 1.0 if made.log_tau is None else math.exp(float(made.log_tau))
    scores = [act[made.activation](sum(float(w) * float(v) for w, v in zip(row, x, strict=True))) for row in made.gate_weight]
    kept = sorted(range(made.experts), key=lambda i: (-scores[i], i))[: made.top_k or made.experts]
    weights = {i: math.exp((scores[i] + float(made.gate_bias[i])) / tau) for i in kept}
    total = sum(weights.values())
    p = 0.0
    for i in kept:
        mean = float(made.slope[i] @ x + made.intercept[i])
        variance = math.exp(float(made.log_variance[i]))
        p += weights[i] / total * math.exp(-((float(y) - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    return p


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_density(settings):
    made = plain(model(**settings))
    x, y = data()
    wanted = torch.tensor([math.log(density(made, *point)) for point in zip(x, y, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(made(x, y), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_it_integrates_to_one(settings):
    made, (x, _) = model(**settings), data(5)
    y = torch.linspace(-40, 40, 40001, dtype=torch.float64)
    with torch.no_grad():
        for row in x:
            total = torch.trapezoid(made(row.expand(len(y), -1), y).exp(), y)
            assert float(total) == pytest.approx(1, abs=1e-9)


def test_all_experts_kept_is_dense():
    dense, kept = model(), model(top_k=3)
    assert torch.equal(dense(*data()), kept(*data()))


def test_adding_the_same_to_all_gates_changes_nothing():
    """(i) of the specification: the gauge of the softmax; with an activation in between it is none for b1."""
    x, y = data()
    for settings, moves in (({}, False), ({"top_k": 2}, False), ({"activation": "sigmoid"}, True)):
        made = model(**settings)
        moved = copy.deepcopy(made)
        with torch.no_grad():
            moved.gate_weight += torch.tensor([0.7, -0.3])
            moved.gate_bias += 1.9
        assert torch.allclose(made(x, y), moved(x, y), rtol=0, atol=1e-12) is not moves


def test_the_temperature_is_not_identified_with_a_linear_gate():
    """(ii): (c b1, c b0, c tau) is the same model, so the Fisher matrix is singular there; not so with an activation."""
    x, y = data(400)
    for activation, singular in ((None, True), ("sigmoid", False)):
        made = model(activation=activation, temperature=True)
        scaled = copy.deepcopy(made)
        with torch.no_grad():
            scaled.gate_weight *= 1.7
            scaled.gate_bias *= 1.7
            scaled.log_tau += math.log(1.7)
        assert torch.allclose(made(x, y), scaled(x, y), rtol=0, atol=1e-12) is singular
        names = ("gate_weight", "gate_bias", "log_tau")
        values = {name: getattr(made, name).detach() for name in names}
        scores = jacrev(lambda v, made=made: functional_call(made, v, (x, y)))(values)
        rows = torch.cat([scores[name].reshape(len(x), -1) for name in names], 1)
        direction = torch.cat([values["gate_weight"].flatten(), values["gate_bias"], torch.ones(1, dtype=torch.float64)])
        along = float((rows.detach() @ direction).square().mean())  # The Fisher information along c.
        assert (along < 1e-24) if singular else (along > 1e-4)


def test_partial_differential_equations_of_the_gate_and_the_experts():
    """(iii): with u = exp(b1 x + b0) N(y; a x + b, v): d2u/db1 db = du/da and d2u/db^2 = 2 du/dv. This is why an expert too
    many makes b1, b and a, v converge slowly."""

    def u(p, x, y):
        b1, b0, a, b, v = p.unbind()
        return torch.exp(b1 * x + b0) * torch.exp(-((y - a * x - b) ** 2) / (2 * v)) / torch.sqrt(2 * math.pi * v)

    for x, y in ((0.3, 0.9), (-1.2, 0.1)):
        p = torch.tensor([0.4, -0.2, 0.7, 0.1, 0.6], dtype=torch.float64)
        first, second = jacrev(u)(p, x, y), jacrev(jacrev(u))(p, x, y)
        torch.testing.assert_close(second[0, 3], first[2], rtol=0, atol=1e-12)
        torch.testing.assert_close(second[3, 3], 2 * first[4], rtol=0, atol=1e-12)


def test_gradients():
    made = model(activation="tanh", temperature=True)
    x, y = data(4)
    values = [p.detach().requires_grad_() for p in made.parameters()]
    names = [name for name, _ in made.named_parameters()]
    assert torch.autograd.gradcheck(lambda *p: functional_call(made, dict(zip(names, p, strict=True)), (x, y)), values)


def test_samples_have_the_density():
    made = model(d_in=1)
    x = torch.full((200_000, 1), 0.6, dtype=torch.float64)
    y = made.sample(x, torch.Generator().manual_seed(0))
    grid = torch.linspace(-3, 3, 13, dtype=torch.float64)
    fine = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    with torch.no_grad():
        p = made(x[:1].expand(len(fine), 1), fine).exp()
    for edge in grid:
        wanted = torch.trapezoid(torch.where(fine <= edge, p, 0), fine)
        assert float((y <= edge).double().mean()) == pytest.approx(float(wanted), abs=0.005)


def test_fit_reaches_the_maximum():
    true = model(seed=3, experts=2, d_in=1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(3000, 1, generator=generator, dtype=torch.float64) * 2 - 1
    y = true.sample(x, generator)
    fitted = copy.deepcopy(true)
    with torch.no_grad():
        for p in fitted.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    reached = fitted.fit(x, y)
    assert reached > float(true(x, y).detach().mean())
    assert reached == pytest.approx(float(fitted(x, y).detach().mean()))
    gradients = torch.autograd.grad(fitted(x, y).mean(), list(fitted.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-7


@pytest.mark.parametrize(
    "wrong", [{"d_in": 0, "experts": 2}, {"d_in": 1, "experts": 2, "top_k": 3}, {"d_in": 1, "experts": 2, "activation": "relu"}]
)
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises((ValueError, TypeError)):
        GaussianMoE(**wrong)
