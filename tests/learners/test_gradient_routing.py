"""Gradient routing against two passes written out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatework import gates
from gatework.bench import checkpoint
from gatework.bench.study import Variant
from gatework.bench.tasks import make_task
from gatework.bench.trainer import build_learner, build_model
from gatework.core import PartError, build, entries
from gatework.core.cost import count_flops
from gatework.learners import Backprop, GradientRouting
from gatework.optim import Cosine

EXACT = {"rtol": 1e-10, "atol": 1e-13}
WEIGHTS = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)


def model(seed=0, gate="feature_selection"):
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    gates.attach(made, ["0", "2"], gate)
    return made


def batch(seed=50, rows=10):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64), torch.randint(3, (rows,), generator=generator)


def weighted(output, y):
    return F.cross_entropy(output, y, WEIGHTS)


def learner(some, lr=0.05, **options):
    optimizer = build("adamw", "optim", params=some.parameters(), lr=lr)
    return GradientRouting(some, F.cross_entropy, optimizer, **({"gate_lr": 0.01} | options))


def split(some):
    own = {id(p): p for gate in (some[0].channel_gate, some[2].channel_gate) for p in gate.parameters()}
    return list(own.values()), [p for p in some.parameters() if id(p) not in own]


def by_hand(w1, b1, g1, w2, b2, g2, w3, b3, x):
    """The network of :func:`model`, from its parameters."""
    h = torch.tanh((x @ w1.T + b1) * torch.sigmoid(g1))
    h = torch.relu((h @ w2.T + b2) * torch.sigmoid(g2))
    return h @ w3.T + b3


def adam(p, g, m, v, t, lr):
    """One step of Adam without decay (Kingma and Ba 2014, algorithm 1)."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return p - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8), m, v


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("loss", [None, weighted])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_are_the_two_passes(accumulate, loss, clip):
    """Gates first, by the gate loss; then the others, with the moved gates; plain gradient descent as the main optimizer."""
    some = model()
    options = {"gate_lr": 0.02, "gate_loss": loss, "accumulate": accumulate, "clip_norm": clip}
    rule = GradientRouting(some, F.cross_entropy, torch.optim.SGD(some.parameters(), lr=0.1), **options)
    values = [p.detach().clone() for p in some.parameters()]  # w1 b1 g1 w2 b2 g2 w3 b3
    own, moments = (2, 5), {i: (0.0, 0.0) for i in (2, 5)}

    def clipped(some_grads):
        if clip is None:
            return some_grads
        norm = torch.cat([g.flatten() for g in some_grads.values()]).norm()
        return {i: g * min(1, clip / (norm.item() + 1e-6)) for i, g in some_grads.items()}

    def grads(some_loss, x, y):
        leaves = [v.clone().requires_grad_() for v in values]
        return dict(enumerate(torch.autograd.grad(some_loss(by_hand(*leaves, x), y), leaves)))

    for step in (1, 2, 3):
        x, y = batch(step)
        before = F.cross_entropy(by_hand(*values, x), y)
        first = grads(loss or F.cross_entropy, x, y)
        for i, g in clipped({i: first[i] for i in own}).items():
            values[i], *moments[i] = adam(values[i], g, *moments[i], step, 0.02)
        second = grads(F.cross_entropy, x, y)
        others = {i: second[i] + (first[i] if accumulate else 0) for i in range(8) if i not in own}
        for i, g in clipped(others).items():
            values[i] = values[i] - 0.1 * g
        said = rule.step((x, y))
        torch.testing.assert_close(said["loss"], before, **EXACT)
        assert ("gate_loss" in said) == (loss is not None)
        for p, v in zip(some.parameters(), values, strict=True):
            torch.testing.assert_close(p.detach(), v, **EXACT)


@pytest.mark.parametrize("accumulate", [False, True])
def test_the_first_pass_moves_the_gates_alone_and_the_second_the_rest_alone(accumulate):
    some = model()
    rule, seen = learner(some, accumulate=accumulate), []
    own, rest = split(some)

    def see(*_):
        seen.append([[p.detach().clone() for p in part] for part in (own, rest)])

    some.register_forward_pre_hook(see)
    for step in range(3):
        see()
        rule.step(batch(step))
        see()
        start, first, second, end = seen
        assert all(torch.equal(a, b) for a, b in zip(start[0] + start[1], first[0] + first[1], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)), "a gate has not moved"
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True)), "pass 1 has moved another tensor"
        assert all(torch.equal(a, b) for a, b in zip(second[0], end[0], strict=True)), "pass 2 has moved a gate"
        assert not any(torch.equal(a, b) for a, b in zip(second[1], end[1], strict=True))
        seen.clear()


def test_estimate_is_the_gradient_of_each_loss_at_the_present_weights():
    for loss in (None, weighted):
        some = model()
        rule = learner(some, gate_loss=loss)
        x, y = batch()
        said = rule.estimate((x, y))
        own, rest = split(some)
        for params, some_loss in ((own, loss or F.cross_entropy), (rest, F.cross_entropy)):
            wanted = torch.autograd.grad(some_loss(some(x), y), params)
            for p, g in zip(params, wanted, strict=True):
                torch.testing.assert_close(p.grad, g, **EXACT)
        assert said["loss"].item() == pytest.approx(F.cross_entropy(some(x), y).item(), rel=1e-12)
        assert ("gate_loss" in said) == (loss is not None)


def test_the_losses_of_parts_enter_both_passes():
    some = model(gate="trainable_gate(penalty=5)").train()
    with torch.no_grad():
        some[0].channel_gate.weight.fill_(-1e-3)
    said = learner(some).step(batch())
    assert said["0.channel_gate.target"].item() == pytest.approx(5 * (0.5 - 8 / 14) ** 2, rel=1e-12)
    assert not said["0.channel_gate.target"].requires_grad


def test_two_passes_cost_two_passes():
    """The first pass leaves out the gradients of the weights; with ``accumulate`` it costs what the second does, and more."""
    flops = {}
    for name in ("plain", "routed", "accumulated"):
        some = model()
        rule = Backprop(some, F.cross_entropy, torch.optim.SGD(some.parameters(), lr=0.1)) if name == "plain" else None
        rule = rule or learner(some, accumulate=name == "accumulated")
        with count_flops() as count:
            rule.step(batch())
        flops[name] = count.total
    assert 1.5 * flops["plain"] < flops["routed"] < flops["accumulated"] == 2 * flops["plain"]


def test_gates_leave_the_optimizer_and_have_no_decay():
    some = model()
    optimizer = build("adamw", "optim", params=some.parameters(), lr=0.05)
    rule = GradientRouting(some, F.cross_entropy, optimizer)
    own, rest = split(some)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in rest]
    (group,) = rule.gate_optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in own]
    assert (group["lr"], group["weight_decay"], type(rule.gate_optimizer)) == (1e-4, 0, torch.optim.Adam)


@pytest.mark.parametrize("name", [entry.name for entry in entries("optim")])
def test_every_optimizer_steps_when_a_group_had_gates_alone(name):
    some = model()
    own, rest = split(some)
    optimizer = build(name, "optim", params=[{"params": rest}, {"params": own, "weight_decay": 0.0}], lr=0.01)
    rule = GradientRouting(some, F.cross_entropy, optimizer, Cosine(optimizer, total_steps=4), gate_lr=0.01)
    before = [p.detach().clone() for p in some.parameters()]
    for step in range(3):
        rule.step(batch(step))
    assert not any(torch.equal(p, b) for p, b in zip(some.parameters(), before, strict=True))


@pytest.mark.parametrize("done", [0, 4])
def test_resumes_bit_for_bit_from_a_checkpoint(done, tmp_path):
    def rule(seed):
        some = model(seed)
        optimizer = build("adabelief", "optim", params=some.parameters(), lr=0.02)
        schedule = Cosine(optimizer, total_steps=9)
        return GradientRouting(some, F.cross_entropy, optimizer, schedule, total_steps=9, clip_norm=0.5, gate_lr=0.02)

    first, second = rule(0), rule(1)
    for step in range(done):
        first.step(batch(step))
    checkpoint.save(tmp_path / "kept.safetensors", first.state_dict())
    second.load_state_dict(checkpoint.load(tmp_path / "kept.safetensors"))
    for step in range(done, 9):
        ours, theirs = first.step(batch(step)), second.step(batch(step))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_bench_builds_it():
    task = make_task("digits")
    rule = "gradient_routing(gate_lr=0.01, accumulate=true)"
    variant = Variant("routed", {"d_model": 16}, "adamw", "constant", rule, (1e-3, 1e-2))
    some = build_model(task, variant)
    gates.attach(some, "_blocks", "feature_selection")
    rule = build_learner(some, task, variant, 1e-3, steps=10)
    assert isinstance(rule, GradientRouting)
    assert rule.accumulate
    first = rule.step((torch.rand(8, 1, 8, 8), torch.arange(8)))
    assert first["loss"].isfinite()


def test_wrong_models_and_values_are_refused():
    plain = nn.Linear(5, 3).double()
    with pytest.raises(ValueError, match="GradientRouting needs channel gates, and this Linear has none; attach some"):
        learner(plain)
    with pytest.raises(ValueError, match="gate_lr must be positive, got 0"):
        learner(model(), gate_lr=0.0)
    some = model()
    optimizer = torch.optim.SGD(some.parameters(), lr=0.1)
    with pytest.raises(PartError, match="gradient_routing: gate_lr must be positive"):
        build("gradient_routing(gate_lr=-1)", "learner", model=some, loss_fn=F.cross_entropy, optimizer=optimizer)
