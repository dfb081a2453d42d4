"""The ranker against its equation, by gate; and the task that it ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.bench.study import define
from gatework.bench.tasks import make_task
from gatework.bench.trainer import build_learner, build_model
from gatework.core import PartError, losses
from gatework.models import Ranker

IDS = torch.tensor([[3, 7, 1, 2, 0, 0], [0, 1, 0, 0, 0, 0], [4, 9, 9, 9, 3, 8], [1, 2, 0, 5, 0, 6]])


def made(gate=None, **settings):
    torch.manual_seed(0)
    return Ranker(**({"items": 9, "queries": 5, "history": 4, "d_model": 3, "experts": 2, "gate": gate} | settings)).double().eval()


def inputs(model):
    """By hand: the history's embeddings, their mean, and v, row by row."""
    rows = []
    for query, item, *past in IDS.tolist():
        s = [model.items.weight[i] for i in past if i]
        pooled = sum(s) / len(s) if s else torch.zeros(3, dtype=torch.float64)
        rows.append((s, model.queries.weight[query], torch.cat([pooled, model.queries.weight[query], model.items.weight[item]])))
    return rows


def score(expert, v):
    first, _, last = expert
    return (last.weight @ torch.relu(first.weight @ v + first.bias) + last.bias)[0]


def test_logits_equal_the_equation_for_every_kind_of_gate():
    plain = made()
    assert len(plain.experts) == 1
    assert plain.experts[0][0].out_features == 2 * 6
    expected = torch.stack([score(plain.experts[0], v) for _, _, v in inputs(plain)])
    torch.testing.assert_close(plain(IDS), expected, rtol=0, atol=1e-12)

    softmax = made("topk(k=2, normalize=none, balance=[])")
    expected = []
    for _, _, v in inputs(softmax):
        weights = (softmax.gate.weight @ v).softmax(0)
        expected.append(sum(weights[e] * score(softmax.experts[e], v) for e in range(2)))
    torch.testing.assert_close(softmax(IDS), torch.stack(expected), rtol=0, atol=1e-12)

    weighted = made("attention_weighted(hidden=4)")
    expected = []
    for s, q, v in inputs(weighted):
        g = weighted.gate.default
        for behaviour in s:
            z = torch.cat([behaviour, q, behaviour * q])
            g = g + weighted.gate.activation(z) * weighted.gate.gate(z)
        expected.append(sum(g[e] * score(weighted.experts[e], v) for e in range(2)))
    torch.testing.assert_close(weighted(IDS), torch.stack(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(weighted(IDS[:, [0, 1, 5, 3, 2, 4]]), weighted(IDS), rtol=0, atol=1e-12)  # Any order.
    (weighted.train()(IDS).sum() + losses(weighted)["gate.contrast"]).backward()
    assert all(p.grad is not None and p.grad.any() for p in weighted.parameters())
    assert not weighted.items.weight.grad[0].any()


def test_a_study_trains_it_on_rankings():
    options = {"items": 12, "queries": 4, "types": 2, "history": 4, "examples": 400}
    task, study = make_task("ranking", **options), define({"task": {"name": "ranking", **options}})
    assert set(study.resolved) == {"baseline", "softmax", "attention_weighted", "no_contrast"}
    for name, variant in study.resolved.items():
        torch.manual_seed(0)
        net = build_model(task, variant)
        learner = build_learner(net, task, variant, 1e-2, 40)
        stream = task.batches(0, 64)
        first, *_, last = [learner.step(next(stream))["loss"] for _ in range(40)]
        assert float(last) < 0.9 * float(first), name
        scores = task.evaluate(learner.predict, "test")
        assert all(0 < scores[f"auc_{length}"] < 1 for length in ("empty", "short", "long"))
        assert scores["auc_error"] == 1 - scores["auc"]


def test_wrong_use_meets_one_sentence():
    with pytest.raises(PartError, match="a row holds the query, the item and 4 places of history, not 5 ids"):
        made()(IDS[:, :5])
    with pytest.raises(PartError, match="must be at least 1, got 9, 5, 0, 3, 2, 6"):
        made(history=0)
    with pytest.raises(PartError, match="no gate 'topc'; did you mean 'topk'"):
        made("topc")

    class Odd(nn.Module):
        conditions = ("weather",)

    with pytest.raises(PartError, match="a ranker has a history and a query, and this gate needs weather"):
        made(Odd())
