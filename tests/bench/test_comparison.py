from __future__ import annotations

import io
import itertools
import json
import math
import random
import re

import pytest
from rich.console import Console
from scipy import stats

from gatework.bench.comparison import Comparison, load
from gatework.bench.statistics import BETTER, UNDECIDED, WORSE
from gatework.core.errors import GateworkError


@pytest.fixture
def comparison(synthetic):
    return Comparison(*synthetic.build())


def rendered(comparison, width=80):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(comparison)
    return console.file.getvalue()


def words(comparison):
    return {name: verdict.word for name, verdict in comparison.verdicts.items()}


# Verdicts from records


def test_the_synthetic_study(comparison):
    assert words(comparison) == {"gated": UNDECIDED, "wide": BETTER, "moe": UNDECIDED, "gla": WORSE, "skip": UNDECIDED}
    wanted = "Better than the baseline: wide; worse than the baseline: gla; not told apart from it: gated, moe and skip."
    assert comparison.headline() == wanted
    assert comparison.names == ["baseline", "gated", "wide", "moe", "gla", "skip"]
    assert [row.name for row in comparison.rows] == comparison.names


def test_the_numbers_are_those_of_the_records(comparison, synthetic):
    _, records = synthetic.build()
    score = {(r["variant"], r["seed"]): r["score"] for r in records if r["phase"] == "final" and r["status"] == "ok"}
    for row in comparison.rows:
        own = [score[row.name, s] for s in range(4) if (row.name, s) in score]
        assert row.score == pytest.approx(sum(own) / len(own), rel=1e-13)
        if row.verdict:
            common = [s for s in range(4) if (row.name, s) in score]
            test = stats.ttest_rel([score[row.name, s] for s in common], [score["baseline", s] for s in common])
            assert (row.verdict.n, row.verdict.p) == (len(common), pytest.approx(test.pvalue, rel=1e-9))


@pytest.mark.parametrize(("lower", "wanted"), [(True, (BETTER, WORSE)), (False, (WORSE, BETTER))])
def test_the_direction_of_the_score(synthetic, lower, wanted):
    score = {"name": "accuracy", "unit": None, "lower_is_better": lower}
    scores = {"base": [0.50, 0.52, 0.48], "down": [0.30, 0.33, 0.29], "up": [0.70, 0.73, 0.67]}
    found = Comparison(*synthetic.small(scores, score=score))
    assert (found.verdicts["down"].word, found.verdicts["up"].word) == wanted
    assert found.score_line() == f"test accuracy, {'lower' if lower else 'higher'} is better"
    assert found.headline() == ("Better than the baseline: down; worse than the baseline: up." if lower else
                                "Better than the baseline: up; worse than the baseline: down.")  # fmt: skip


def test_headlines(synthetic):
    near = {"base": [1.0, 1.1, 1.2], "a": [1.1, 1.0, 1.25]}
    assert Comparison(*synthetic.small(near)).headline() == "No variant is told apart from the baseline."
    assert Comparison(*synthetic.small({"base": [1.0]})).headline() == "There is nothing but the baseline."


def test_selected_on_validation_reported_on_test(comparison, synthetic):
    # The test score decides; the validation score stands beside it and moves nothing.
    study, records = synthetic.build()
    for r in records:
        if r["phase"] == "final" and r["status"] == "ok":
            r["validation"] = {"loss": 99.0}
    moved = Comparison(study, records)
    assert {row.validation for row in moved.rows} == {99.0}
    assert moved.verdicts == comparison.verdicts
    assert [row.score for row in moved.rows] == [row.score for row in comparison.rows]
    # A tuning trial has a validation score only, and none of it enters the score.
    for r in records:
        if r["phase"] == "tune" and r["status"] == "ok":
            r["score"] = -5.0
    assert [row.score for row in Comparison(study, records).rows] == [row.score for row in comparison.rows]


# Broken, missing and odd runs


def test_broken_runs_are_shown(comparison):
    moe, skip = (next(row for row in comparison.rows if row.name == name) for name in ("moe", "skip"))
    assert (moe.diverged, moe.failed, len(moe.scores)) == ((2,), (), 3)
    assert (skip.diverged, skip.failed, len(skip.scores)) == ((), (3,), 3)
    assert comparison.notes() == [
        "moe: seed 2 diverged; compared on 3 of 4 seeds.",
        "skip: seed 3 failed; compared on 3 of 4 seeds.",
    ]
    wide = next(row for row in comparison.rows if row.name == "wide")
    assert (wide.trials, wide.bad_trials) == (4, 1)
    assert "diverged or failed: wide 1" in comparison.tuning_line()


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_run_without_a_finite_score_has_not_finished(synthetic, value):
    study, records = synthetic.small({"base": [2.0, 2.1, 2.2, 2.05], "a": [1.0, 1.1, 1.21, 1.0]})
    assert words(Comparison(study, records)) == {"a": BETTER}
    records[-1]["score"] = value  # Status "ok", yet no number.
    found = Comparison(study, records)
    row = found.rows[1]
    assert (len(row.scores), row.failed, row.verdict.n) == (3, (3,), 3)
    assert (row.verdict.word, row.verdict.note) == (UNDECIDED, "not called better: a run of it broke")
    assert "nan" not in str(found).lower().replace("nance", "")


def test_a_diverged_baseline_takes_the_word_worse_away(synthetic):
    found = Comparison(*synthetic.small({"base": [1.0, 1.1, 1.2, None], "a": [2.0, 2.1, 2.21, 2.0], "b": [0.5, 0.61, 0.7, 0.6]}))
    assert words(found) == {"a": UNDECIDED, "b": BETTER}
    assert found.notes()[0] == "base: seed 3 diverged."
    assert found.notes()[1] == "a: compared on 3 of 4 seeds; not called worse: a run of the baseline broke."


def test_all_runs_of_a_variant_diverged(synthetic):
    found = Comparison(*synthetic.small({"base": [1.0, 1.1], "a": [None, None]}))
    row = found.rows[1]
    assert (row.score, row.sd, row.diverged, row.verdict.difference) == (None, None, (0, 1), None)
    assert found.notes() == ["a: seeds 0 and 1 diverged; compared on 0 of 2 seeds; no seed has both runs."]
    line = next(line for line in str(found).splitlines() if line.startswith("a "))
    assert "not told apart" in line
    assert line.rstrip().endswith("2")


def test_nothing_has_run(synthetic):
    study, _ = synthetic.build()
    found = Comparison(study, [])
    assert found.headline() == "No run has finished."
    assert found.notes()[0] == "baseline: 4 seeds not run."
    assert "unknown (too few finished pairs of runs)" in found.smallest_line()
    assert found.rows[2].cost["parameters"] == 167_360 + 64 * 2  # What was measured before training.
    assert rendered(found)


def test_one_seed_says_why_there_is_no_verdict(synthetic):
    found = Comparison(*synthetic.small({"base": [1.0], "a": [0.1]}))
    assert words(found) == {"a": UNDECIDED}
    assert found.smallest_line() == "Smallest difference this study could have seen: unknown (one seed shows no spread)."
    assert found.notes() == ["a: one pair of runs shows no spread."]
    assert "-0.900 (n=1)" in str(found)


def test_records_of_other_variants_and_older_copies_are_ignored(synthetic):
    study, records = synthetic.small({"base": [1.0, 1.1], "a": [0.9, 0.8]})
    stray = {**records[0], "variant": "gone", "key": "final/gone/seed0"}
    found = Comparison(study, [*records, stray, records[0]])
    assert len(found.records) == 4


def test_the_order_of_the_records_does_not_matter(comparison, synthetic):
    study, records = synthetic.build()
    random.Random(0).shuffle(records)
    assert str(Comparison(study, records)) == str(comparison)


# The axis held equal


def costs(synthetic, match, **ratios):
    study, records = synthetic.small({"base": [1.0, 1.1], "a": [1.0, 1.2], "b": [1.1, 1.0]}, match=match)
    for r in records:
        for key, by_variant in ratios.items():
            r["cost"][key] *= by_variant.get(r["variant"], 1.0)
    return Comparison(study, records)


def axis(comparison, key):
    return next(axis for axis in comparison.axes if axis.key == key)


def test_the_axis_is_checked(synthetic):
    within = axis(costs(synthetic, "params", parameters={"a": 1.01, "b": 0.985}), "params")
    assert (within.matched, within.held, within.worst) == (True, True, "b")
    assert within.deviation == pytest.approx(0.015)
    beyond = costs(synthetic, "params", parameters={"a": 1.25}, seconds={"b": 3.0})
    assert axis(beyond, "params").held is False
    assert beyond.axes_line().startswith("Parameters NOT equal (up to 25%, a)")
    assert "executed training FLOPs 1.00x of the baseline; training seconds 1.00x to 3.00x of the baseline" in beyond.axes_line()
    assert "Parameters NOT equal" in " ".join(rendered(beyond).split())


def test_each_axis_can_be_the_equal_one(synthetic):
    flops = costs(synthetic, "flops", train_flops={"a": 1.001}, parameters={"a": 4.0})
    assert flops.axes_line().startswith("Executed training FLOPs held equal (up to 0.1%, a); parameters 1.00x to 4.00x")
    # Seconds are noisy: a tenth is allowed, not more.
    assert axis(costs(synthetic, "seconds", seconds={"a": 1.09}), "seconds").held is True
    assert axis(costs(synthetic, "seconds", seconds={"a": 1.12}), "seconds").held is False
    assert costs(synthetic, "params").axes_line().startswith("Parameters held equal (exactly)")
    nothing = costs(synthetic, "none", parameters={"b": 2.0})
    assert nothing.axes_line().startswith("Nothing held equal but the data: parameters 1.00x to 2.00x")
    assert all(not a.matched for a in nothing.axes)


def test_an_unmeasured_axis_says_so(synthetic):
    study, records = synthetic.small({"base": [1.0, 1.1], "a": [1.0, 1.2]}, match="flops")
    for r in records:
        del r["cost"]["train_flops"]
    found = Comparison(study, records)
    assert axis(found, "flops").held is None
    assert found.axes_line().startswith("Executed training FLOPs not measured")


# Tuning and training saved


def test_tuning_is_counted(comparison, synthetic):
    assert comparison.tuning_line() == "Tuning: 4 trials each, chosen on validation; diverged or failed: wide 1."
    study, records = synthetic.build()
    fewer = [r for r in records if r["key"] not in ("tune/gla/trial0", "tune/gla/trial1")]
    assert "NOT complete: gla 2" in Comparison(study, fewer).tuning_line()
    untuned = Comparison(*synthetic.small({"base": [1.0], "a": [1.0]}))
    assert untuned.tuning_line() == "Tuning: none; every variant used the same learning rate."


def test_training_saved_is_read_off_the_mean_curves(comparison, synthetic):
    _, records = synthetic.build()
    assert comparison.rows[0].saved is None
    wide = next(row for row in comparison.rows if row.name == "wide")

    def mean(name):
        runs = [r for r in records if r["variant"] == name and r["phase"] == "final" and r["status"] == "ok"]
        steps = [[(p["tokens"], p["validation_loss"]) for p in r["curve"] if p["validation_loss"] is not None] for r in runs]
        return [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*steps, strict=True)]

    goal, curve = mean("baseline")[-1][1], mean("wide")
    (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(curve) if b[1] <= goal < a[1])
    assert wide.saved == pytest.approx(1 - (x0 + (x1 - x0) * (y0 - goal) / (y0 - y1)) / 2e6, rel=1e-9)
    assert wide.saved > 0 > next(row.saved for row in comparison.rows if row.name == "gla")
    assert "wide +8.4%" in comparison.saved_line()


# The terminal


LONG = "a_variant_with_a_name_that_nobody_should_give_but_somebody_will"


def assert_fits(text, comparison):
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    for word in words(comparison).values():
        assert word in text


def test_the_table_fits_80_columns(comparison):
    text = rendered(comparison)
    assert_fits(text, comparison)
    for row in comparison.rows:
        line = next(line for line in text.splitlines() if re.match(rf"\s*{row.name} ", line))
        assert f"{row.score:.3f}" in line
        assert (row.verdict.word if row.verdict else "baseline") in line
        if row.verdict:
            half = (row.verdict.interval[1] - row.verdict.interval[0]) / 2
            assert f"{row.verdict.difference:+.3f} ±{half:.3f}" in line


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0, 12_345.0, 1e6])
def test_no_scale_breaks_the_table(synthetic, scale):
    values = {"base": [1.0, 1.05, 1.1], LONG: [0.8, 0.87, 0.88], "b": [0.99, None, 1.12]}
    study, records = synthetic.small(
        {name: [None if v is None else v * scale for v in vs] for name, vs in values.items()},
        score={"name": "mean_squared_error_per_output", "unit": "squared metres", "lower_is_better": True}, unit="observation",
    )  # fmt: skip
    for r in records:
        if r["cost"]:
            r["cost"] |= {"parameters": 123_456_789_012, "train_flops_per_token": 9.87e14, "seconds": 359_999.0}
    found = Comparison(study, records)
    text = rendered(found)
    assert_fits(text, found)
    rows = text.split("─\n")[1].split("Smallest")[0].splitlines()
    # The name is folded, not cut; every number stands whole in its line.
    rows = text.split("─\n")[1].split("\n\n")[0].splitlines()
    assert "".join(re.split(r"\s{2,}", line)[0] for line in rows) == f"base{LONG}b"
    for row, name in zip(found.rows, ("base ", "a_varia", "b "), strict=True):
        line = next(line for line in rows if line.startswith(name) and "G" in line).split()
        mean, params, flops, time, broken = line[1], *line[-4:]
        assert float(mean) == pytest.approx(row.score, rel=5e-3)
        assert (params, flops, time, broken) == ("123G", "987T", "4d04h", "1" if name == "b " else "0")
        if row.verdict:
            assert float(line[2]) == pytest.approx(row.verdict.difference, rel=5e-3, abs=5e-4 * scale)
            assert float(line[3].strip("±")) == pytest.approx(row.verdict.interval[1] - row.verdict.difference, rel=5e-3)


def test_a_wide_terminal_and_plain_text_agree(comparison):
    assert str(comparison).split() == rendered(comparison, 80).split()
    assert "\x1b" not in str(comparison)
    assert max(map(len, rendered(comparison, 200).splitlines())) <= 200


def test_markup_in_names_is_text(synthetic):
    found = Comparison(*synthetic.small({"base": [1.0, 1.1], "[red]x[/red]": [1.0, 1.2], "[/]": [1.0, 1.2]}))
    text = rendered(found)
    assert "[red]x[/red]" in text
    assert "[/]" in text


def test_more_digits_than_the_noise_are_not_printed(synthetic):
    # Scores that scatter in the second decimal are printed with three, whatever the records hold.
    found = Comparison(*synthetic.small({"base": [1.01234567, 1.05234567, 1.0923456], "a": [1.0, 1.07, 1.06]}))
    assert found.decimals == 3
    # Equal scores up to the fourth decimal are not printed as equal.
    fine = Comparison(*synthetic.small({"base": [1.00012, 1.00014, 1.00016], "a": [1.00032, 1.00033, 1.00037]}))
    assert fine.rows[0].score != fine.rows[1].score
    assert f"{fine.rows[0].score:.{fine.decimals}f}" != f"{fine.rows[1].score:.{fine.decimals}f}"


# Files


def test_load(comparison, synthetic, tmp_path):
    study, records = synthetic.build()
    (tmp_path / "records").mkdir()
    (tmp_path / "study.json").write_text(json.dumps(study))
    for r in records:
        path = tmp_path / "records" / f"{r['key']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(r))
    found = load(tmp_path)
    assert str(found) == str(comparison)
    assert repr(found).startswith("<Comparison shakespeare: Better than the baseline: wide;")


def test_load_refuses_what_is_no_study(tmp_path):
    with pytest.raises(GateworkError, match=r"holds no study: there is no study\.json in it"):
        load(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(GateworkError, match="holds no study that this version can read: KeyError 'baseline'"):
        load(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(GateworkError, match="cannot be read"):
        load(tmp_path)
