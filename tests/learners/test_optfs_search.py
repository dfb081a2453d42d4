from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gatework.bench import checkpoint
from gatework.core import advance, losses
from gatework.learners import Backprop, OptFSSearch
from gatework.models import ClickThrough
from gatework.optim import AdamW, Cosine


def model(gate="optfs(penalty=0.2, epochs=3, search=0.5)", seed=0):
    torch.manual_seed(seed)
    net = ClickThrough(12, 3, d_model=4, embedding_gate=gate).double()
    with torch.no_grad():
        net.table[:, 0].normal_()
    return net


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randint(4, (10,), generator=generator) + 4 * k for k in range(3)], 1)
    return x, ((x[:, 0] + x[:, 1]) % 2).double()


LOSS = nn.functional.binary_cross_entropy_with_logits


def learner(net, steps=24, decay=0.0, schedule=False, **options):
    optimizer = AdamW(net.parameters(), lr=0.05, weight_decay=decay)
    along = Cosine(optimizer, steps) if schedule else None
    return OptFSSearch(net, LOSS, optimizer, along, total_steps=steps, **options)


def test_search_rewind_and_retraining_against_the_phases_written_out():
    net, twin = model(), model()
    rule = learner(net)
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05, betas=(0.9, 0.95))
    early = None
    for step in range(1, 25):
        x, y = batch(step)
        optimizer.zero_grad()
        (LOSS(twin(x), y) + sum(losses(twin).values())).backward()
        optimizer.step()
        if step == 4:  # 12 steps of search in 3 epochs: epoch 1 starts after the fourth.
            early = {name: p.detach().clone() for name, p in twin.named_parameters() if not name.startswith("gate")}
        if step < 12:
            advance(twin.gate, step, 24)
        elif step == 12:
            twin.gate.harden()
            with torch.no_grad():
                for name, value in early.items():
                    twin.get_parameter(name).copy_(value)
            weights = [p for name, p in twin.named_parameters() if not name.startswith("gate")]
            optimizer = torch.optim.Adam(weights, lr=0.05, betas=(0.9, 0.95))
        rule.step((x, y))
        for name, p in net.named_parameters():
            assert (p - twin.get_parameter(name)).abs().max() < 1e-9, f"{name} after step {step}"
        assert bool(net.gate.hard) == (step >= 12)
    assert 0 < int((net.gate.c > 0).sum()) < 12, "the search has dropped some features and kept some"
    assert torch.equal(net.fold()(batch(99)[0]), net.eval()(batch(99)[0]))


def test_gates_are_spared_from_decay_and_keep_their_schedule():
    net = model("optfs(penalty=0.0, epochs=3, search=0.5)")
    rule = learner(net, decay=0.5, schedule=True)
    inside = [group for group in rule.optimizer.param_groups if any(p is net.gate.c for p in group["params"])]
    assert [group["weight_decay"] for group in inside] == [0.0]
    assert sum(len(group["params"]) for group in rule.optimizer.param_groups) == len(list(net.parameters()))
    for step in range(6):
        rule.step(batch(step))
        rates = {group["lr"] for group in rule.optimizer.param_groups}
        assert len(rates) == 1
    unseen = torch.ones(12, dtype=torch.bool)
    unseen[torch.cat([batch(step)[0].flatten() for step in range(6)])] = False
    net = model("optfs(penalty=0.0, epochs=3, search=0.5)")
    rule = learner(net, decay=0.5)
    x = torch.tensor([[0, 4, 8]])
    rule.step((x, torch.ones(1, dtype=torch.float64)))
    quiet = [f for f in range(12) if f not in (0, 4, 8)]
    assert (net.gate.c[quiet] == 0.5).all(), "gates that nothing pushes stay where they are"
    without = learner(model(), decay=0.0)
    assert len(without.optimizer.param_groups) == 1


def test_early_stopping_brings_the_best_weights_back_and_moves_nothing_more():
    net = model("optfs(penalty=0.0, epochs=3, search=0.5)")
    scores, kept = iter([0.3, 0.5, 0.4, 0.9]), []

    def validate(seen):
        assert not seen.training
        assert not torch.is_grad_enabled()
        kept.append(copy.deepcopy(seen.state_dict()))
        return next(scores)

    rule = learner(net, steps=40, validate=validate)
    for step in range(1, 41):
        rule.step(batch(step))
        assert rule.stopped == (step >= 20 + 3 * 6)  # 20 steps of search in 3 epochs: pieces of 6 steps.
        assert net.training
    assert len(kept) == 3
    assert all(torch.equal(value, kept[1][name]) for name, value in net.state_dict().items())
    assert not torch.equal(kept[2]["table"], kept[1]["table"])


def test_resuming_inside_each_phase_from_a_file_is_exact(tmp_path):
    for done in (2, 7, 15, 19):
        rule = learner(model(), validate=lambda m: float(m.bias), schedule=True)
        for step in range(done):
            rule.step(batch(step))
        other = learner(model(seed=4), validate=lambda m: float(m.bias), schedule=True)
        checkpoint.save(tmp_path / f"{done}.safetensors", rule.state_dict())
        other.load_state_dict(checkpoint.load(tmp_path / f"{done}.safetensors"))
        for step in range(done, 24):
            rule.step(batch(step))
            other.step(batch(step))
        for name, value in rule.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), (done, name)
        assert rule.stopped == other.stopped


def test_plain_back_propagation_hardens_without_going_back():
    net = model()
    rule = Backprop(net, LOSS, AdamW(net.parameters(), lr=0.05), total_steps=24)
    for step in range(12):
        rule.step(batch(step))
    table, c = net.table.detach().clone(), net.gate.c.detach().clone()
    assert net.gate.hard
    for step in range(12, 24):
        rule.step(batch(step))
    assert torch.equal(net.gate.c, c)
    assert not torch.equal(net.table, table)


def test_wrong_use_meets_one_sentence():
    with pytest.raises(ValueError, match="needs a model with an optfs gate"):
        learner(model(None))
    with pytest.raises(ValueError, match="needs gates that leave steps for retraining"):
        learner(model("optfs"))
    net = model()
    with pytest.raises(ValueError, match="the optimizer does not hold the gates"):
        OptFSSearch(net, LOSS, AdamW([net.table]), total_steps=3)
    two = nn.ModuleList([model(), model("optfs(search=0.4)")])
    with pytest.raises(ValueError, match="the optfs gates of one model must have the same search and epochs"):
        learner(two)
