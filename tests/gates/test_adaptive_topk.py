"""Adaptive gating and its curriculum against the equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from gatework.core import PartError, Routing, losses, metrics
from gatework.core.cost import count_flops
from gatework.experts import MoE
from gatework.gates import AdaptiveTopK, ComplexityCurriculum
from gatework.models import Decoder

D, E = 6, 5


def gate(n_experts: int = E, **settings) -> AdaptiveTopK:
    torch.manual_seed(0)
    made = AdaptiveTopK(D, n_experts, **settings).double()
    nn.init.normal_(made.weight, std=0.5)
    return made


def tokens(n: int = 40) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def probabilities(g, x) -> list[float]:
    exponentials = [math.exp(float(w @ x)) for w in g.weight.detach()]
    return [value / sum(exponentials) for value in exponentials]


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_by_the_equations(renorm, train):
    g, x = gate(threshold=0.15, renorm=renorm).train(train), tokens().requires_grad_()
    routing = g(x)
    twos, first, expected = 0, [0] * E, torch.zeros(len(x), E, dtype=torch.float64)
    for n in range(len(x)):
        p = probabilities(g, x[n].detach())
        i, j = sorted(range(E), key=lambda e: -p[e])[:2]
        two = p[i] - p[j] <= 0.15
        total = (p[i] + two * p[j]) if renorm else 1.0
        expected[n, i], expected[n, j] = p[i] / total, two * p[j] / total
        first[i] += 1
        twos += two
        assert routing.experts[n].tolist() == [i, j]
    assert 5 < twos < len(x) - 5
    torch.testing.assert_close(routing.dense(), expected, rtol=0, atol=1e-12)
    assert (routing.weights <= routing.probs.gather(1, routing.experts)).all() or renorm
    assert metrics(g)["two_experts"].item() == pytest.approx(twos / len(x))
    found = losses(g)
    assert set(found) == ({"switch"} if train else set())
    if train:  # On first choices alone.
        mean = [sum(probabilities(g, x[n].detach())[e] for n in range(len(x))) / len(x) for e in range(E)]
        assert found["switch"].item() == pytest.approx(0.01 * E * sum(f / len(x) * p for f, p in zip(first, mean, strict=True)))


def test_gradients_are_those_of_the_chosen_probabilities():
    g, x = gate(threshold=0.15), tokens(12)
    routing = g(x)
    used = routing.weights != 0
    pull = torch.randn(12, E, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (found,) = torch.autograd.grad((routing.dense() * pull).sum(), g.weight)
    probs = torch.softmax(x @ g.weight.T, 1)
    chosen = torch.zeros(12, E, dtype=torch.float64).scatter(1, routing.experts, used.double())
    (expected,) = torch.autograd.grad((probs * chosen * pull).sum(), g.weight)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_the_extremes_are_top_1_and_top_2_and_the_share_rises_between():
    x, shares = tokens(), []
    for threshold in (-1e-9, 0.0, 0.05, 0.1, 0.3, 0.7, 1.0, 2.0):
        routing = gate(threshold=threshold)(x)
        used = (routing.weights != 0).sum(1)
        shares.append(used.double().mean().item() - 1)
        best = routing.probs.sort(1, descending=True).values[:, :2]
        torch.testing.assert_close(routing.weights, best * (torch.arange(2) < used[:, None]), rtol=0, atol=0)
    assert shares[0] == 0
    assert shares[-2:] == [1, 1]
    assert shares == sorted(shares)
    assert len(set(shares)) > 4


def test_ties():
    g = AdaptiveTopK(D, E, threshold=0.0)
    nn.init.zeros_(g.weight)
    assert (g(tokens().float()).weights != 0).all()  # p1 - p2 = 0 is at most 0.
    g.threshold = -1.0
    routing = g(tokens().float())
    assert (routing.weights != 0).sum(1).tolist() == [1] * 40
    assert not routing.experts[:, 0].any()


def test_two_experts():
    g, x = gate(2, threshold=0.3), tokens()
    routing = g(x)
    p1 = routing.probs.max(1).values
    assert torch.equal((routing.weights != 0).all(1), (2 * p1 - 1).abs() <= 0.3)


def test_one_expert():
    g = gate(1)
    routing = g(tokens())
    assert torch.equal(routing.dense(), torch.ones(40, 1, dtype=torch.float64))
    assert metrics(g)["two_experts"] == 0


def test_padding_counts_nowhere():
    g, x = gate(threshold=0.15), tokens()
    mask = torch.arange(len(x)) % 3 != 0
    routing = g(x, mask)
    share = metrics(g)["two_experts"]
    assert not routing.weights[~mask].any()
    alone = g(x[mask])
    assert torch.equal(routing.weights[mask], alone.weights)
    assert share == metrics(g)["two_experts"]


def test_a_shift_decides_who_is_chosen_and_how_many():
    g, x = gate(threshold=0.15, balance="loss_free(0.1)"), tokens()
    g.balance.loss_free.bias.copy_(torch.tensor([0.3, 0, 0, 0, -0.3]))
    routing = g(x)
    p = routing.probs.detach()
    s = p + g.balance.loss_free.bias
    order = s.argsort(1, descending=True)
    two = s.gather(1, order[:, :1]) - s.gather(1, order[:, 1:2]) <= 0.15
    assert torch.equal(routing.experts, order[:, :2])
    expected = torch.cat([p.gather(1, order[:, :1]), p.gather(1, order[:, 1:2]) * two], 1)
    torch.testing.assert_close(routing.weights, expected, rtol=0, atol=0)
    assert torch.equal(g.balance.loss_free.counts, torch.bincount(order[:, 0], minlength=E))


def test_the_second_expert_costs_where_it_is_used():
    torch.manual_seed(0)
    x, cost, share = tokens(), {}, {}
    for threshold in (-1.0, 0.15, 1.0):
        layer = MoE(D, d_ff=8, experts=E, gate=AdaptiveTopK(D, E, threshold=threshold)).double().eval()
        layer.gate.weight.data = gate().weight.detach()
        with torch.no_grad(), count_flops() as counted:
            layer(x)
        cost[threshold] = counted.total
        share[threshold] = metrics(layer)["gate.two_experts"].item()
    router = 2 * len(x) * D * E
    per_expert = cost[-1.0] - router
    assert (share[-1.0], share[1.0]) == (0, 1)
    assert per_expert >= len(x) * 2 * 3 * D * 8
    assert 0 < share[0.15] < 1
    for threshold, flops in cost.items():
        assert flops - router == pytest.approx((1 + share[threshold]) * per_expert)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"threshold": math.nan}, "threshold must be a number, got nan"), ({"n_experts": 0}, "n_experts must be at least 1, got 0"),
     ({"balance": "load"}, "load needs clean and scale")],
)  # fmt: skip
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveTopK(D, **{"n_experts": E} | settings)


# -- the curriculum


def test_complexity_is_the_share_of_two_expert_tokens_of_each_sample_in_each_layer():
    torch.manual_seed(0)
    model = Decoder(11, d_model=8, layers=2, heads=2, feedforward="moe(experts=4, d_ff=8, gate=adaptive_topk(threshold=0.3))")
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    model.train()
    model.depth.blocks[1].eval()
    x = torch.randint(11, (5, 7))
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 7, 1])[:, None]
    curriculum = ComplexityCurriculum().fit(model, [{"tokens": x[i : i + 2], "mask": mask[i : i + 2]} for i in (0, 2, 4)])
    assert curriculum.complexity.shape == (5, 2)
    assert model.training
    assert not model.depth.blocks[1].training
    assert not any(module._forward_hooks for module in model.modules())
    assert len(curriculum.complexity.unique()) > 3
    seen = []
    for block in model.depth.blocks:
        block.feedforward.gate.register_forward_hook(lambda _gate, _given, routing: seen.append(routing.weights))
    for sample in range(5):
        seen.clear()
        model.eval()(x[sample : sample + 1], mask=mask[sample : sample + 1])
        for layer, weights in enumerate(seen):
            real = mask[sample].nonzero()[:, 0].tolist()
            expected = sum(bool(weights[t, 1] != 0) for t in real) / len(real)
            assert curriculum.complexity[sample, layer].item() == pytest.approx(expected)


def ordered(*rows: list[float]) -> list[int]:
    curriculum = ComplexityCurriculum()
    curriculum.complexity = torch.tensor(rows)
    return curriculum.order().tolist()


def test_one_layer_is_ordered_by_its_share():
    shares = [0.5, 0.0, 1.0, 0.25, 0.5, 0.75]
    assert ordered(*([share] for share in shares)) == [1, 3, 0, 4, 5, 2]  # Equals in the order in which they came.


def test_layers_are_ordered_by_likeness_to_the_simplest():
    rows = [[0.9, 0.1, 0.5], [0.1, 0.0, 0.1], [0.2, 0.9, 0.3], [0.2, 0.1, 0.1], [0.9, 0.9, 0.8]]

    def likeness(row):
        a, b = ([v for r in vector for v in (r, 1 - r)] for vector in (row, rows[1]))
        return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))

    assert ordered(*rows) == sorted(range(5), key=lambda i: -likeness(rows[i]))
    assert ordered(*rows)[:2] == [1, 3]
    assert ordered(*rows)[-1] == 4


def test_no_second_expert_anywhere():
    assert ordered([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]) == [0, 1, 2]


class Some(nn.Module):
    """Gives its gate one token less."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = gate()

    def forward(self, x):
        return self.gate(x.flatten(0, 1)[1:])


def test_what_a_curriculum_cannot_measure():
    with pytest.raises(PartError, match="has no adaptive_topk gate"):
        ComplexityCurriculum().fit(nn.Linear(2, 2), [])
    with pytest.raises(PartError, match="no batches to measure"):
        ComplexityCurriculum().fit(gate(), [])
    with pytest.raises(PartError, match="call fit"):
        ComplexityCurriculum().order()
    with pytest.raises(PartError, match="was given 7 tokens of 2 samples"):
        ComplexityCurriculum().fit(Some(), [tokens(8).view(2, 4, D)])


def test_the_routing_says_how_many_experts_a_token_used():
    routing: Routing = gate(threshold=0.15)(tokens())
    assert routing.counts().sum() == (routing.weights != 0).sum()
