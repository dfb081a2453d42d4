from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from gatework.core import PartError
from gatework.learners.federated import FederatedGateTrainer


class Net(nn.Module):
    """With a buffer that learns (batch norm) and one that counts."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


def net(seed=0, batch_norm=False):
    torch.manual_seed(seed)
    return Net().double() if batch_norm else nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def clients(sizes=(9, 5, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=generator, dtype=torch.float64)
        found.append((x, (x[:, :3].argmax(1) + k) % 3))
    return found


def trainer(model, data, **options):
    torch.manual_seed(11)  # Of the gates.
    return FederatedGateTrainer(model, nn.functional.cross_entropy, data, **{"batch_size": 4, **options})


def sgd(params, loss, lr):
    grads = torch.autograd.grad(loss, params)
    scale = min(1.0, 10 / (torch.stack([g.norm() for g in grads]).norm().item() + 1e-6))
    with torch.no_grad():
        for p, g in zip(params, grads, strict=True):
            p -= lr * scale * g


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("gate", [None, "block_sparsity(budget=0.5)"])
def test_rounds_are_local_steps_and_a_weighted_mean(gate, average):
    """Against the algorithm, written out; three rounds, two epochs each."""
    model, data = net(), clients()
    rule = trainer(model, data, gate=gate, epochs=2, lr=0.2, gate_lr=0.3, average=average, seed=5)
    gates = copy.deepcopy(rule.gates)
    server, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    mine = [copy.deepcopy(model) for _ in data]
    for _ in range(3):
        said = rule.round()
        loss_sum = 0.0
        for k, (x, y) in enumerate(data):
            local = copy.deepcopy(server) if average else mine[k]
            mine[k] = local
            for _ in range(2):
                for chosen in torch.randperm(len(x), generator=generator).split(4):
                    out = local(x[chosen]) if gate is None else gates[k](local, x[chosen])
                    loss = nn.functional.cross_entropy(out, y[chosen])
                    loss_sum += loss.item() * len(chosen) / 2
                    weights, own = list(local.parameters()), [] if gate is None else list(gates[k].parameters())
                    # Both step by the gradients of the same loss, at the same point.
                    grads = torch.autograd.grad(loss, weights + own)
                    for params, lr, some in ((weights, 0.2, grads[: len(weights)]), (own, 0.3, grads[len(weights) :])):
                        if params:
                            scale = min(1.0, 10 / (torch.stack([g.norm() for g in some]).norm().item() + 1e-6))
                            with torch.no_grad():
                                for p, g in zip(params, some, strict=True):
                                    p -= lr * scale * g
        if average:
            total = sum(len(x) for x, _ in data)
            with torch.no_grad():
                for name, value in server.state_dict().items():
                    value.copy_(sum(len(x) / total * m.state_dict()[name] for m, (x, _) in zip(mine, data, strict=True)))
        assert said["loss"] == pytest.approx(loss_sum / 26, rel=1e-10)
        assert ("density" in said) == (gate is not None)
    torch.testing.assert_close(state(model), state(server), rtol=0, atol=1e-12)
    x = data[1][0]
    for k in range(3):
        expected = server if average else mine[k]
        if gate is None:
            out = expected(x)
        else:
            torch.testing.assert_close(dict(rule.gates[k].state_dict()), dict(gates[k].state_dict()), rtol=0, atol=1e-12)
            out = gates[k].eval()(expected, x, gates[k].scores(data[k][0]))
        torch.testing.assert_close(rule.predict(k, x), out.detach(), rtol=0, atol=1e-12)
    if not average:
        assert all(torch.equal(a, b) for a, b in zip(state(model).values(), state(net()).values(), strict=True))


def test_open_gates_with_the_whole_budget_are_federated_averaging():
    """a = 1 everywhere and s = 1: the same numbers as without gates."""
    plain, gated, data = net(), net(), clients()
    one = trainer(plain, data, gate=None, lr=0.2)
    two = trainer(gated, data, gate="block_sparsity(budget=1.0)", lr=0.2)
    with torch.no_grad():
        for gate in two.gates:
            gate.heads[0].scale.zero_()
            gate.heads[0].shift.fill_(60.0)  # A sigmoid of 60 is 1 to the last bit of float64, and its derivative 0.
    for _ in range(3):
        assert one.round()["loss"] == two.round()["loss"]
    assert all(torch.equal(a, b) for a, b in zip(state(plain).values(), state(gated).values(), strict=True))
    assert two.densities() == [1.0, 1.0, 1.0]
    assert one.accuracies(data) == two.accuracies(data)


def test_fine_tuning_starts_from_the_server_and_stays_with_the_client():
    model, data = net(), clients()
    rule = trainer(model, data, gate=None)
    for _ in range(2):
        rule.round()
    server = state(model)
    rule.average = False
    alone = [trainer(copy.deepcopy(model), [pair], gate=None) for pair in data]
    rule.round()
    assert all(torch.equal(server[name], value) for name, value in state(model).items())
    assert not torch.equal(rule.predict(0, data[0][0]), model(data[0][0]).detach())
    assert len({float(rule.predict(k, data[0][0]).sum()) for k in range(3)}) == 3
    # One client alone, averaged or not, is the same.
    for one, pair in zip(alone, data, strict=True):
        other = trainer(copy.deepcopy(model), [pair], gate=None, average=False)
        one.round()
        other.round()
        torch.testing.assert_close(one.predict(0, pair[0]), other.predict(0, pair[0]), rtol=0, atol=1e-14)
    # Averaging again gathers from the server's weights, not from the clients'.
    rule.average = True
    assert torch.equal(rule.predict(0, data[0][0]), model(data[0][0]).detach())


def test_a_new_client_trains_its_gate_and_nothing_else():
    model, data = net(), clients()
    rule = trainer(model, data)
    for _ in range(2):
        rule.round()
    server, others = state(model), [state(gate) for gate in rule.gates]
    x, y = clients((15,), seed=7)[0]
    before = trainer(copy.deepcopy(model), [(x, y)])
    number = rule.join((x, y), epochs=30)
    assert number == 3
    assert all(torch.equal(server[name], value) for name, value in state(model).items())
    for gate, kept in zip(rule.gates, others, strict=False):
        assert all(torch.equal(kept[name], value) for name, value in state(gate).items())

    def loss(some, k):
        return nn.functional.cross_entropy(some.predict(k, x), y).item()

    assert loss(rule, 3) < loss(before, 0)
    assert len(rule.accuracies([*data, (x, y)])) == 4
    rule.round()
    assert len(rule.gates) == 4


def test_buffers_are_averaged_and_counters_stay():
    model, data = net(batch_norm=True), clients((8, 4))
    rule = trainer(model, data, gate=None)
    rule.round()
    means = []
    for k, (x, _) in enumerate(data):
        local, generator = net(batch_norm=True).train(), torch.Generator().manual_seed(0)
        if k:
            torch.randperm(8, generator=generator)
        for chosen in torch.randperm(len(x), generator=generator).split(4):
            loss = nn.functional.cross_entropy(local(x[chosen]), data[k][1][chosen])
            sgd(list(local.parameters()), loss, 0.1)
        means.append(local.norm.running_mean)
    torch.testing.assert_close(model.norm.running_mean, means[0] * 2 / 3 + means[1] / 3, rtol=0, atol=1e-12)
    assert model.norm.num_batches_tracked == 0


@pytest.mark.parametrize("average", [True, False])
def test_training_continues_from_a_file_bit_for_bit(average):
    data = clients()
    rule = trainer(net(), data, average=average)
    for _ in range(2):
        rule.round()
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    torch.manual_seed(77)
    other = FederatedGateTrainer(net(5), nn.functional.cross_entropy, data, batch_size=4, seed=9)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for _ in range(2):
        assert rule.round() == other.round()
    for k, (x, _) in enumerate(data):
        assert torch.equal(rule.predict(k, x), other.predict(k, x))
    assert (other.rounds, other.average) == (4, average)


def test_wrong_use_meets_one_sentence():
    data = clients()
    for wrong, sentence in [
        ({"clients": []}, "there must be at least one client"),
        ({"clients": [(data[0][0], data[0][1][:2])]}, "as many targets"),
        ({"clients": [(data[0][0][:0], data[0][1][:0])]}, "every client needs examples"),
        ({"lr": 0.0}, "must be positive, got 0.0"),
        ({"epochs": 0}, "must be positive"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            FederatedGateTrainer(net(), nn.functional.cross_entropy, **{"clients": data, **wrong})
    with pytest.raises(PartError, match="did you mean 'block_sparsity'"):
        trainer(net(), data, gate="block_sparse")
    plain = trainer(net(), data, gate=None)
    with pytest.raises(ValueError, match="there are no gates"):
        plain.join(data[0])
    with pytest.raises(ValueError, match="there are 3 clients, and data for 2"):
        plain.accuracies(data[:2])
    with pytest.raises(ValueError, match="the state is of other clients"):
        plain.load_state_dict(trainer(net(), data).state_dict())
    with pytest.raises(ValueError, match="the state is of other clients"):
        plain.load_state_dict(trainer(net(), data[:2], gate=None).state_dict())
