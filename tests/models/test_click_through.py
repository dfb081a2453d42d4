from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.bench.study import define
from gatework.bench.tasks import make_task
from gatework.bench.trainer import build_learner, build_model
from gatework.core import GateworkError, PartError
from gatework.models import ClickThrough


def made(**options):
    torch.manual_seed(0)
    net = ClickThrough(20, 4, d_model=3, **options).double()
    with torch.no_grad():
        net.table.normal_()
        net.bias.fill_(0.3)
    return net


X = torch.tensor([[0, 6, 11, 19], [4, 5, 10, 15], [3, 3, 3, 3], [1, 7, 13, 17], [2, 9, 14, 16]])


@pytest.mark.parametrize("deep", [0, 2])
def test_the_sum_over_features_and_pairs(deep):
    net = made(deep=deep, **({"activation": "tanh", "d_ff": 7} if deep else {}))
    found = net(X)
    for row, logit in zip(X.tolist(), found.tolist(), strict=True):
        total = 0.3 + sum(net.table[f, 0].item() for f in row)
        for i in range(4):
            for j in range(i):
                total += sum((net.table[row[i], d] * net.table[row[j], d]).item() for d in (1, 2, 3))
        if deep:
            h = torch.cat([net.table[f, 1:] for f in row])
            for layer in net.deep:
                h = torch.tanh(h) if not isinstance(layer, nn.Linear) else layer.weight @ h + layer.bias
            total += h.item()
        assert logit == pytest.approx(total, rel=1e-12)
    if deep:
        assert [tuple(layer.weight.shape) for layer in net.deep if isinstance(layer, nn.Linear)] == [(7, 12), (7, 7), (1, 7)]


def test_gates_scale_weights_and_vectors_and_fold_away():
    """The gate of an interaction is the product of its features' gates."""
    net, plain = made(embedding_gate="optfs", deep=1), made(deep=1)
    plain.load_state_dict({name: value for name, value in net.state_dict().items() if not name.startswith("gate")})
    assert torch.equal(net(X), plain(X)), "gates start at 1"
    with torch.no_grad():
        net.gate.c.normal_()
        plain.table.mul_(net.gate.values()[:, None])
    torch.testing.assert_close(net(X), plain(X), rtol=0, atol=1e-13)
    net.gate.harden()
    kept = int((net.gate.c > 0).sum())
    folded = net.fold()
    assert 0 < kept < 20
    assert folded.table.shape == (kept + 1, 4)
    assert torch.equal(folded(X), net(X))
    assert folded.gate is None
    assert net.table.shape == (20, 4)
    again = made(embedding_gate="optfs", deep=1)
    again.gate.harden()
    assert again.fold().table.shape == (21, 4)


@pytest.mark.parametrize("deep", [0, 1])
def test_initialisation(deep):
    torch.manual_seed(0)
    net = ClickThrough(5000, 6, d_model=16, deep=deep)
    assert (net.table[:, 0] == 0).all()
    assert net.bias == 0
    assert net.table[:, 1:].std().item() == pytest.approx(16**-0.5 / 2, rel=0.02)


def test_a_study_builds_it_with_gate_and_learner():
    task = make_task("click_through", fields=4, values=6, examples=400)
    study = define({"task": {"name": "click_through", "fields": 4, "values": 6, "examples": 400}})
    assert study.resolved["optfs"].model["embedding_gate"] == "optfs(penalty=0.0005, search=0.5)"
    torch.manual_seed(0)
    net = build_model(task, study.resolved["optfs"])
    learner = build_learner(net, task, study.resolved["optfs"], 1e-2, 20)
    stream = task.batches(0, 32)
    for _ in range(20):
        learner.step(next(stream))
    assert net.gate.hard
    assert 0 <= task.evaluate(learner.predict, "test")["auc"] <= 1
    with pytest.raises(GateworkError, match="no component 'optfz'; did you mean 'optfs'"):
        define({"task": "click_through", "variants": {"a": "embedding_gate=optfz"}})
    with pytest.raises(GateworkError, match="embedding_gate takes a part expression such as embedding_gate="):
        define({"task": "click_through", "model": {"embedding_gate": 3}})


def test_wrong_use_meets_one_sentence():
    for wrong, sentence in [
        ({"features": 0}, "features, fields and d_model must be at least 1 and deep at least 0, got 0, 4, 16 and 0"),
        ({"deep": -1}, "deep at least 0, got 20, 4, 16 and -1"),
        ({"activation": "relu"}, "an activation needs a deep part"),
        ({"embedding_gate": nn.Linear(3, 3)}, "Linear gates no embedding; write embedding_gate=optfs"),
    ]:
        with pytest.raises(PartError, match=sentence):
            ClickThrough(**{"features": 20, "fields": 4, **wrong})
    with pytest.raises(PartError, match="built for 4 fields, not 3"):
        made()(X[:, :3])
    with pytest.raises(PartError, match="there is no embedding gate to fold"):
        made().fold()
