"""The task ``multitask_regression``, and a small study on it."""

from __future__ import annotations

import pytest
import torch

from gatework.bench.runner import compare
from gatework.bench.tasks import make_task
from gatework.core import GateworkError


def test_tasks_of_a_cluster_are_related_and_others_are_not():
    made = make_task("multitask_regression", tasks=6, clusters=3, related=0.9, noise=0.0)
    assert made.cluster == [0, 0, 1, 1, 2, 2]
    y = torch.cat([made.splits[name][1] for name in ("train", "validation", "test")])
    assert y.shape == (4096 + 1024 + 2048, 6)
    torch.testing.assert_close(y.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.square().mean(0), torch.ones(6), rtol=0, atol=1e-4)
    together = torch.corrcoef(y.T).abs()
    same = torch.tensor(made.cluster)[:, None] == torch.tensor(made.cluster)
    assert together[same & ~torch.eye(6, dtype=torch.bool)].min() > 0.7
    assert together[~same].max() < 0.45


def test_unrelated_tasks_and_the_same_task():
    def correlation(related):
        y = make_task("multitask_regression", tasks=2, clusters=1, related=related, noise=0.0).splits["train"][1]
        return torch.corrcoef(y.T)[0, 1].abs().item()

    assert correlation(1.0) == pytest.approx(1.0, abs=1e-5)
    assert correlation(0.0) < 0.6


def test_targets_are_a_function_of_the_inputs_and_noise():
    """The same seed without noise gives the function; what noise adds has its standard deviation and is new for every example."""
    clean = make_task("multitask_regression", noise=0.0)
    noisy = make_task("multitask_regression", noise=0.3)
    for split in ("train", "validation", "test"):
        (x, y), (x2, y2) = clean.splits[split], noisy.splits[split]
        assert torch.equal(x, x2)
        assert (y2 - y).std().item() == pytest.approx(0.3, rel=0.02)
    inputs, function = clean.splits["test"]
    books = {row.numpy().tobytes(): targets for row, targets in zip(inputs, function, strict=True)}
    best = noisy.evaluate(lambda x: torch.stack([books[row.numpy().tobytes()] for row in x]), "test")
    assert best["mse"] == pytest.approx(0.09, rel=0.03)
    assert best["loss"] == best["mse"]
    assert not torch.equal(make_task("multitask_regression", seed=1).splits["train"][0], clean.splits["train"][0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": 5}, "clusters of equal size, at least one of one: 5 tasks, 4 clusters"),
        ({"clusters": 0}, "8 tasks, 0 clusters"),
        ({"related": 1.5}, "related is a share and noise at least 0, got 1.5 and 0.1"),
        ({"noise": -0.1}, "got 0.8 and -0.1"),
    ],
)
def test_wrong_options_meet_one_sentence(options, sentence):
    with pytest.raises(GateworkError, match=sentence):
        make_task("multitask_regression", **options)


def test_a_study_of_gates(tmp_path):
    comparison = compare(
        out=tmp_path / "gates", workers=0, quiet=True, task={"name": "multitask_regression", "tasks": 2, "clusters": 1},
        model={"d_model": 4, "d_ff": 4, "experts": 4},
        tokens=32 * 4, batch_size=32, tune=0, seeds=1, evaluations=1,
        variants={"static": "gate=dselect_k(static=true)", "permuted": "gate=permutation_search(gate=comet)"},
    )  # fmt: skip
    assert [record["status"] for record in comparison.records] == ["ok"] * 3
    finals = {record["variant"]: record for record in comparison.records if record["phase"] == "final"}
    assert set(finals) == {"baseline", "static", "permuted"}
    assert all(0.3 < record["score"] < 3 for record in finals.values())
    assert len(finals["static"]["metrics"]["gates.1.load"]) == 4
    assert finals["static"]["metrics"]["gates.0.chosen"] == 4
