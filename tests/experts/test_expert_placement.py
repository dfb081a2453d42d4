"""Placements by hand, against an exhaustive search, and their metric."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gatework.core import PartError
from gatework.experts.expert_placement import ExpertPlacement

COUNTS = torch.randint(0, 20, (40, 8), generator=torch.Generator().manual_seed(0))


def test_greedy_by_hand():
    placement = ExpertPlacement.greedy(torch.tensor([[9, 7, 4, 1]]), 2)
    assert (placement.experts_of(0), placement.experts_of(1)) == ([0, 3], [1, 2])


def test_greedy_stops_where_no_place_is_free():
    placement = ExpertPlacement.greedy(torch.tensor([[100, 1, 1, 1]]), 2)
    assert (placement.experts_of(0), placement.experts_of(1)) == ([0, 3], [1, 2])


def test_anti_correlation_parts_what_is_busy_together():
    # Equal loads: greedy goes by index and puts 0 and 2 on one rank, which are busy in the same batches.
    counts = torch.tensor([[8, 0, 8, 0], [0, 8, 0, 8]])
    assert ExpertPlacement.greedy(counts, 2).ranks == (0, 1, 0, 1)
    assert ExpertPlacement.greedy(counts, 2).imbalance(counts) == 2
    apart = ExpertPlacement.anti_correlated(counts, 2)
    assert apart.ranks == (0, 1, 1, 0)
    assert apart.imbalance(counts) == 1


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_anti_correlation_equals_its_formula(ranks):
    load = COUNTS.double().mean(0)
    held: list[list[int]] = [[] for _ in range(ranks)]
    for e in sorted(range(8), key=lambda e: (-load[e], e)):
        scores = []
        for r in range(ranks):
            score = sum(float(load[j]) for j in held[r])
            for j in held[r]:
                correlation = float(torch.corrcoef(COUNTS[:, [e, j]].double().T)[0, 1])
                score += max(0.0, correlation) * math.sqrt(load[e] * load[j])
            scores.append(score if len(held[r]) < 8 // ranks else math.inf)
        held[scores.index(min(scores))].append(e)
    assert [ExpertPlacement.anti_correlated(COUNTS, ranks).experts_of(r) for r in range(ranks)] == [sorted(h) for h in held]


def test_the_metric_is_the_mean_over_batches_of_the_largest_over_the_mean_load():
    placement = ExpertPlacement((0, 1, 1, 0), 2)
    counts = torch.tensor([[3, 1, 1, 1], [0, 0, 0, 0], [0, 5, 5, 0]])
    assert placement.imbalance(counts) == pytest.approx(((4 / 3) + 2) / 2)
    assert placement.imbalance(counts[1:2]) == 1
    assert ExpertPlacement.contiguous(4, 1).imbalance(counts) == 1


def test_greedy_is_at_most_a_third_worse_than_the_best_placement_of_the_mean_load():
    load = COUNTS.double().mean(0, keepdim=True)
    every = (tuple(int(e in chosen) for e in range(8)) for chosen in itertools.combinations(range(8), 4))
    best = min(ExpertPlacement(ranks, 2).imbalance(load) for ranks in every)
    assert best <= ExpertPlacement.greedy(COUNTS, 2).imbalance(load) <= 4 / 3 * best


@pytest.mark.parametrize("kind", ["greedy", "anti_correlated"])
def test_each_rank_holds_equally_many(kind):
    for ranks in (1, 2, 4, 8):
        placement = getattr(ExpertPlacement, kind)(COUNTS, ranks)
        assert all(len(placement.experts_of(rank)) == 8 // ranks for rank in range(ranks))
    constant = torch.full((3, 4), 5)  # No correlation is defined.
    assert getattr(ExpertPlacement, kind)(constant, 2).ranks == (0, 1, 0, 1)


def test_wrong_input_meets_one_sentence():
    for kind in ("greedy", "anti_correlated"):
        with pytest.raises(PartError, match=r"counts \(batches, E\) in at least 1 batch, not \(0, 8\)"):
            getattr(ExpertPlacement, kind)(COUNTS[:0], 2)
    with pytest.raises(PartError, match=r"the placement is for counts \(batches, 4\), not \(40, 8\)"):
        ExpertPlacement.contiguous(4, 2).imbalance(COUNTS)


def test_uneven_sharing_is_refused():
    with pytest.raises(PartError, match="8 experts cannot be shared out evenly among 3 ranks: take a number that they divide"):
        ExpertPlacement.greedy(COUNTS, 3)
    with pytest.raises(PartError, match=r"each of the 2 ranks holds 2 of the 4 experts, not \(0, 0, 0, 1\)"):
        ExpertPlacement((0, 0, 0, 1), 2)
