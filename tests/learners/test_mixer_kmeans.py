"""The update of the gate against loops over the equations, and the order of the inner steps."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
import torch.nn.functional as F

from gatework.learners import KMeansLstsqGateUpdate
from gatework.learners.mixer_kmeans import assign, cluster
from gatework.models import Classifier
from gatework.models.environments import EnvironmentNetwork

ENVIRONMENTS, EXPERTS = 6, 3


def learner(seed: int = 0, **settings) -> KMeansLstsqGateUpdate:
    torch.manual_seed(seed)
    options = {"clip_norm": None, "lr": 0.1} | settings
    model = EnvironmentNetwork(1, 2, ENVIRONMENTS, EXPERTS, context=4, d_ff=5).double()
    with torch.no_grad():  # Experts that differ.
        for p in model.mixer.experts.parameters():
            p.add_(0.3 * torch.randn_like(p))
    optimizer = torch.optim.SGD(model.parameters(), lr=options.pop("lr"))
    return KMeansLstsqGateUpdate(model, F.mse_loss, optimizer, total_steps=10, **options)


def batch(rows: int = 60, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
    x[:, 0] = torch.arange(rows) % ENVIRONMENTS
    return x, torch.randn(rows, 2, dtype=torch.float64, generator=generator)


def tight(rule) -> torch.Tensor:
    """Contexts in three tight clusters, environments 0 and 3, 1 and 4, 2 and 5; centroids near them."""
    centres = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.float64)
    noise = 0.01 * torch.randn(ENVIRONMENTS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rule.mixer.contexts.data = centres[torch.arange(ENVIRONMENTS) % 3] + noise
    rule.centroids = centres + 0.1
    return centres


def slow_kmeans(points, centroids):
    centroids = [c.clone() for c in centroids]
    for _ in range(20):
        old = [c.clone() for c in centroids]
        near = []
        for p in points:
            distances = [(p - c).abs().mean().item() for c in centroids]
            near.append(distances.index(min(distances)))
        for j in range(len(centroids)):
            members = [p for p, n in zip(points, near, strict=True) if n == j]
            if not members:
                return None
            centroids[j] = torch.stack(members).mean(0)
        if max((c - o).abs().max().item() for c, o in zip(centroids, old, strict=True)) < 1e-4:
            return near, torch.stack(centroids)
    return None


def test_kmeans_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    outcomes = set()
    for _ in range(60):
        points = torch.randn(12, 3, dtype=torch.float64, generator=generator)
        start = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        ours, expected = cluster(points, start), slow_kmeans(points, start)
        outcomes.add(expected is None)
        assert (ours is None) == (expected is None)
        if expected is not None:
            assert ours[0].tolist() == expected[0]
            torch.testing.assert_close(ours[1], expected[1], rtol=0, atol=1e-12)
    assert outcomes == {True, False}


def test_kmeans_measures_absolute_differences_and_gives_up():
    # (3, 0) is nearer to the first by absolute differences (3 against 4), to the second by squares (9 against 8).
    points = torch.tensor([[0.0, 0], [0, 0], [3, 0], [5, 2], [5, 2]], dtype=torch.float64)
    assert cluster(points, points[[0, 3]])[0].tolist()[2] == 0
    assert cluster(points, torch.tensor([[0.0, 0], [100, 100]], dtype=torch.float64)) is None  # Empty.
    line = torch.linspace(0, 1, 1000, dtype=torch.float64)[:, None]  # Ten centroids spread from one end for longer than 20 rounds.
    assert cluster(line, torch.linspace(0, 0.02, 10, dtype=torch.float64)[:, None]) is None



def test_each_cluster_gets_an_expert_of_its_own():
    table = torch.tensor([[0.1, 0.2, 0.9], [0.15, 0.8, 0.9], [0.1, 0.1, 0.5]], dtype=torch.float64)
    assert assign(table, "greedy") == [0, 1, 2]
    best = min(itertools.permutations(range(3)), key=lambda order: sum(table[j, e].item() for j, e in enumerate(order)))
    assert assign(table, "hungarian") == list(best) != [0, 1, 2]
    for _ in range(20):
        assert sorted(assign(torch.rand(5, 5), "greedy")) == list(range(5))


def test_the_table_holds_every_expert_s_loss_on_every_environment():
    rule = learner()
    x, y = batch()
    keep = x[:, 0] != 4
    table = rule.loss_table((x[keep], y[keep]))
    for n in range(ENVIRONMENTS):
        for e in range(EXPERTS):
            if n == 4:
                assert table[n, e].isnan()
                continue
            rows = x[:, 0] == n
            with rule.mixer.only(e), torch.no_grad():
                expected = (rule.model(x[rows]) - y[rows]).square().mean()
            torch.testing.assert_close(table[n, e], expected, rtol=0, atol=1e-12)
    assert rule.model.training


@pytest.mark.parametrize("missing", [None, 4])
def test_the_gate_is_the_least_squares_solution(missing):
    rule = learner()
    tight(rule)
    x, y = batch()
    keep = x[:, 0] != (-1 if missing is None else missing)
    table = rule.loss_table((x[keep], y[keep])).tolist()
    state = rule.generator.get_state()
    assert rule.update_gate((x[keep], y[keep]))
    # Cluster j holds the environments j and j + 3.
    chosen = {}
    for j in range(EXPERTS):
        medians = []
        for e in range(EXPERTS):
            medians.append(statistics.median([table[n][e] for n in (j, j + 3) if n != missing]))
        chosen[j] = min((e for e in range(EXPERTS) if e not in chosen.values()), key=lambda e: medians[e])
    targets = torch.zeros(ENVIRONMENTS, EXPERTS, dtype=torch.float64)
    for n in range(ENVIRONMENTS):
        targets[n, chosen[n % 3]] = 1
    noise = 1e-4 * torch.randn(ENVIRONMENTS, 4, dtype=torch.float64, generator=torch.Generator().set_state(state))
    inputs = torch.cat([rule.mixer.contexts.detach() + noise, torch.ones(ENVIRONMENTS, 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(rule.mixer.weight, torch.linalg.pinv(inputs) @ targets, rtol=0, atol=1e-7)
    # Tight clusters and E <= d + 1: every environment goes to its cluster's expert.
    assert rule.mixer.route(rule.mixer.contexts).experts[:, 0].tolist() == [chosen[n % 3] for n in range(ENVIRONMENTS)]
    assert sorted(chosen.values()) == [0, 1, 2]
    assert rule.mixer.weight.grad is None


def test_relabelled_clusters_give_the_same_pairs_where_losses_are_apart():
    pairs = []
    for order in itertools.permutations(range(EXPERTS)):
        rule = learner()
        centres = tight(rule)
        x, _ = batch()
        y = torch.zeros(60, 2, dtype=torch.float64)
        for n in range(ENVIRONMENTS):  # Environment n is what expert (n + 1) mod 3 says.
            rows = x[:, 0] == n
            with rule.mixer.only((n + 1) % 3), torch.no_grad():
                y[rows] = rule.model(x[rows])
        rule.centroids = centres[list(order)] + 0.1
        assert rule.update_gate((x, y))
        pairs.append(rule.mixer.route(rule.mixer.contexts).experts[:, 0].tolist())
    assert pairs == [[1, 2, 0, 1, 2, 0]] * 6


def test_an_empty_cluster_skips_the_update_and_forgets_the_centroids():
    rule = learner()
    rule.mixer.contexts.data.fill_(1.0)  # One place for all.
    before = rule.mixer.weight.clone()
    assert not rule.update_gate(batch())
    assert rule.centroids is None
    assert torch.equal(rule.mixer.weight, before)
    tight(rule)
    x, y = batch()
    keep = (x[:, 0] != 1) & (x[:, 0] != 4)  # All of one cluster.
    assert not rule.update_gate((x[keep], y[keep]))
    assert torch.equal(rule.mixer.weight, before)


def test_centroids_start_small_and_stay_warm():
    rule = learner()
    seen = []

    def spy(points, centroids):
        seen.append(centroids.clone())
        return cluster(points, centroids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatework.learners.mixer_kmeans.cluster", spy)
        tight(rule)
        rule.centroids = None
        rule.update_gate(batch())
        centres = tight(rule)
        rule.update_gate(batch())
        rule.update_gate(batch())
    assert seen[0].abs().max() <= 1e-3
    assert seen[0].abs().max() > 1e-4
    torch.testing.assert_close(seen[2], rule.mixer.contexts.detach().view(2, 3, 4).mean(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(seen[1], centres + 0.1, rtol=0, atol=0)


def test_inner_steps_alternate_with_their_proximal_terms():
    rule = learner(context_steps=2, expert_steps=3, proximal=5.0, update_gate_every=2)
    other = learner(context_steps=2, expert_steps=3, proximal=5.0, update_gate_every=2)
    for some in (rule, other):
        tight(some)
    data = batch()
    said = rule.step(data)
    contexts = [other.mixer.contexts]
    rest = [p for p in other.model.parameters() if p is not contexts[0]]
    done = 0
    for group, count in ((contexts, 2), (rest, 3)):
        old = [p.detach().clone() for p in group]
        for _ in range(count):
            loss = F.mse_loss(other.model(data[0]), data[1])
            if not done:
                assert said["loss"] == loss
            flat = torch.cat([(p - o).flatten() for p, o in zip(group, old, strict=True)])
            grads = torch.autograd.grad(loss + 5.0 / 2 * flat.square().mean(), group, materialize_grads=True)
            with torch.no_grad():
                for p, g in zip(group, grads, strict=True):
                    p -= 0.1 * g
            if done in (0, 2, 4):
                other.update_gate(data)
            done += 1
    torch.testing.assert_close(dict(rule.model.state_dict()), dict(other.model.state_dict()), rtol=0, atol=1e-12)
    assert rule.steps == 1


def test_families_are_told_apart():
    """Two families of lines, y = slope x with slopes about +2 and -2; contexts, experts and gate from scratch."""
    torch.manual_seed(0)
    model = EnvironmentNetwork(1, 1, 8, experts=2, context=4, d_ff=16).double()
    slopes = torch.tensor([2.0, 2.1, 1.9, 2.05, -2, -2.1, -1.9, -2.05], dtype=torch.float64)
    x = torch.randn(400, 2, dtype=torch.float64)
    x[:, 0] = torch.arange(400) % 8
    y = slopes[torch.arange(400) % 8, None] * x[:, 1:]
    rule = KMeansLstsqGateUpdate(model, F.mse_loss, torch.optim.Adam(model.parameters(), lr=0.01), total_steps=80)
    first = rule.step((x, y))["loss"]
    for _ in range(79):
        last = rule.step((x, y))["loss"]
    experts = model.mixer.route(model.mixer.contexts).experts[:, 0].tolist()
    assert experts[:4] == [experts[0]] * 4
    assert experts[4:] == [1 - experts[0]] * 4
    assert last < 0.02 * first


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"context_steps": 0}, "at least 1 and proximal 0"), ({"proximal": -1.0}, "got 1, 1, 1 and -1.0")],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        learner(**settings)


def test_wrong_models():
    model = Classifier((1, 4), classes=3, d_model=8)
    with pytest.raises(ValueError, match="needs a model with 'environment', which Classifier has not"):
        KMeansLstsqGateUpdate(model, F.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
    gated = EnvironmentNetwork(1, 1, 3, gate="topk(k=1)")
    with pytest.raises(ValueError, match="this model's TopK learns by gradient; build it without a gate"):
        KMeansLstsqGateUpdate(gated, F.mse_loss, torch.optim.SGD(gated.parameters(), lr=0.1))
