"""Findings and their verdicts, what a claim writes down, and the pieces of the experiments."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from gatework.claims import claim, claims
from gatework.claims.base import FAILS, HOLDS, OPEN, Finding, Outcome, judged, slope
from gatework.claims.softmax_moe_theory import errors, gap, gaussian, hellinger, start
from gatework.cli import main
from gatework.core import papers
from gatework.core.errors import GateworkError
from gatework.experts.gaussian_moe import GaussianMoE

SIZES = (100, 1000, 10000)


def test_a_power_law_has_its_exponent():
    found = slope("x", {n: [3 * n**-0.25] * 4 for n in SIZES}, -0.3, -0.2, "-1/4")
    assert found.measured == pytest.approx(-0.25)
    assert found.interval == pytest.approx((-0.25, -0.25))
    assert found.verdict == HOLDS
    assert slope("x", {n: [n**-0.25] * 4 for n in SIZES}, -0.55, -0.45, "-1/2").verdict == FAILS


def test_a_slope_is_of_means_and_its_interval_covers():
    """Noisy replicates: the slope is numpy's of the log means, and 95% intervals hold the truth about that often."""
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        rows = {n: list(n**-0.5 * np.abs(draw.normal(size=40))) for n in SIZES}
        found = slope("x", rows, -0.6, -0.4, "-1/2")
        hits += found.interval[0] <= -0.5 <= found.interval[1]
        means = np.log([np.mean(row) for row in rows.values()])
        assert found.measured == pytest.approx(np.polyfit(np.log(SIZES), means, 1)[0])
    assert 87 <= hits <= 99


@pytest.mark.parametrize(("low", "high", "verdict"), [(0.0, 2.0, HOLDS), (1.5, 2.0, FAILS), (1.0, 2.0, OPEN)])
def test_verdicts(low, high, verdict):
    """The t interval of these five is 1 +- 0.11."""
    found = judged("x", "words", [0.9, 0.95, 1.0, 1.05, 1.1], low, high)
    assert found.interval == pytest.approx((0.9018, 1.0982), abs=1e-4)
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("words", "verdict"), [((HOLDS, HOLDS), HOLDS), ((HOLDS, OPEN), OPEN), ((OPEN, FAILS), FAILS), ((HOLDS, FAILS), FAILS)]
)
def test_a_claim_holds_where_every_finding_does(words, verdict, tmp_path):
    findings = tuple(Finding(f"thing {i}", "1", 1.0, (0.5, 1.5), word) for i, word in enumerate(words))
    outcome = Outcome("gla", "It is so.", findings, {"n": [1, 2]}, 3.0)
    path = outcome.write(tmp_path)
    assert outcome.verdict == verdict
    text = path.read_text()
    assert text.startswith(f"# gla: {verdict}\n\nIt is so.\n")
    assert f"| thing 1 | 1 | 1.000 | [0.500, 1.500] | {words[1]} |" in text
    said = json.loads((tmp_path / "gla.json").read_text())
    assert said["verdict"] == verdict
    assert [f["verdict"] for f in said["findings"]] == list(words)
    assert said["settings"] == {"n": [1, 2]}
    assert said["versions"]["torch"] == torch.__version__


def test_each_claim_is_of_a_paper():
    for name, found in claims().items():
        assert found.paper == name
        assert papers.paper(name).parts
        assert found.settings.keys() == (dict(found.settings) | dict(found.quick)).keys()


def test_a_wrong_name(capsys):
    with pytest.raises(GateworkError, match="did you mean 'softmax_moe_theory'"):
        claim("softmax_theory")
    assert main(["claims", "softmax_theory"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_list(capsys):
    assert main(["claims"]) == 0
    out = capsys.readouterr().out
    assert "softmax_moe_theory" in out
    assert max(map(len, out.splitlines())) <= 80


# softmax_moe_theory


def test_the_experiment_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(claim("softmax_moe_theory")), "quick", {"sizes": [60, 90], "replicates": 1, "restarts": 1})
    assert main(["claims", "softmax_moe_theory", "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines()[:-1])) <= 80
    said = json.loads((tmp_path / "softmax_moe_theory.json").read_text())
    assert len(said["findings"]) > 20
    assert said["settings"]["sizes"] == [60, 90]


def test_the_experiment_is_the_same_twice():
    first, second = (errors(gaussian(), lambda: GaussianMoE(1, 2), [50, 70], 2, 1, 0.05) for _ in range(2))
    assert first == second
    assert [len(row) for row in first["density"].values()] == [2, 2]


def test_the_start_is_the_truth_with_its_last_expert_doubled():
    true = gaussian()
    x = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
    made = start(true, GaussianMoE(1, 4).double(), torch.Generator(), noise=0.0)
    torch.testing.assert_close(made(x, x[:, 0]), true(x, x[:, 0]), rtol=0, atol=1e-12)
    assert hellinger(made, true) < 1e-7


def test_hellinger_of_two_normals():
    """1 - sqrt(2 s t / (s^2 + t^2)) exp(-d^2 / (4 (s^2 + t^2))) for standard deviations s, t and means d apart."""
    models = [GaussianMoE(1, 1).double() for _ in range(2)]
    with torch.no_grad():
        for model, mean, variance in zip(models, (0.0, 0.7), (1.0, 0.25), strict=True):
            model.slope.zero_()
            model.intercept.fill_(mean)
            model.log_variance.fill_(np.log(variance))
    wanted = 1 - np.sqrt(2 * 0.5 / 1.25) * np.exp(-(0.7**2) / (4 * 1.25))
    assert hellinger(*models) == pytest.approx(np.sqrt(wanted), abs=1e-6)


def test_a_split_expert_needs_a_place_more():
    assert gap(2, 1e-4) > 0.1
    assert gap(3, 1e-4) < 1e-4
