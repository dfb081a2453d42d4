"""The activation gate with a temperature: equations, and the invariance of the linear gate that it does not have."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.gates import ActivationDTS, activation_dts

D, E = 4, 5
ACTS = {
    "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "tanh": lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
}


def gate(**settings) -> ActivationDTS:
    made = ActivationDTS(D, E, **settings).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def tokens(n: int = 12) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("k", [None, 2, 3, 5])
def test_by_the_equations(act, k):
    g, x = gate(k=k, act=act), tokens()
    leaves = [p.detach().clone().requires_grad_() for p in (g.weight, g.bias, g.log_tau)]
    weight, bias, log_tau = leaves
    assert log_tau != 0
    expected = []
    for n in range(len(x)):
        scores = [ACTS[act](weight[e] @ x[n]) for e in range(E)]
        chosen = sorted(range(E), key=lambda e: -scores[e].item())[: k or E]
        kept = torch.stack([((scores[e] + bias[e]) / log_tau.exp()).exp() for e in chosen])
        row = torch.zeros(E, dtype=torch.float64)
        row[chosen] = kept / kept.sum()
        expected.append(row)
    expected = torch.stack(expected)
    dense = g(x).dense()
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-12)
    pull = torch.randn(len(x), E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((dense * pull).sum(), [g.weight, g.bias, g.log_tau])
    torch.testing.assert_close(found, torch.autograd.grad((expected * pull).sum(), leaves), rtol=0, atol=1e-12)


def test_all_experts_are_the_dense_gate():
    x = tokens()
    assert torch.equal(gate(k=E)(x).dense(), gate()(x).dense())


@pytest.mark.parametrize("act", [*ACTS, "linear"])
def test_scaling_scores_and_temperature_together_changes_the_gate_but_not_a_linear_one(act, monkeypatch):
    if act == "linear":
        monkeypatch.setitem(activation_dts._ACTS, "tanh", lambda z: z)
    g, x = gate(act="tanh" if act == "linear" else act), tokens()
    before = g(x).dense()
    with torch.no_grad():
        g.weight *= 3
        g.bias *= 3
        g.log_tau += math.log(3)
    change = (g(x).dense() - before).abs().max().item()
    assert change < 1e-12 if act == "linear" else change > 0.01


def test_a_constant_on_all_biases_changes_nothing():
    g, x = gate(), tokens()
    before = g(x).dense()
    with torch.no_grad():
        g.bias += 0.7
    torch.testing.assert_close(g(x).dense(), before, rtol=0, atol=1e-12)
    with torch.no_grad():
        g.weight += 0.7  # Not through the activation, though.
    assert (g(x).dense() - before).abs().max() > 0.05


def test_the_temperature_goes_from_uniform_to_one_expert():
    g, x = gate(), tokens()
    with torch.no_grad():
        g.log_tau.fill_(30.0)
        torch.testing.assert_close(g(x).dense(), torch.full((12, E), 1 / E, dtype=torch.float64), rtol=0, atol=1e-12)
        g.log_tau.fill_(-30.0)
        routing = g(x)
    assert g.tau > 0
    best = routing.logits.argmax(1)
    torch.testing.assert_close(routing.dense(), torch.nn.functional.one_hot(best, E).double(), rtol=0, atol=1e-12)


def test_the_start_and_float32_routing():
    torch.manual_seed(0)
    g = ActivationDTS(128, 64)
    assert g.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert g.tau.item() == 1
    assert not g.bias.any()
    g.bfloat16()
    assert g.tau.dtype == g(torch.randn(3, 128, dtype=torch.bfloat16)).weights.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"k": 6}, "k must be between 1 and the number of experts 5, got 6"), ({"k": 1}, "with k=1 the only weight is always 1"),
     ({"balance": "load"}, "load needs clean and scale")],
)  # fmt: skip
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        ActivationDTS(D, E, **settings)
