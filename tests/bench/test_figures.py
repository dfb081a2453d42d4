from __future__ import annotations

import json
import re

import pytest

from gatework.bench import figures
from gatework.bench.comparison import Comparison, finished


@pytest.fixture(scope="module")
def comparison(synthetic):
    return Comparison(*synthetic.build())


def means_of(figure):
    """The large mark of each variant: the traces with error bars."""
    return {trace["meta"]: (trace["x"][0], trace["y"][0]) for trace in figure.data if "error_y" in trace}


def front_of(figure):
    return next(trace for trace in figure.data if trace["name"] == "Pareto front")


def test_quality_shows_every_run_and_every_mean(comparison):
    plots = {figure.id: figure for figure in figures.quality(comparison)}
    assert list(plots) == ["pareto-flops", "pareto-seconds", "pareto-parameters"]
    for key, field in (("pareto-flops", "train_flops"), ("pareto-seconds", "seconds"), ("pareto-parameters", "parameters")):
        means = means_of(plots[key])
        assert means == {row.name: (row.cost[field], row.score) for row in comparison.rows}
        small = {trace["meta"]: trace for trace in plots[key].data if "text" in trace}
        for row in comparison.rows:
            assert sorted(small[row.name]["y"]) == sorted(row.scores.values())


def test_the_front_by_hand(comparison):
    plots = {figure.id: figure for figure in figures.quality(comparison)}
    means = means_of(plots["pareto-flops"])
    wanted = [
        point for point in means.values()
        if not any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in means.values())
    ]  # fmt: skip
    front = front_of(plots["pareto-flops"])
    assert list(zip(front["x"], front["y"], strict=True)) == sorted(wanted)
    assert plots["pareto-flops"].caption == "On the front: moe and wide."
    assert plots["pareto-parameters"].caption == "Parameters are held equal in this study: only the heights differ."


def test_the_front_goes_up_for_accuracy(synthetic):
    study, records = synthetic.small(
        {"base": [0.5, 0.6], "cheap": [0.4, 0.45], "good": [0.8, 0.9], "bad": [0.3, 0.3]},
        score={"name": "accuracy", "lower_is_better": False},
    )
    flops = {"base": 2.0, "cheap": 1.0, "good": 3.0, "bad": 3.0}
    for r in records:
        r["cost"]["train_flops"] = flops[r["variant"]]
    front = front_of(figures.quality(Comparison(study, records))[0])
    assert (front["x"], front["y"]) == ([1.0, 2.0, 3.0], pytest.approx([0.425, 0.55, 0.85]))


def test_curves_have_every_measurement(comparison):
    by_tokens, by_seconds = figures.curves(comparison)
    for figure, field in ((by_tokens, "tokens"), (by_seconds, "seconds")):
        lines = {t["meta"]: t for t in figure.data if t["showlegend"]}
        assert list(lines) == comparison.names
        for row in comparison.rows:
            runs = [r for r in comparison.runs(row.name, "final") if finished(r)]
            points = [[(p[field], p["validation_loss"]) for p in r["curve"] if p["validation_loss"] is not None] for r in runs]
            assert len(lines[row.name]["x"]) == len(points[0]) == 12
            for i, (x, y) in enumerate(zip(lines[row.name]["x"], lines[row.name]["y"], strict=True)):
                assert x == pytest.approx(sum(p[i][0] for p in points) / len(points))
                assert y == pytest.approx(sum(p[i][1] for p in points) / len(points))
            band = next(t for t in figure.data if t.get("fill") and t["meta"] == row.name)
            assert max(band["y"]) == max(v for p in points for _, v in p)
            assert min(band["y"]) == min(v for p in points for _, v in p)


def test_a_broken_run_is_drawn_to_where_it_ended(comparison):
    figure = figures.curves(comparison)[0]
    (broken,) = [t for t in figure.data if t["line"].get("dash") == "dash"]
    record = next(r for r in comparison.records if r["key"] == "final/moe/seed2")
    assert broken["x"] == [p["tokens"] for p in record["curve"]]
    assert "seed 2 diverged" in broken["hovertemplate"]
    assert "dashed" in figure.caption


def test_the_zoom_holds_the_second_half_of_every_finished_run(comparison):
    for figure in figures.curves(comparison):
        for trace in figure.data:
            if trace["showlegend"]:
                (x0, x1), (y0, y1) = figure.zoom["x"], figure.zoom["y"]
                assert x0 <= trace["x"][-1] <= x1
                assert all(y0 <= y <= y1 for y in trace["y"][len(trace["y"]) // 2 :])


@pytest.fixture
def longer(synthetic):
    """A study whose runs were tested at three lengths, with two scores; one run diverged."""
    scores = {"base": [0.1, 0.2, 0.3], "a": [0.2, 0.3, None], "b": [0.0, 0.0, 0.0]}
    study, records = synthetic.small(scores, score={"name": "error", "unit": "share wrong", "lower_is_better": True})
    for r in records:
        if r["score"] is not None:
            by_length = {n: r["score"] * n / 16 for n in (16, 32, 64)}
            rows = {f"row_error_at_{n}": 1 + score for n, score in by_length.items()}
            r["test"] = {"loss": 1.0, "error": r["score"]} | rows | {f"error_at_{n}": score for n, score in by_length.items()}
    return Comparison(study, records)


def test_scores_against_length(longer):
    own, other = figures.lengths(longer)
    assert (own.id, own.title, other.id, other.title) == (
        "length-error", "Error against length", "length-row_error", "Row error against length"
    )
    lines = {trace["meta"]: trace for trace in own.data}
    assert list(lines) == ["base", "a", "b"]
    assert lines["base"]["y"] == pytest.approx([0.2, 0.4, 0.8])
    assert lines["a"]["y"] == pytest.approx([0.25, 0.5, 1.0])
    assert [trace["y"][0] for trace in other.data] == pytest.approx([1.2, 1.25, 1.0])
    # By hand: the half width of a 95% interval is t(n - 1) sd / sqrt(n), t(2) = 4.3027, t(1) = 12.706.
    assert lines["base"]["error_y"]["array"] == pytest.approx([4.3027 * 0.1 * k / 3**0.5 for k in (1, 2, 4)], rel=1e-4)
    assert lines["a"]["error_y"]["array"][0] == pytest.approx(12.706 * 0.1 / 2**0.5 / 2**0.5, rel=1e-4)
    assert lines["b"]["error_y"]["array"] == [0, 0, 0]
    assert all(trace["error_y"]["visible"] for trace in own.data)
    assert own.layout["xaxis"]["tickvals"] == [16, 32, 64]
    assert own.layout["yaxis"]["title"]["text"] == "test error, share wrong"
    assert own.caption == "Dotted: the length of training, 16. Bars: 95% intervals of the mean over seeds."
    assert other.caption == f"Share of the sequences with any label missed. {own.caption}"
    # Variants stand a little beside each other, each at its lengths.
    for trace in own.data:
        assert trace["text"] == ["length 16", "length 32", "length 64"]
        assert [round(x / n, 1) for x, n in zip(trace["x"], (16, 32, 64), strict=True)] == [1.0] * 3
    assert len({trace["x"][0] for trace in own.data}) == 3


def test_one_seed_has_no_interval_over_seeds(synthetic):
    study, records = synthetic.small({"base": [0.1], "a": [0.2]})
    for r in records:
        r["test"] = {"loss_at_8": r["score"], "loss_at_16": 2 * r["score"]}
    (figure,) = figures.lengths(Comparison(study, records))
    assert [trace["y"] for trace in figure.data] == [[0.1, 0.2], [0.2, 0.4]]
    assert not any(trace["error_y"]["visible"] for trace in figure.data)
    assert figure.caption.endswith("One seed: no intervals.")


def test_a_study_at_one_length_has_no_figure_of_lengths(synthetic):
    assert figures.lengths(Comparison(*synthetic.small({"base": [0.1, 0.2], "a": [0.2, 0.3]}))) == []


def test_tuning(comparison):
    rates, best = figures.tuning(comparison)
    lines = {t["meta"]: t for t in rates.data if t["showlegend"]}
    assert [len(lines[name]["x"]) for name in comparison.names] == [4, 4, 3, 4, 4, 4]
    for name in comparison.names:
        trials = {r["learning_rate"]: r["score"] for r in comparison.runs(name, "tune") if finished(r)}
        assert dict(zip(lines[name]["x"], lines[name]["y"], strict=True)) == trials
    crosses = [t for t in rates.data if t["marker"]["symbol"] == "x-thin-open"]
    assert [(t["meta"], t["x"], t["text"]) for t in crosses] == [("wide", [0.02], ["diverged"])]
    ringed = {t["meta"]: t["x"] for t in rates.data if t["marker"]["symbol"] == "circle-open"}
    assert ringed == {name: [0.0093] for name in comparison.names}
    for trace in best.data:
        assert trace["x"] == [1, 2, 3, 4]
        assert trace["y"] == sorted(trace["y"], reverse=True)
        done = [r["score"] for r in comparison.runs(trace["meta"], "tune") if finished(r)]
        assert trace["y"][-1] == pytest.approx(min(done))
    # The broken trial of ``wide`` counts as the worst score of all.
    worst = max(r["score"] for r in comparison.records if r["phase"] == "tune" and finished(r))
    wide = next(t for t in best.data if t["meta"] == "wide")
    done = [r["score"] for r in comparison.runs("wide", "tune") if finished(r)]
    assert wide["y"][0] == pytest.approx((sum(done) + worst) / 4)


def test_no_tuning_no_plots(synthetic):
    assert figures.tuning(Comparison(*synthetic.small({"base": [1.0], "a": [1.0]}))) == []


def test_inside(comparison):
    plots = {figure.title: figure for figure in figures.inside(comparison)}
    assert list(plots) == ["moe: load", "moe: entropy", "skip: kept"]
    load = plots["moe: load"]
    assert [t["name"] for t in load.data] == ["blocks.0", "blocks.1", "blocks.2"]
    for layer, trace in enumerate(load.data):
        runs = [r["metrics"][f"blocks.{layer}.feedforward.gate.load"] for r in comparison.runs("moe", "final") if finished(r)]
        runs = [sorted(load, reverse=True) for load in runs]
        assert trace["y"] == pytest.approx([sum(column) / len(runs) for column in zip(*runs, strict=True)])
    assert load.layout["shapes"][0]["y0"] == 1 / 8
    assert plots["skip: kept"].data[0]["y"] == pytest.approx([0.905, 0.76, 0.61], abs=0.03)


def test_routing(comparison):
    """Loads by rank and the other numbers of the gates over time: means over layers, then over the finished seeds."""
    plots = {figure.title: figure for figure in figures.routing(comparison)}
    assert list(plots) == ["moe: load over time", "Entropy over time"]
    runs = [r["curve"] for r in comparison.runs("moe", "final") if finished(r)]
    assert len(runs) == 3

    def layers(point, leaf):
        return [point["metrics"][f"blocks.{layer}.feedforward.gate.{leaf}"] for layer in range(3)]

    told = [[p for p in curve if "metrics" in p] for curve in runs]
    assert len(told[0]) == 20
    lines = plots["moe: load over time"].data
    assert len(lines) == 8
    for rank, line in enumerate(lines):
        assert line["x"] == [p["tokens"] for p in told[0]]
        for i, mean in enumerate(line["y"]):
            assert mean == pytest.approx(sum(sorted(load)[-1 - rank] for curve in told for load in layers(curve[i], "load")) / 9)
    assert sum(line["y"][5] for line in lines) == pytest.approx(1)
    (entropy,) = plots["Entropy over time"].data
    assert entropy["y"][4] == pytest.approx(sum(sum(layers(curve[4], "entropy")) for curve in told) / 9)


def test_colours_and_symbols_stay_with_the_variant(comparison):
    every = [*figures.quality(comparison), *figures.curves(comparison), *figures.tuning(comparison)]
    colours, symbols = {}, {}
    for figure in every:
        for trace in figure.data:
            if "meta" in trace and trace["showlegend"]:
                colours.setdefault(trace["meta"], set()).add(trace["line"]["color"])
                symbols.setdefault(trace["meta"], set()).add(trace["marker"]["symbol"])
    assert all(len(found) == 1 for found in [*colours.values(), *symbols.values()])
    assert len({min(found) for found in colours.values()}) == len(comparison.names)


def test_twenty_variants_differ_in_colour_or_symbol(synthetic):
    comparison = Comparison(*synthetic.small({f"v{i}": [1.0, 1.1] for i in range(20)}))
    looks = {(figures.colour(comparison, n), figures.symbol(comparison, n)) for n in comparison.names}
    assert len(looks) == 20


def test_every_colour_is_one_of_the_pages(comparison):
    every = [*figures.quality(comparison), *figures.curves(comparison), *figures.tuning(comparison)]
    every += [*figures.routing(comparison), *figures.inside(comparison)]
    tokens = set(re.findall(r'"(@[^"]*)"', json.dumps([figure.spec() for figure in every])))
    assert tokens
    assert all(re.fullmatch(r"@(c[0-8]|muted|surface|ink)(/[\d.]+)?", token) for token in tokens)
    assert len({figure.id for figure in every}) == len(every)
