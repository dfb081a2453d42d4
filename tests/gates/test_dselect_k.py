"""DSelect-k against a loop over tokens, selectors and bits, and its promises."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import losses, metrics
from gatework.core.cost import count_flops
from gatework.experts import MoE
from gatework.gates import DSelectK
from gatework.ops.smooth_step import smooth_step

D = 6


def tokens(n: int = 9) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gate(experts: int = 8, spread: float = 0.4, **settings) -> DSelectK:
    torch.manual_seed(0)
    made = DSelectK(D, experts, **settings).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=spread)
    return made


def step(z, gamma):
    if z <= -gamma / 2:
        return 0 * z
    if z >= gamma / 2:
        return 0 * z + 1
    return -2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5


def reference(g: DSelectK, x: torch.Tensor):
    """The equations token by token: weights, entropy and the loss of the codes."""
    k, experts, m = g.selectors, g.n_experts, math.ceil(math.log2(g.n_experts))
    rows, entropies, codes = [], [], []
    for t in x:
        z = (g.code_bias + (0 if g.static else g.code_weight @ t)).view(k, m)
        a = g.mix_bias + (0 if g.static else g.mix_weight @ t) if k > 1 else torch.zeros(1, dtype=t.dtype)
        share = a.exp() / a.exp().sum()
        q = [torch.zeros((), dtype=t.dtype) for _ in range(experts)]
        entropy, code = 0, 0
        for j in range(k):
            reached = []
            for e in range(experts):
                r = torch.ones((), dtype=t.dtype)
                for i, bit in enumerate(format(e, f"0{m}b")):
                    s = step(z[j, i], g.gamma)
                    r = r * (s if bit == "1" else 1 - s)
                q[e] = q[e] + share[j] * r
                entropy = entropy - r * torch.log(r + 1e-6)
                reached.append(r)
            code = code + 1 / sum(reached).clamp(min=1e-6)
        rows.append(torch.stack(q))
        entropies.append(entropy)
        codes.append(code)
    return torch.stack(rows), torch.stack(entropies).mean(), torch.stack(codes).mean()


@pytest.mark.parametrize(
    "settings",
    [{}, {"experts": 6, "k": 3}, {"k": 1, "gamma": 2.0}, {"static": True}, {"static": True, "experts": 5, "k": 1}, {"experts": 2}],
    ids=str,
)
def test_equals_the_equations_with_all_gradients(settings):
    g, x = gate(entropy=0.3, **settings), tokens().requires_grad_()
    got, said = g(x).dense(), losses(g)
    wanted, entropy, codes = reference(g, x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(said["entropy"], 0.3 * entropy, rtol=0, atol=1e-12)
    power_of_2 = g.n_experts & (g.n_experts - 1) == 0
    assert ("codes" in said) == (not power_of_2)
    mine, theirs = got.square().sum() + said["entropy"], wanted.square().sum() + 0.3 * entropy
    if not power_of_2:
        torch.testing.assert_close(said["codes"], codes, rtol=0, atol=1e-10)
        mine, theirs = mine + said["codes"], theirs + codes
    leaves = [*g.parameters(), *([] if g.static else [x])]
    pairs = zip(torch.autograd.grad(mine, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_smooth_step():
    for gamma in (0.7, 1.0, 3.0):
        z = torch.linspace(-gamma, gamma, 41, dtype=torch.float64, requires_grad=True)
        s = smooth_step(z, gamma)
        torch.testing.assert_close(s, torch.stack([step(v, gamma) for v in z]), rtol=0, atol=1e-15)
        torch.testing.assert_close(s + smooth_step(-z, gamma), torch.ones_like(s), rtol=0, atol=1e-15)
        (slope,) = torch.autograd.grad(s.sum(), z)
        assert slope[20].item() == pytest.approx(3 / (2 * gamma))
        outside = z.detach().abs() >= gamma / 2
        assert outside.sum() == 22
        assert not slope[outside].any()
        assert set(s[outside].tolist()) == {0.0, 1.0}
        assert torch.autograd.gradcheck(lambda v, gamma=gamma: smooth_step(v, gamma), z)
    near = torch.linspace(-0.5, 0.5, 100_001)  # Rounding in float32 makes no negative share.
    assert smooth_step(near).min() >= 0
    assert smooth_step(-near).min() >= 0


def test_weights_sum_to_one_where_every_code_is_an_expert():
    x = tokens(50)
    torch.testing.assert_close(gate(8)(x).dense().sum(1), torch.ones(50, dtype=torch.float64), rtol=0, atol=1e-12)
    sums = gate(5)(x).dense().sum(1)
    assert sums.max() <= 1 + 1e-12
    assert sums.min() < 0.99


def test_two_experts_and_one_selector():
    g, x = gate(2, k=1), tokens()
    s = smooth_step(x @ g.code_weight[0] + g.code_bias[0])
    torch.testing.assert_close(g(x).dense(), torch.stack([1 - s, s], 1), rtol=0, atol=1e-15)


def test_decided_selectors_are_one_hot_and_stay():
    g, x = gate(k=3, static=True), tokens()
    with torch.no_grad():
        g.code_bias.copy_(torch.tensor([0.5, -0.5, 0.9, -2, -0.5, 0.5, 0.5, -3, 0.5]))  # 101, 001, 101
    routing = g(x)
    share = g.mix_bias.softmax(0)
    assert routing.weights.shape[1] == 2
    wanted = torch.zeros(8, dtype=torch.float64)
    wanted[5], wanted[1] = share[0] + share[2], share[1]
    torch.testing.assert_close(routing.dense(), wanted.expand(9, -1), rtol=0, atol=1e-15)
    (routing.dense() * torch.randn(9, 8)).sum().backward()
    assert not g.code_bias.grad.any()
    assert g.mix_bias.grad.any()


def test_what_is_not_chosen_is_not_run():
    x = tokens(40)
    layer = MoE(D, d_ff=5, experts=8, gate="dselect_k(k=2)").double()

    def flops():
        with count_flops() as count:
            layer(x)
        return count.total

    per_row, router = 2 * D * 3 * 5, 40 * 2 * D * (2 * 3 + 2)
    assert flops() == 40 * 8 * per_row + router
    assert metrics(layer)["gate.chosen"] == 8
    with torch.no_grad():
        layer.gate.code_weight.mul_(100)
    routing = layer.gate(x)
    assert 2 < routing.counts().sum() / 40 < 6
    assert flops() == routing.counts().sum() * per_row + router
    with torch.no_grad():
        layer.gate.code_weight.mul_(1e6)
    assert flops() <= 40 * 2 * per_row + router
    assert metrics(layer)["gate.chosen"] <= 2


def test_a_static_gate_does_not_look_at_the_tokens():
    g = gate(static=True)
    dense = g(tokens(4)).dense()
    assert torch.equal(dense, dense[:1].expand(4, -1))
    assert torch.equal(g(-3 * tokens(4)).dense(), dense)
    assert sum(p.numel() for p in g.parameters()) == 2 * 3 + 2


def test_the_start_is_dense_and_nearly_uniform():
    torch.manual_seed(0)
    g = DSelectK(64, 8, gamma=3.0)
    assert g.code_weight.abs().max() <= 0.03
    assert g.code_weight.std().item() == pytest.approx(0.03 / 3**0.5, rel=0.1)
    assert g.mix_weight.abs().max() <= 0.05
    static = DSelectK(64, 8, static=True)
    torch.testing.assert_close(static(torch.zeros(1, 64)).dense(), torch.full((1, 8), 1 / 8), rtol=0, atol=0.01)


def test_padding_enters_no_loss():
    g, x = gate(6, entropy=1.0), tokens()
    mask = torch.arange(9) % 3 != 0
    dense, said = g(x, mask).dense(), losses(g)
    assert not dense[~mask].any()
    g(x[mask])
    for name, value in losses(g).items():
        torch.testing.assert_close(said[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_experts": 1}, "at least 2 experts, got 1"),
        ({"k": 9}, "between 1 and the number of experts 8, got 9"),
        ({"gamma": 0.0}, "gamma must be positive"),
        ({"entropy": -1.0}, "entropy at least 0"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        DSelectK(D, **({"n_experts": 8} | settings))
