"""The task ``reversal``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.study import define
from gatework.bench.tasks import make_task
from gatework.bench.tasks.reversal import ranks
from gatework.bench.trainer import build_learner, build_model
from gatework.core import GateworkError

from .made import take, task

SMALL = {"group_a": 24, "group_b": 12, "relations": 3, "multiplicity": 3}


@pytest.mark.parametrize("options", [{}, SMALL])
def test_what_is_asked_for_is_the_reversal_of_what_was_told(options):
    made = make_task("reversal", **options)
    relations, entities = made.relations, made.entities
    train = {tuple(fact) for fact in made.splits["train"][0].tolist()}
    assert len(train) == len(made.splits["train"][0])
    assert torch.equal(made.splits["train"][0][:, 2], made.splits["train"][1])

    def back(s, r, o):
        return o, (r + relations) % (2 * relations), s

    asked = set()
    for split in ("validation", "test"):
        x, y = made.splits[split]
        assert (x[:, 2] == -100).all()
        asked |= {(s, r, o) for (s, r, _), o in zip(x.tolist(), y.tolist(), strict=True)}
    assert len(asked) == sum(len(made.splits[split][0]) for split in ("validation", "test")) == len(made.held)
    assert not asked & train
    assert {back(*fact) for fact in asked} <= train
    a = entities - 2 * len(made.held) // relations
    for s, r, o in train:
        assert s != o
        assert (s < a) == (o < a)
        assert (back(s, r, o) in train) == (s < a)
    # In each relation and direction an entity is a subject once at most, and told or asked in one of the two.
    for r in range(relations):
        either = [s for s, q, _ in train | asked if q in (r, r + relations)]
        assert sorted(either) == list(range(entities))
    assert 0.3 < sum(r >= relations for _, r, _ in asked) / len(asked) < 0.7


@pytest.mark.parametrize(("entities", "multiplicity"), [(36, 1), (36, 3), (36, 6), (700, 10), (700, 14)])
def test_every_name_is_shared_by_as_many_and_no_pair_twice(entities, multiplicity):
    made = make_task("reversal", group_a=entities - 12, group_b=12, multiplicity=multiplicity)
    distinct = entities // multiplicity
    assert made.names.shape == (entities, 2)
    assert torch.equal(made.names[:, 0].bincount(minlength=2 * distinct), torch.tensor([multiplicity] * distinct + [0] * distinct))
    assert torch.equal(made.names[:, 1].bincount(minlength=2 * distinct), torch.tensor([0] * distinct + [multiplicity] * distinct))
    assert len({tuple(name) for name in made.names.tolist()}) == entities


def test_ranks_are_those_among_all_and_ties_count_half():
    scores = torch.tensor([[3.0, 1, 2, 0], [1, 1, 1, 1], [-math.inf, 0, 0, 5], [math.nan] * 4, [1, 2, math.nan, 0]])
    assert ranks(scores, torch.tensor([2, 0, 1, 0, 1])).tolist() == [2, 2.5, 2.5, 5, 2]


def test_scores_of_models_that_are_known():
    made = task("reversal")
    known = {(s, r): o for s, r, o in torch.cat([made.told, made.held]).tolist()}

    def oracle(x):
        return torch.nn.functional.one_hot(torch.tensor([known[s, r] for s, r, _ in x.tolist()]), made.entities).float().log()

    for split in ("validation", "test"):
        found = made.evaluate(oracle, split)
        assert found == {"loss": 0, "mrr": 1, "accuracy": 1, "mrr_error": 0, "mrr_told": 1}

    def forgetful(x):
        """Knows what it was told and nothing of the other direction."""
        told = {(s, r) for s, r, _ in made.told.tolist()}
        uniform = torch.full((made.entities,), -math.log(made.entities))
        rows = [oracle(row[None])[0] if (int(row[0]), int(row[1])) in told else uniform for row in x]
        return torch.stack(rows)

    found = made.evaluate(forgetful, "test", max_batches=2)
    assert found["mrr_told"] == 1
    assert found["mrr"] == pytest.approx(2 / (made.entities + 1))
    assert found["accuracy"] == 0


@pytest.mark.parametrize("variant", ["baseline", "concept", "jepa", "jepa_memory"])
def test_a_study_trains_its_models(variant):
    made = make_task("reversal", **SMALL)
    study = define({"task": {"name": "reversal", **SMALL}, "model": {"d_model": 16, "heads": 2}})
    torch.manual_seed(0)
    net = build_model(made, study.resolved[variant])
    learner = build_learner(net, made, study.resolved[variant], 1e-2, 40)
    first, *_, last = [float(learner.step(batch)["loss"]) for batch in take(made, 0, 32, 40)]
    assert last < 0.9 * first
    found = made.evaluate(learner.predict, "test")
    assert found["mrr_error"] == 1 - found["mrr"]
    assert 0 < found["mrr"] < 1
    assert found["mrr_told"] > 2 / made.entities


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"group_b": 7}, "group_a and group_b must be even and at least 2, relations at least 1, got 500, 7 and 6"),
        ({"relations": 0}, "got 500, 200 and 0"),
        ({"multiplicity": 9}, "multiplicity divides the 700 entities into at least as many names as entities share one, got 9"),
        ({"multiplicity": 0}, "share one, got 0"),
        ({"multiplicity": 50}, "share one, got 50"),
    ],
)
def test_wrong_options_are_refused(options, sentence):
    with pytest.raises(GateworkError, match=sentence):
        make_task("reversal", **options)
