"""The report's plots, as Plotly figures in plain dictionaries.

Colours are written as names that the page resolves in the reader's theme: ``@c2`` is the colour of the third variant,
``@c2/0.2`` the same at an opacity of 0.2, ``@ink``, ``@muted`` and ``@surface`` are the page's own. A variant has the same
colour and symbol in every plot.
"""

from __future__ import annotations

import html
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from gatework.bench.comparison import AXES, Comparison, finished
from gatework.bench.formats import listed
from gatework.bench.statistics import ALPHA, expected_best, mean_curve, mean_sd, paired, pareto

#: How many colours the page has; more variants than that start again, with other symbols.
COLOURS = 9
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "hexagon", "cross", "pentagon", "bowtie")


@dataclass(frozen=True)
class Figure:
    """One plot: an id for the page, a title, what it shows in a sentence, traces, layout, and a range of the y axis to zoom to."""

    id: str
    title: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    zoom: dict[str, list[float]] | None = field(default=None)

    def spec(self) -> dict[str, Any]:
        """What the page's script needs."""
        return {"id": self.id, "data": self.data, "layout": self.layout, "zoom": self.zoom}


def colour(comparison: Comparison, name: str, opacity: float | None = None) -> str:
    """The token of a variant's colour."""
    token = f"@c{comparison.names.index(name) % COLOURS}"
    return token if opacity is None else f"{token}/{opacity}"


def symbol(comparison: Comparison, name: str) -> str:
    """The variant's plotting symbol."""
    return SYMBOLS[comparison.names.index(name) % len(SYMBOLS)]


def plain(text: str) -> str:
    """Text that Plotly shows as it is: its labels understand a little HTML."""
    return html.escape(text, quote=False)


def score_title(comparison: Comparison, split: str) -> str:
    """An axis title: what the score is, in which unit, which way is better."""
    score = comparison.study["score"]
    unit = f", {score['unit']}" if score.get("unit") else ""
    return plain(f"{split} {score['name'].replace('_', ' ')}{unit}")


def _unit(comparison: Comparison) -> str:
    return str(comparison.study.get("unit", "token")) + "s"


# Quality against cost


def quality(comparison: Comparison) -> list[Figure]:
    """Test score against executed FLOPs, seconds and parameters, with the Pareto front."""
    axes = (
        ("flops", "train_flops", "Executed training FLOPs"),
        ("seconds", "seconds", "Training time (s)"),
        ("parameters", "parameters", "Parameters"),
    )
    return [_scatter(comparison, f"pareto-{key}", field, title) for key, field, title in axes]


def _scatter(comparison: Comparison, id: str, field: str, title: str) -> Figure:
    data: list[dict[str, Any]] = []
    points = []
    for row in comparison.rows:
        cost = row.cost.get(field)
        if row.score is None or cost is None:
            continue
        points.append((row.name, cost, row.score))
        mark = {"color": colour(comparison, row.name), "symbol": symbol(comparison, row.name)}
        runs = [r for r in comparison.runs(row.name, "final") if finished(r) and r["cost"].get(field) is not None]
        data.append(
            _line(
                comparison, row.name, [r["cost"][field] for r in runs], [r["score"] for r in runs],
                mode="markers", marker=mark | {"size": 6, "opacity": 0.35}, text=[f"seed {r['seed']}" for r in runs],
                hovertemplate="%{text}<br>%{x:.4s}<br>%{y:.4f}",
            )
        )  # fmt: skip
        error = {"type": "data", "array": [row.sd or 0.0], "visible": row.sd is not None, "thickness": 1.5, "width": 5}
        data.append(
            _line(
                comparison, row.name, [cost], [row.score], mode="markers",
                marker=mark | {"size": 12, "line": {"width": 1.5, "color": "@surface"}},
                error_y=error | {"color": colour(comparison, row.name)}, hovertemplate="mean<br>%{x:.4s}<br>%{y:.4f}",
            )
        )  # fmt: skip
    front = pareto([c for _, c, _ in points], [s for _, _, s in points], comparison.lower_is_better)
    data.insert(
        0,
        {
            "type": "scatter", "name": "Pareto front", "x": [points[i][1] for i in front], "y": [points[i][2] for i in front],
            "mode": "lines", "line": {"shape": "hv", "dash": "dot", "width": 2, "color": "@muted"}, "hoverinfo": "skip",
            "showlegend": False,
        },
    )  # fmt: skip
    costs = [c for _, c, _ in points]
    xaxis: dict[str, Any] = {"title": {"text": title}, "tickformat": ".3~s", "nticks": 6}
    if costs and max(costs) <= 1.15 * min(costs):  # Equal by design: a tight axis would show rounding as if it were a trade.
        middle = (max(costs) + min(costs)) / 2
        xaxis["range"] = [0.8 * middle, 1.2 * middle]
    elif costs and max(costs) > 20 * min(costs) > 0:
        xaxis["type"] = "log"
    on_front = [points[i][0] for i in front]
    caption = f"On the front: {listed(on_front)}." if on_front else "No run has finished."
    fields = {key: measured for key, measured, *_ in AXES}
    held = next((axis for axis in comparison.axes if fields[axis.key] == field and axis.matched and axis.held), None)
    if held and on_front:
        caption = f"{held.name[0].upper()}{held.name[1:]} are held equal in this study: only the heights differ."
    return Figure(id, f"Against {title[0].lower()}{title[1:]}", caption, data, _layout(xaxis, score_title(comparison, "test")))


def _line(comparison: Comparison, name: str, x: list[Any], y: list[Any], **more: Any) -> dict[str, Any]:
    trace = {"type": "scatter", "name": plain(name), "legendgroup": name, "x": x, "y": y, "showlegend": False}
    trace["meta"] = plain(name)
    if "hovertemplate" in more:
        more["hovertemplate"] = "<b>%{meta}</b><br>" + more["hovertemplate"] + "<extra></extra>"
    return trace | more


def _layout(xaxis: dict[str, Any], ytitle: str, **more: Any) -> dict[str, Any]:
    return {"xaxis": xaxis, "yaxis": {"title": {"text": ytitle}, "tickformat": ".4~g"}} | more


# Learning curves


def curves(comparison: Comparison) -> list[Figure]:
    """Mean validation loss with the range over seeds, against tokens and against seconds; broken runs dashed."""
    unit = _unit(comparison)
    return [
        _curves(comparison, "curve-tokens", "tokens", unit.capitalize(), ".3~s"),
        _curves(comparison, "curve-seconds", "seconds", "Training time (s)", ".3~g"),
    ]


def _curves(comparison: Comparison, id: str, field: str, title: str, tickformat: str) -> Figure:
    data: list[dict[str, Any]] = []
    late: list[float] = []
    ends: list[float] = []
    for row in comparison.rows:
        runs = comparison.runs(row.name, "final")
        good = [[p for p in r["curve"] if p["validation_loss"] is not None] for r in runs if finished(r)]
        losses = mean_curve([{p["step"]: p["validation_loss"] for p in curve} for curve in good])
        where = {step: mean for step, mean, _, _ in mean_curve([{p["step"]: float(p[field]) for p in curve} for curve in good])}
        x = [where[step] for step, _, _, _ in losses]
        if losses:
            if len(good) > 1:
                band_y = [high for *_, high in losses] + [low for _, _, low, _ in reversed(losses)]
                data.append(
                    _line(
                        comparison, row.name, x + x[::-1], band_y, mode="lines", fill="toself", hoverinfo="skip",
                        line={"width": 0}, fillcolor=colour(comparison, row.name, 0.18),
                    )
                )  # fmt: skip
            data.append(
                _line(
                    comparison, row.name, x, [mean for _, mean, _, _ in losses], mode="lines+markers", showlegend=True,
                    line={"color": colour(comparison, row.name), "width": 2},
                    marker={"size": 6, "symbol": symbol(comparison, row.name)},
                    hovertemplate="%{x:.4s}<br>%{y:.4f}",
                )
            )  # fmt: skip
            half = [point for point in losses if 2 * point[0] >= losses[-1][0]]
            late += [value for _, _, low, high in half for value in (low, high)]
            ends.append(x[-1])
        for run in runs:
            if not finished(run) and run["curve"]:
                data.append(_broken(comparison, row.name, run, field))
    caption = "Mean over seeds; the band spans the seeds. Shown is the second half; a button shows the whole run."
    if any(not finished(r) and r["curve"] for r in comparison.records if r["phase"] == "final"):
        caption += " A run that broke is dashed (its training loss) up to where it ended."
    zoom = None
    if late:
        pad = 0.08 * (max(late) - min(late) or 1.0)
        zoom = {"x": [0.45 * min(ends), 1.02 * max(ends)], "y": [min(late) - pad, max(late) + pad]}
    layout = _layout({"title": {"text": title}, "tickformat": tickformat, "rangemode": "tozero"}, "validation loss")
    return Figure(id, f"Validation loss against {title[0].lower()}{title[1:]}", caption, data, layout, zoom)


def _broken(comparison: Comparison, name: str, run: dict[str, Any], field: str) -> dict[str, Any]:
    points = [p for p in run["curve"] if p["train_loss"] is not None]
    sizes = [0] * (len(points) - 1) + [11]
    return _line(
        comparison, name, [p[field] for p in points], [p["train_loss"] for p in points], mode="lines+markers",
        line={"color": colour(comparison, name), "width": 1.5, "dash": "dash"}, marker={"symbol": "x-thin-open", "size": sizes},
        hovertemplate=f"seed {run['seed']} {run['status']}<br>%{{x:.4s}}<br>%{{y:.4f}}",
    )  # fmt: skip


# Longer sequences


#: What the scores beside a task's own mean.
SHARES = {
    "last_error": "Share of the sequences whose last label is missed.",
    "row_error": "Share of the sequences with any label missed.",
}


def at_lengths(comparison: Comparison) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Test scores at several lengths of the sequences (``<score>_at_<length>`` in a record): by score (the study's own first),
    variant and length, a number per finished final run."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for name in comparison.names:
        for run in filter(finished, comparison.runs(name, "final")):
            for key, value in (run.get("test") or {}).items():
                score, at, length = key.rpartition("_at_")
                if at and length.isdecimal():
                    found.setdefault(score, {}).setdefault(name, {}).setdefault(int(length), []).append(float(value))
    return dict(sorted(found.items(), key=lambda item: item[0] != comparison.study["score"]["name"]))


def lengths(comparison: Comparison) -> list[Figure]:
    """Each test score that was taken at several lengths, against the length, with 95% intervals over seeds."""
    figures = []
    for score, variants in at_lengths(comparison).items():
        every = sorted({length for found in variants.values() for length in found})
        several = any(len(values) > 1 for found in variants.values() for values in found.values())
        data = []
        for i, (name, found) in enumerate(variants.items()):
            x = sorted(found)
            aside = 1 + min(0.03, 0.24 / len(variants)) * (i - (len(variants) - 1) / 2)  # So that bars do not hide each other.
            # The t interval of a mean is that of its difference from 0.
            tests = [paired(found[length], [0.0] * len(found[length])) for length in x]
            halves = [(ends[1] - ends[0]) / 2 if (ends := test.interval(ALPHA)) else 0.0 for test in tests]
            data.append(
                _line(
                    comparison, name, [length * aside for length in x], [test.mean for test in tests], mode="lines+markers",
                    showlegend=True, text=[f"length {length}" for length in x],
                    line={"color": colour(comparison, name), "width": 2},
                    marker={"size": 8, "symbol": symbol(comparison, name)},
                    error_y={
                        "type": "data", "array": halves, "visible": several, "thickness": 1.5, "width": 5,
                        "color": colour(comparison, name),
                    },
                    hovertemplate="%{text}<br>%{y:.4f}",
                )
            )  # fmt: skip
        own = score == comparison.study["score"]["name"]
        words = plain(score.replace("_", " "))
        layout = _layout(
            {"title": {"text": "Length of a sequence"}, "type": "log", "tickvals": every, "ticktext": [str(x) for x in every]},
            score_title(comparison, "test") if own else f"test {words}",
        )
        line = {"dash": "dot", "width": 1.5, "color": "@muted"}
        layout["shapes"] = [{"type": "line", "yref": "paper", "x0": every[0], "x1": every[0], "y0": 0, "y1": 1, "line": line}]
        bars = "Bars: 95% intervals of the mean over seeds." if several else "One seed: no intervals."
        caption = f"{SHARES.get(score, '')} Dotted: the length of training, {every[0]}. {bars}".strip()
        figures.append(Figure(f"length-{score}", f"{words[0].upper()}{words[1:]} against length", caption, data, layout))
    return figures


# Tuning


def tuning(comparison: Comparison) -> list[Figure]:
    """Validation score against the learning rate, and the expected best score against the number of trials."""
    if not any(comparison.runs(name, "tune") for name in comparison.names):
        return []
    good = [r["score"] for r in comparison.records if r["phase"] == "tune" and finished(r)]
    if not good:
        return []
    worst = max(good) if comparison.lower_is_better else min(good)
    rates: list[dict[str, Any]] = []
    best: list[dict[str, Any]] = []
    for row in comparison.rows:
        runs = sorted(comparison.runs(row.name, "tune"), key=lambda r: r["learning_rate"] or 0.0)
        mark = {"symbol": symbol(comparison, row.name), "color": colour(comparison, row.name)}
        line = {"color": colour(comparison, row.name), "width": 1.5}
        ok, bad = [r for r in runs if finished(r)], [r for r in runs if not finished(r)]
        if ok:
            chosen = [r for r in ok if r["learning_rate"] == row.learning_rate]
            rates.append(
                _line(
                    comparison, row.name, [r["learning_rate"] for r in ok], [r["score"] for r in ok], mode="lines+markers",
                    line=line, showlegend=True,
                    marker=mark | {"size": 8}, hovertemplate="learning rate %{x:.3g}<br>%{y:.4f}",
                )
            )  # fmt: skip
            rates.append(
                _line(
                    comparison, row.name, [r["learning_rate"] for r in chosen], [r["score"] for r in chosen], mode="markers",
                    hoverinfo="skip", marker={"symbol": "circle-open", "size": 18, "color": mark["color"], "line": {"width": 1.5}},
                )
            )  # fmt: skip
        if bad:
            rates.append(
                _line(
                    comparison, row.name, [r["learning_rate"] for r in bad], [worst] * len(bad), mode="markers",
                    marker=mark | {"symbol": "x-thin-open", "size": 12, "line": {"width": 3}},
                    text=[r["status"] for r in bad], hovertemplate="learning rate %{x:.3g}: %{text}",
                )
            )  # fmt: skip
        scores = [r["score"] if finished(r) else worst for r in runs]
        if scores:
            expected = expected_best(scores, comparison.lower_is_better)
            best.append(
                _line(
                    comparison, row.name, list(range(1, len(expected) + 1)), expected, mode="lines+markers", line=line,
                    marker=mark | {"size": 8}, showlegend=True, hovertemplate="best of %{x}: %{y:.4f}",
                )
            )  # fmt: skip
    title = score_title(comparison, "validation")
    xaxis = {"type": "log", "title": {"text": "Learning rate"}, "dtick": "D2", "tickformat": ".1~g"}
    return [
        Figure(
            "tune-rate", "Score against learning rate",
            "Every tuning trial. Ringed: the chosen one. A thin cross: the trial diverged or failed (drawn at the worst score).",
            rates, _layout(xaxis, title),
        ),
        Figure(
            "tune-trials", "Expected best score against number of trials",
            "How hard a variant is to tune: the mean of the best of n of its trials, over all choices of n. "
            "A trial that broke counts as the worst score of all.",
            best, _layout({"title": {"text": "Tuning trials"}, "dtick": 1 if len(best[0]["x"]) <= 20 else None}, title),
        ),
    ]  # fmt: skip


# What the parts report of themselves


#: What gates and experts layers report beside ``load``, with the title and the axis of its plot.
ROUTING = {
    "entropy": ("Entropy", "Entropy of the gate (nats)"),
    "max_violation": ("Greatest excess load", "Largest load over the even one, minus 1"),
    "dead": ("Dead experts", "Experts without a token in a batch"),
    "dropped": ("Dropped tokens", "Share of the choices without a place"),
}


def routing(comparison: Comparison) -> list[Figure]:
    """How evenly the variants that route use their experts while they train."""
    curves = {name: [_routing_curve(r) for r in comparison.runs(name, "final") if finished(r)] for name in comparison.names}
    curves = {name: [curve for curve in found if curve] for name, found in curves.items()}
    xaxis = {"title": {"text": _unit(comparison).capitalize()}, "tickformat": ".3~s", "rangemode": "tozero"}
    figures = []
    for number, name in enumerate(name for name, found in curves.items() if found):
        count = min(len(point["load"]) for curve in curves[name] for point in curve.values())
        ranks = [mean_curve([{step: p["load"][i] for step, p in curve.items()} for curve in curves[name]]) for i in range(count)]
        tokens = {step: p["tokens"] for curve in curves[name] for step, p in curve.items()}
        data = [
            _line(
                comparison, name, [tokens[step] for step, *_ in line], [mean for _, mean, *_ in line], mode="lines",
                line={"color": colour(comparison, name, round(1 - 0.75 * i / max(count - 1, 1), 2)), "width": 2},
                hovertemplate=f"most used no. {i + 1}<br>%{{x:.4s}}<br>%{{y:.3f}}",
            )
            for i, line in enumerate(ranks)
        ]  # fmt: skip
        layout = _layout(xaxis, "load")
        layout["yaxis"]["rangemode"] = "tozero"
        layout["shapes"] = [_even(count)]
        caption = (
            "Share of the choices that fell on the most used expert of a layer (darkest), the second, and so on; "
            "mean over layers and seeds. Dotted: an even share."
        )
        figures.append(Figure(f"routing-load-{number}", f"{name}: load over time", caption, data, layout))
    for leaf, (heading, title) in ROUTING.items():
        data = []
        for name, found in curves.items():
            lines = mean_curve([{step: p[leaf] for step, p in curve.items() if leaf in p} for curve in found])
            if lines:
                tokens = {step: p["tokens"] for curve in found for step, p in curve.items()}
                data.append(
                    _line(
                        comparison, name, [tokens[step] for step, *_ in lines], [mean for _, mean, *_ in lines],
                        mode="lines+markers", line={"color": colour(comparison, name), "width": 2}, showlegend=True,
                        marker={"size": 6, "symbol": symbol(comparison, name)}, hovertemplate="%{x:.4s}<br>%{y:.4g}",
                    )
                )  # fmt: skip
        if data:
            layout = _layout(xaxis, title)
            layout["yaxis"]["rangemode"] = "tozero"
            caption = "In single training steps, mean over layers and seeds."
            figures.append(Figure(f"routing-{leaf}", f"{heading} over time", caption, data, layout))
    return figures


def _routing_curve(run: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """By step: tokens, the loads of the layers' experts from the most used on, and the other numbers, each a mean over layers."""
    points = {}
    for point in run["curve"]:
        leaves: defaultdict[str, list[Any]] = defaultdict(list)
        for key, value in (point.get("metrics") or {}).items():
            leaves[key.rpartition(".")[2]].append(value)
        loads = [sorted(load, reverse=True) for load in leaves["load"] if isinstance(load, list)]
        if loads:
            # Layers with fewer experts than others end earlier.
            columns = [[load[i] for load in loads if i < len(load)] for i in range(max(map(len, loads)))]
            found: dict[str, Any] = {leaf: sum(leaves[leaf]) / len(leaves[leaf]) for leaf in ROUTING if leaves[leaf]}
            found |= {"tokens": point["tokens"], "load": [sum(column) / len(column) for column in columns]}
            points[point["step"]] = found
    return points


def _even(count: int) -> dict[str, Any]:
    line = {"dash": "dot", "width": 1.5, "color": "@muted"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 1 / count, "y1": 1 / count, "line": line}


def means(comparison: Comparison, name: str) -> dict[str, float | list[float]]:
    """The metrics of a variant's parts, averaged over its finished final runs; lists element by element, the experts' loads from
    the most used expert on."""
    collected: defaultdict[str, list[Any]] = defaultdict(list)
    for run in comparison.runs(name, "final"):
        if finished(run):
            for key, value in run.get("metrics", {}).items():
                # Which expert is used most is chance; how much more than the others it is, is not.
                ranked = isinstance(value, list) and key.rpartition(".")[2] == "load"
                collected[key].append(sorted(value, reverse=True) if ranked else value)
    found: dict[str, float | list[float]] = {}
    for key, values in collected.items():
        if isinstance(values[0], list):
            same = [v for v in values if isinstance(v, list) and len(v) == len(values[0])]
            columns = [mean_sd([float(x) for x in column if isinstance(x, int | float)])[0] for column in zip(*same, strict=True)]
            if columns and all(c is not None for c in columns):
                found[key] = [c for c in columns if c is not None]
        else:
            mean = mean_sd([float(v) for v in values if isinstance(v, int | float)])[0]
            if mean is not None:
                found[key] = mean
    return found


def inside(comparison: Comparison) -> list[Figure]:
    """Bars of what the parts measured: each list (expert loads, gates by channel) and each number that several layers report."""
    figures: list[Figure] = []
    for name in comparison.names:
        groups: defaultdict[tuple[str, bool], dict[str, Any]] = defaultdict(dict)
        for key, value in means(comparison, name).items():
            path, _, leaf = key.rpartition(".")
            groups[leaf, isinstance(value, list)][path or leaf] = value
        for (leaf, is_list), values in groups.items():
            if is_list:
                figures.append(_list_bars(comparison, name, leaf, values, len(figures)))
            elif len(values) > 1:
                figures.append(_layer_bars(comparison, name, leaf, values, len(figures)))
    return figures


def shortened(paths: list[str]) -> list[str]:
    """Paths of modules without what they all share at their end and beginning: ``blocks.0.feedforward`` is ``blocks.0``."""
    split = [path.split(".") for path in paths]
    while len(split) > 1 and all(len(p) > 2 for p in split) and len({p[-1] for p in split}) == 1:
        split = [p[:-1] for p in split]
    return [".".join(p) for p in split]


def _list_bars(comparison: Comparison, name: str, leaf: str, values: dict[str, list[float]], number: int) -> Figure:
    data = []
    labels = shortened(list(values))
    for i, (label, heights) in enumerate(zip(labels, values.values(), strict=True)):
        opacity = round(1 - 0.65 * i / max(len(values) - 1, 1), 2)
        data.append(
            {
                "type": "bar", "name": plain(label), "x": list(range(len(heights))), "y": heights, "showlegend": len(values) > 1,
                "marker": {"color": colour(comparison, name, opacity)},
                "hovertemplate": f"{plain(label)}, %{{x}}: %{{y:.4g}}<extra></extra>",
            }
        )  # fmt: skip
    longest = max(map(len, values.values()))
    shares = all(abs(sum(heights) - 1) < 0.02 and min(heights) >= 0 for heights in values.values())
    expert = "load" in leaf or "importance" in leaf
    axis = "Experts, most used first" if leaf == "load" else "Expert" if expert else "Index"
    layout = _layout({"title": {"text": axis}, "dtick": 1 if longest <= 16 else None}, plain(leaf))
    layout |= {"barmode": "group", "bargap": 0.3}
    layout["yaxis"]["rangemode"] = "tozero"
    caption = "Mean over seeds, one colour per layer." if len(values) > 1 else "Mean over seeds."
    if shares:
        layout["shapes"] = [_even(longest)]
        caption += " Dotted: an even share."
    return Figure(f"inside-{number}", f"{name}: {leaf}", caption, data, layout)


def _layer_bars(comparison: Comparison, name: str, leaf: str, values: dict[str, float], number: int) -> Figure:
    labels = [plain(label) for label in shortened(list(values))]
    bars = {
        "type": "bar", "name": plain(leaf), "x": labels, "y": list(values.values()), "showlegend": False,
        "marker": {"color": colour(comparison, name)}, "hovertemplate": "%{x}: %{y:.4g}<extra></extra>",
    }  # fmt: skip
    layout = _layout({"type": "category"}, plain(leaf), bargap=0.55)
    layout["yaxis"]["rangemode"] = "tozero"
    return Figure(f"inside-{number}", f"{name}: {leaf}", "Mean over seeds, by layer.", [bars], layout)
