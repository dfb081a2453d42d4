"""COMET against a recursive tree, and its promises."""

from __future__ import annotations

import pytest
import torch

from gatework.core import losses, metrics
from gatework.core.cost import count_flops
from gatework.experts import MoE
from gatework.gates import Comet

D = 6


def tokens(n: int = 9) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gate(experts: int = 8, spread: float = 0.3, **settings) -> Comet:
    torch.manual_seed(0)
    made = Comet(D, experts, **settings).double()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=spread)
    return made


def step(z, gamma):
    if abs(z) >= gamma / 2:
        return 0 * z + float(z > 0)
    return -2 * z**3 / gamma**3 + 3 * z / (2 * gamma) + 0.5


def leaves(g: Comet, tree: int, x, node: int = 0, reach=1.0):
    """(heap index, probability) of the leaves of a tree from left to right."""
    if node >= g.n_experts - 1:
        return [(node, reach)]
    row = tree * (g.n_experts - 1) + node
    left = step(g.node_weight[row] @ x + g.node_bias[row], g.gamma)
    return leaves(g, tree, x, 2 * node + 1, reach * left) + leaves(g, tree, x, 2 * node + 2, reach * (1 - left))


def reference(g: Comet, x: torch.Tensor):
    k, experts = g.selectors, g.n_experts
    rows, entropies = [], []
    for t in x:
        exps = [[torch.zeros((), dtype=t.dtype)] * experts for _ in range(k)]
        entropy = torch.zeros((), dtype=t.dtype)
        for j in range(k):
            for e, (_, p) in enumerate(leaves(g, j, t)):
                entropy = entropy - p * torch.log(p + 1e-8)
                if p > 0:
                    exps[j][e] = torch.exp(g.leaf_weight[j * experts + e] @ t + g.leaf_bias[j * experts + e]) * (p + 1e-8)
        total = sum(sum(row) for row in exps)
        rows.append(torch.stack([sum(exps[j][e] for j in range(k)) / total for e in range(experts)]))
        entropies.append(entropy)
    return torch.stack(rows), torch.stack(entropies).mean()


@pytest.mark.parametrize("experts", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("settings", [{"k": 1, "gamma": 1.5}, {"k": 2}], ids=str)
def test_equals_the_equations_with_all_gradients(experts, settings):
    g, x = gate(experts, entropy=0.2, **settings), tokens(5).requires_grad_()
    got, said = g(x).dense(), losses(g)["entropy"]
    wanted, entropy = reference(g, x)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(said, 0.2 * entropy, rtol=0, atol=1e-12)
    parameters = [x, *g.parameters()]
    mine = torch.autograd.grad(got.square().sum() + said, parameters)
    theirs = torch.autograd.grad(wanted.square().sum() + 0.2 * entropy, parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("experts", range(2, 18))
def test_leaves_are_the_experts_from_left_to_right_and_their_shares_sum_to_one(experts):
    g, x = gate(experts, spread=0.15, k=2), tokens(3)
    reach = g.reach(x)
    assert reach.shape == (3, 2, experts)
    torch.testing.assert_close(reach.sum(2), torch.ones(3, 2, dtype=torch.float64), rtol=0, atol=1e-14)
    found = leaves(g, 1, x[0])
    assert sorted(node for node, _ in found) == list(range(experts - 1, 2 * experts - 1))
    torch.testing.assert_close(reach[0, 1], torch.stack([p for _, p in found]), rtol=0, atol=1e-15)
    torch.testing.assert_close(g(x).dense().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("k", [1, 3])
def test_decided_trees_lead_to_one_expert_each(k):
    g, x = gate(6, k=k), tokens(64)
    with torch.no_grad():
        g.node_weight.mul_(1e6)
    assert ((g.reach(x) == 1).sum(2) == 1).all()
    assert ((g.reach(x) != 0).sum(2) == 1).all()
    routing = g(x)
    used = (routing.dense() != 0).sum(1)
    assert used.max() <= k
    if k == 1:
        assert torch.equal(routing.weights, torch.ones(64, 1, dtype=torch.float64))
    else:
        assert used.max() > 1
        assert len(routing.dense().argmax(1).unique()) > 2
    routing.dense().square().sum().backward()
    assert not g.node_weight.grad.any()


def test_a_constant_on_all_leaves_changes_nothing():
    g, x = gate(), tokens()
    before = g(x).dense()
    with torch.no_grad():
        g.leaf_bias.add_(1.7)
    torch.testing.assert_close(g(x).dense(), before, rtol=0, atol=1e-14)
    with torch.no_grad():
        g.leaf_bias[3] += 1.7
    assert (g(x).dense() - before).abs().max() > 1e-3


def test_what_is_not_chosen_is_not_run():
    x = tokens(40)
    layer = MoE(D, d_ff=5, experts=8, gate="comet(k=2)").double()

    def flops():
        with count_flops() as count:
            layer(x)
        return count.total

    per_row, router = 2 * D * 3 * 5, 40 * 2 * D * 2 * (7 + 8)
    assert flops() == 40 * 8 * per_row + router
    with torch.no_grad():
        layer.gate.node_weight.mul_(40)
    rows = int(layer.gate(x).counts().sum())
    assert 40 * 2 < rows < 40 * 7
    assert flops() == rows * per_row + router
    assert metrics(layer)["gate.chosen"].item() == pytest.approx(rows / 40)


def test_the_start_is_dense_and_nearly_uniform():
    torch.manual_seed(0)
    g = Comet(64, 8, gamma=2.0)
    assert g.node_weight.abs().max() <= 0.02
    assert g.node_weight.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.1)
    assert g.leaf_weight.abs().max() <= 0.05
    assert g.leaf_weight.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.1)
    assert g(torch.zeros(1, 64)).dense().max() < 0.16


def test_padding_enters_no_loss():
    g, x = gate(entropy=1.0), tokens()
    mask = torch.arange(9) % 3 != 0
    dense, said = g(x, mask).dense(), losses(g)["entropy"]
    assert not dense[~mask].any()
    g(x[mask])
    torch.testing.assert_close(said, losses(g)["entropy"], rtol=0, atol=1e-12)


def test_wrong_arguments():
    for settings, message in (({"n_experts": 1}, "at least 2"), ({"k": 0}, "got 0"), ({"gamma": -1.0}, "positive")):
        with pytest.raises(ValueError, match=message):
            Comet(D, **({"n_experts": 8} | settings))
