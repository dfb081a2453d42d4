"""The report: one self-contained HTML page, and the same numbers as Markdown, CSV and JSON."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatework.bench import figures, formats
from gatework.bench.comparison import Comparison, Row, finished
from gatework.bench.statistics import ALPHA, BETTER, WORSE, mean_sd
from gatework.core.errors import GateworkError

COSTS = (
    ("parameters", "parameters", formats.si),
    ("active_parameters", "active per token", formats.si),
    ("forward_flops_per_token", "forward FLOPs per {unit}", formats.si),
    ("train_flops_per_token", "training FLOPs per {unit}", formats.si),
    ("train_flops", "training FLOPs", formats.si),
    ("tokens", "{unit}s", formats.si),
    ("seconds", "training time", formats.seconds),
    ("tokens_per_second", "{unit}s per second", formats.si),
    ("peak_bytes", "peak memory", formats.size),
    ("decode_state_bytes", "decoding state", formats.size),
)

LENGTHS_NOTE = "Test scores by the length of the sequences, the first that of training: mean ± standard deviation over seeds."

#: The symbol that stands for a variant in text, in the order of :data:`gatework.bench.figures.SYMBOLS`.
GLYPHS = "●■◆▲✖★▼⬢✚⬟⧓"


def write(comparison: Comparison, folder: Path) -> Path:
    """Write the four files into ``folder``, made where it is missing; returns the page's path.

    Raises:
        GateworkError: the folder cannot be written, or what the page needs is not installed.
    """
    try:
        page = html(comparison)
    except ImportError as error:
        raise GateworkError(f"the report needs {error.name}; install it with: pip install 'gatework[bench]'") from error
    contents = {
        "report.md": markdown(comparison),
        "report.csv": table_csv(comparison),
        "report.json": json.dumps(strict(data(comparison)), indent=1, allow_nan=False) + "\n",
        "report.html": page,
    }
    for name, content in contents.items():
        write_text(folder / name, content)
    return folder / "report.html"


def write_text(path: Path, content: str) -> None:
    """Write a text file so that at every moment either the old or the new one is there, whole.

    Raises:
        GateworkError: where the folder cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise GateworkError(f"{str(path)!r} cannot be written: {error.strerror or error}") from error


# The numbers


def flat(comparison: Comparison, row: Row) -> dict[str, Any]:
    """One variant as a flat row of plain numbers and words: what CSV and JSON hold."""
    v = row.verdict
    low, high = v.interval if v and v.interval else (None, None)
    joint_low, joint_high = v.joint if v and v.joint else (None, None)
    return {
        "variant": row.name,
        "settings": row.settings,
        "score": comparison.study["score"]["name"],
        "test_mean": row.score,
        "test_sd": row.sd,
        "validation_mean": row.validation,
        "difference": v.difference if v else None,
        "interval_low": low,
        "interval_high": high,
        "interval_confidence": 1 - v.level if v else None,
        "joint_interval_low": joint_low,
        "joint_interval_high": joint_high,
        "p": v.p if v else None,
        "adjusted_p": v.adjusted_p if v else None,
        "verdict": v.word if v else "baseline",
        "note": v.note if v else "",
        "pairs": v.n if v else None,
        "smallest_visible_difference": v.detectable if v else None,
        "training_saved": row.saved,
        "seeds_finished": len(row.scores),
        "seeds_diverged": len(row.diverged),
        "seeds_failed": len(row.failed),
        "learning_rate": row.learning_rate,
        "tuning_trials": row.trials,
        "tuning_trials_broken": row.bad_trials,
    } | {key: row.cost.get(key) for key, _, _ in COSTS}


def data(comparison: Comparison) -> dict[str, Any]:
    """Everything as one JSON-able object."""
    return {
        "headline": comparison.headline(),
        "smallest_visible_difference": comparison.smallest,
        "axes": {
            a.key: {"name": a.name, "ratios": a.ratios, "matched": a.matched, "deviation": a.deviation, "held": a.held}
            for a in comparison.axes
        },
        "variants": [flat(comparison, row) for row in comparison.rows],
        "study": comparison.study,
        "records": comparison.records,
    }


def strict(value: Any) -> Any:
    """The same without numbers that JSON does not have: NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table_csv(comparison: Comparison) -> str:
    """One line per variant, full precision."""
    rows = [flat(comparison, row) for row in comparison.rows]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


# The words


def rules(comparison: Comparison) -> list[str]:
    """The fairness rules, as this study kept them."""
    study = comparison.study
    unit = study.get("unit", "token")
    hashes = sorted({str(r["data_hash"]) for r in comparison.records})
    same = f"all runs read the data {hashes[0]}" if len(hashes) == 1 else f"NOT one data set: {', '.join(hashes) or 'no runs'}"
    budgets = [row.cost["tokens"] or 0 for row in comparison.rows if row.cost.get("tokens")] or [study["tokens"]]
    least, most = formats.si(min(budgets)), formats.si(max(budgets))
    budget = f"{least} {unit}s" if least == most else f"{least} to {most} {unit}s"
    tuned = "Nothing was tuned: every variant trained with the same learning rate."
    if study["tune"]:
        tune_seeds, final_seeds = ({r["seed"] for r in comparison.records if r["phase"] == phase} for phase in ("tune", "final"))
        shared = formats.listed(sorted(tune_seeds & final_seeds))
        low, high = study["learning_rates"]
        tuned = (
            f"Every variant, the baseline included, had {formats.counted(study['tune'], 'tuning trial')} of "
            f"{formats.si(study['tune_tokens'])} {unit}s at quasi-random learning rates in [{low:g}, {high:g}] (unless its "
            f"settings say otherwise), on seeds that the final runs do not use ({f'NOT kept: {shared}' if shared else 'checked'})."
        )
    return [
        f"Same data in the same order for every variant and seed pair ({same}); a budget of {budget} per final run. "
        f"{comparison.axes_line()}",
        tuned,
        f"A difference is paired over {formats.counted(comparison.seeds, 'seed')}, with a {1 - ALPHA:.0%} t interval, "
        f"Holm-corrected over {formats.counted(len(comparison.verdicts), 'variant')}, and is called better, worse or not told "
        "apart. "
        f"{comparison.smallest_line()}",
        "Selected on validation, reported on test. A variant's own losses train it and are not in its score. Diverged and failed "
        "runs stay in the table; a variant with a broken run is never called better, and none worse than a baseline with one.",
        "Gains are also given as training saved at equal loss. Costs are measured as the runs happened: executed FLOPs, seconds, "
        "peak memory, decoding state.",
    ]


def cost_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the costs; columns that nobody has are left out."""
    unit = comparison.study.get("unit", "token")
    used = [c for c in COSTS if any(row.cost.get(c[0]) is not None for row in comparison.rows)]
    base = comparison.rows[0]
    body = []
    for row in comparison.rows:
        cells = [row.name]
        for key, _, show in used:
            value, reference = row.cost.get(key), base.cost.get(key)
            text = show(value)
            if value is not None and reference and row is not base:
                text += f" ({formats.ratio(value / reference)})"
            cells.append(text)
        body.append(cells)
    return ["variant", *(title.format(unit=unit) for _, title, _ in used)], body


def length_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the test scores at several lengths, mean and standard deviation over seeds; without any, no rows."""
    found = figures.at_lengths(comparison)
    columns = [(score, n) for score, runs in found.items() for n in sorted({n for lengths in runs.values() for n in lengths})]
    body = [[name] for name in comparison.names] if columns else []
    for score, length in columns:
        values = [mean_sd(found[score].get(name, {}).get(length, [])) for name in comparison.names]
        decimals = formats.decimals_for([mean for mean, _ in values if mean is not None], [sd for _, sd in values if sd])
        for cells, (mean, sd) in zip(body, values, strict=True):
            cells.append(_spread(mean, sd, decimals))
    return ["variant", *(f"{score.replace('_', ' ')} at {length}" for score, length in columns)], body


def changes(comparison: Comparison, name: str) -> list[tuple[str, str, str]]:
    """Where a variant's configuration differs from the baseline's: (key, baseline, variant)."""
    ours, base = configuration(comparison, name), configuration(comparison, comparison.baseline)
    private = {"variant.name", "learning_rate", "seed", "phase"}
    left, right = _flatten(base), _flatten(ours)
    keys = [key for key in dict.fromkeys([*left, *right]) if key not in private and left.get(key) != right.get(key)]
    return [(key, left.get(key, formats.NOTHING), right.get(key, formats.NOTHING)) for key in keys] if ours and base else []


def configuration(comparison: Comparison, name: str) -> dict[str, Any]:
    """The configuration of a variant's first final run (or tuning trial, where there is none yet)."""
    runs = comparison.runs(name, "final") or comparison.runs(name, "tune")
    return runs[0].get("config") or {} if runs else {}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def environments(comparison: Comparison) -> list[tuple[int, dict[str, str]]]:
    """The distinct versions and machines of the runs, with how many runs each has."""
    seen: dict[str, tuple[int, dict[str, str]]] = {}
    for record in comparison.records:
        about = _flatten(record.get("hardware") or {}) | _flatten(record.get("versions") or {})
        key = json.dumps(about, sort_keys=True)
        seen[key] = (seen.get(key, (0, about))[0] + 1, about)
    return sorted(seen.values(), key=lambda item: -item[0])


# Markdown


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown."""
    d = comparison.decimals
    verdict_rows = []
    for row in comparison.rows:
        v = row.verdict
        span = f"[{formats.fixed(v.interval[0], d, True)}, {formats.fixed(v.interval[1], d, True)}]" if v and v.interval else ""
        verdict_rows.append(
            [
                _md(row.name), _md_code(row.settings), _score(row, d),
                f"{formats.fixed(v.difference, d, True)} {span}".strip() if v else "", formats.p_value(v.adjusted_p) if v else "",
                v.word if v else "baseline", f"{len(row.scores)}/{comparison.seeds}", str(len(row.diverged)), str(len(row.failed)),
                formats.percent(row.saved) if row.saved is not None else "", formats.significant(row.learning_rate, 3),
            ]
        )  # fmt: skip
    head = [
        "variant", "settings", "test score", "difference, 95% (Holm)", "adjusted p", "verdict", "seeds", "diverged", "failed",
        "training saved", "learning rate",
    ]  # fmt: skip
    lines = [f"# {_md(comparison.title())}", "", f"**{_md(comparison.headline())}** Score: {_md(comparison.score_line())}.", ""]
    lines += [*_md_table(head, verdict_rows), "", comparison.smallest_line(), ""]
    lines += [f"- {_md(note)}" for note in comparison.notes()]
    costs, cost_rows = cost_table(comparison)
    lines += ["", "## Cost", "", *_md_table(costs, [[_md(cell) for cell in cells] for cells in cost_rows])]
    lines += ["", _md(comparison.axes_line())]
    lengths, length_rows = length_table(comparison)
    if length_rows:
        lines += ["", "## Longer sequences", "", *_md_table(lengths, [[_md(cell) for cell in cells] for cells in length_rows])]
        lines += ["", LENGTHS_NOTE]
    lines += ["", "## Rules", ""]
    lines += [f"{i}. {_md(rule)}" for i, rule in enumerate(rules(comparison), 1)]
    broken = [
        [_md(r["key"]), r["status"], _md(str(r.get("error") or ""))] for r in comparison.records if not finished(r)
    ]
    if broken:
        lines += ["", "## Runs that did not finish", "", *_md_table(["run", "status", "error"], broken)]
    lines += ["", "## Versions and hardware", ""]
    for n, about in environments(comparison):
        words = ", ".join(f"{key} {value}" for key, value in about.items())
        lines.append(f"- {formats.counted(n, 'run')}: {_md(words)}")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    for mark, escaped in (("\\", "\\\\"), ("&", "&amp;"), ("<", "&lt;"), ("`", "\\`"), ("*", "\\*"), ("](", "]\\(")):
        text = text.replace(mark, escaped)
    return text


def _md_code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`" if text else ""


def _score(row: Row, decimals: int | None) -> str:
    return _spread(row.score, row.sd, decimals)


def _spread(mean: float | None, sd: float | None, decimals: int | None) -> str:
    text = formats.fixed(mean, decimals)
    return f"{text} ± {formats.fixed(sd, decimals)}" if sd is not None else text


def _md_table(head: list[str], rows: list[list[str]]) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


# The page


def html(comparison: Comparison) -> str:
    """The page, whole: style, script, Plotly and data in one file."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    loader = PackageLoader("gatework.bench", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: dict[str, Any] = {
        "si": formats.si, "significant": formats.significant, "seconds": formats.seconds, "percent": formats.percent,
        "p_value": formats.p_value, "minus": lambda text: str(text).replace("-", "−"),
        "fixed": lambda value, sign=False: formats.fixed(value, comparison.decimals, sign).replace("-", "−"),
        "pretty": lambda value: json.dumps(strict(value), indent=2),
    }  # fmt: skip
    environment.filters |= filters
    groups = [
        ("quality", figures.quality(comparison)),
        ("curves", figures.curves(comparison)),
        ("lengths", figures.lengths(comparison)),
        ("tuning", figures.tuning(comparison)),
        ("routing", figures.routing(comparison)),
        ("inside", figures.inside(comparison)),
    ]
    environment.globals |= {"figures": dict(groups), "BETTER": BETTER, "WORSE": WORSE}
    every = [figure.spec() for _, group in groups for figure in group]
    return environment.get_template("report.html.j2").render(
        c=comparison,
        looks={name: {"colour": i % figures.COLOURS, "glyph": GLYPHS[i % len(GLYPHS)]} for i, name in enumerate(comparison.names)},
        forest=forest(comparison),
        rules=rules(comparison),
        costs=cost_table(comparison),
        lengths=length_table(comparison),
        lengths_note=LENGTHS_NOTE,
        changes={name: changes(comparison, name) for name in comparison.names},
        configurations={name: configuration(comparison, name) for name in comparison.names},
        environments=environments(comparison),
        numbers=numbers(comparison),
        finished=finished,
        specs=strict(every),
        plotly=Markup(get_plotlyjs()),
    )


def forest(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Where each difference and its interval lie on a common scale from -1 to 1 around zero; intervals that leave it are cut."""
    halves = sorted((v.interval[1] - v.interval[0]) / 2 for v in comparison.verdicts.values() if v.interval)
    means = [abs(v.difference) for v in comparison.verdicts.values() if v.difference is not None]
    if not means:
        return {}
    typical = halves[len(halves) // 2] if halves else 0.0
    scale = max([1.25 * max(means), *(1.3 * min(half, 2 * typical) for half in halves)]) or 1.0
    ends = [max(abs(end) for end in v.interval) for v in comparison.verdicts.values() if v.interval]
    scale = max([scale, *(1.02 * end for end in ends if end <= 2 * scale)])  # Cut only what would dwarf the others.
    found = {}
    for name, v in comparison.verdicts.items():
        if v.difference is None:
            continue
        low, high = v.interval or (v.difference, v.difference)
        found[name] = {
            "mean": v.difference / scale, "low": max(low / scale, -1.0), "high": min(high / scale, 1.0),
            "cut_low": low < -scale, "cut_high": high > scale, "has": v.interval is not None,
        }  # fmt: skip
    return found


def numbers(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """The scalar metrics of all variants: (variant, metric, mean, standard deviation over seeds)."""
    found = []
    for name in comparison.names:
        runs = [r.get("metrics", {}) for r in comparison.runs(name, "final") if finished(r)]
        for key, value in figures.means(comparison, name).items():
            if not isinstance(value, list):
                sd = mean_sd([float(m[key]) for m in runs if isinstance(m.get(key), int | float)])[1]
                found.append((name, key, formats.significant(value, 4), formats.significant(sd, 2)))
    return found
