"""A study's records turned into verdicts, a table for the terminal and the report."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from gatework.bench import formats
from gatework.bench.record import read_json
from gatework.bench.statistics import (
    ALPHA,
    BETTER,
    POWER,
    UNDECIDED,
    WORSE,
    Curve,
    Verdict,
    mean_curve,
    mean_sd,
    smallest_visible,
    steps_saved,
    verdicts,
)
from gatework.core.errors import GateworkError

STYLES = {BETTER: "bold green", WORSE: "bold red"}

#: The axes a study can hold equal: key of the study, what a record calls it, its name, the deviation that still counts as equal.
AXES = (
    ("params", "parameters", "parameters", 0.02),
    ("flops", "train_flops", "executed training FLOPs", 0.02),
    ("seconds", "seconds", "training seconds", 0.10),
)


@dataclass(frozen=True)
class Row:
    """One variant: means over its finished final runs, and what became of the others.

    Attributes:
        name, settings: as in the study.
        score, sd: mean and standard deviation of the test score over seeds.
        validation: mean of the same score on the validation data; None where the task does not report it there.
        scores: test score by seed, finished runs only.
        diverged, failed: seeds of the final runs that did not finish.
        learning_rate: the chosen one.
        trials: tuning trials that were run, and ``bad_trials`` of them that diverged or failed.
        cost: means by name (see the record), None where nothing was measured.
        saved: fraction of the training saved at equal loss (:func:`gatework.bench.statistics.steps_saved`).
        verdict: None for the baseline.
    """

    name: str
    settings: str
    score: float | None
    sd: float | None
    validation: float | None
    scores: dict[int, float]
    diverged: tuple[int, ...]
    failed: tuple[int, ...]
    learning_rate: float | None
    trials: int
    bad_trials: int
    cost: dict[str, float | None]
    saved: float | None
    verdict: Verdict | None


@dataclass(frozen=True)
class Axis:
    """One axis of cost: every variant's multiple of the baseline, the largest deviation, whether it was meant to be equal."""

    key: str
    name: str
    ratios: dict[str, float]
    worst: str | None
    deviation: float | None
    matched: bool
    tolerance: float

    @property
    def held(self) -> bool | None:
        """Whether it was in fact equal; None where nothing was measured."""
        return None if self.deviation is None else self.deviation <= self.tolerance

    def describe(self) -> str:
        """One clause: equal up to what, or from what to what."""
        if not self.ratios:
            return f"{self.name} not measured"
        if self.matched:
            state = "held equal" if self.held else "NOT equal"
            detail = f"up to {formats.percent(self.deviation, sign=False)}, {self.worst}" if self.deviation else "exactly"
            return f"{self.name} {state} ({detail})"
        low, high = (formats.ratio(end) for end in (min(self.ratios.values()), max(self.ratios.values())))
        return f"{self.name} {low if low == high else f'{low} to {high}'} of the baseline"


class Comparison:
    """What a study found.

    ``print(comparison)`` shows the verdict table in 80 columns, :meth:`table` gives it to rich, :meth:`report` writes the page.

    Args:
        study: the content of ``study.json``.
        records: of its runs, finished or not; a study that is still running can be looked at.

    Attributes:
        rows: one :class:`Row` per variant, the baseline first.
        verdicts: one :class:`gatework.bench.statistics.Verdict` per variant other than the baseline, by name.
        smallest: the smallest difference that the study could have seen, in the score's unit; None with a single seed.
        axes: parameters, executed FLOPs and seconds of every variant as multiples of the baseline.
        curves: mean validation curve of every variant over its finished seeds, (tokens, loss).
    """

    def __init__(self, study: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
        self.study = study
        self.baseline: str = study["baseline"]
        settings: dict[str, str] = study["variants"]
        self.names = [self.baseline, *(name for name in settings if name != self.baseline)]
        known = {r["key"]: r for r in records if r["variant"] in self.names}
        self.records = sorted(known.values(), key=lambda r: (r["phase"], self.names.index(r["variant"]), r["index"]))
        self.lower_is_better: bool = study["score"]["lower_is_better"]
        self.seeds = study["seeds"] if isinstance(study["seeds"], int) else len(study["seeds"])
        scores = {name: {r["seed"]: float(r["score"]) for r in self.runs(name, "final") if finished(r)} for name in self.names}
        broken = {name: [r["seed"] for r in self.runs(name, "final") if not finished(r)] for name in self.names}
        self.verdicts = verdicts(
            scores, self.baseline, seeds=self.seeds, lower_is_better=self.lower_is_better, broken=broken
        )
        self.smallest = smallest_visible(self.verdicts, self.seeds)
        self.curves = {name: self._curve(name) for name in self.names}
        self.rows = [self._row(name, settings.get(name, ""), scores[name]) for name in self.names]
        self.axes = [self._axis(*axis) for axis in AXES]
        spreads = [v.sd for v in self.verdicts.values() if v.sd] + [row.sd for row in self.rows if row.sd]
        self.decimals = formats.decimals_for([row.score for row in self.rows if row.score is not None], spreads)

    def runs(self, variant: str, phase: str) -> list[dict[str, Any]]:
        """The records of one variant in one phase (``"tune"`` or ``"final"``)."""
        return [r for r in self.records if r["variant"] == variant and r["phase"] == phase]

    def _curve(self, name: str) -> Curve:
        """The mean validation curve over finished seeds: (tokens, loss)."""
        runs = [r for r in self.runs(name, "final") if finished(r)]
        curves = [
            {p["tokens"]: p["validation_loss"] for p in r["curve"] if p["validation_loss"] is not None} for r in runs
        ]
        return [(float(tokens), mean) for tokens, mean, _, _ in mean_curve(curves)]

    def _row(self, name: str, settings: str, scores: dict[int, float]) -> Row:
        final, tune = self.runs(name, "final"), self.runs(name, "tune")
        costs = [r["cost"] for r in final if finished(r)]
        cost = {key: _mean([c.get(key) for c in costs]) for key in dict.fromkeys(key for c in costs for key in c)}
        rates = {r["learning_rate"] for r in final}
        mean, sd = mean_sd(list(scores.values()))
        return Row(
            name=name,
            settings=settings,
            score=mean,
            sd=sd,
            validation=_mean([r["validation"].get(self.study["score"]["name"]) for r in final if finished(r)]),
            scores=scores,
            diverged=tuple(r["seed"] for r in final if r["status"] == "diverged"),
            failed=tuple(r["seed"] for r in final if not finished(r) and r["status"] != "diverged"),
            learning_rate=rates.pop() if len(rates) == 1 else None,
            trials=len(tune),
            bad_trials=sum(not finished(r) for r in tune),
            cost=self._planned(name) | {key: value for key, value in cost.items() if value is not None},
            saved=None if name == self.baseline else steps_saved(self.curves[self.baseline], self.curves[name]),
            verdict=self.verdicts.get(name),
        )

    def _planned(self, name: str) -> dict[str, float | None]:
        """What was measured before training, for a variant of which no run has finished."""
        fitted = self.study.get("matched", {}).get(name, {})
        planned = {key: float(value) for key, value in fitted.items() if isinstance(value, int | float)}
        tokens = planned.get("tokens")
        cost = {
            "parameters": planned.get("parameters"),
            "active_parameters": planned.get("active_parameters"),
            "train_flops_per_token": planned.get("flops_per_token"),
        }
        if tokens and planned.get("flops_per_token"):
            cost["train_flops"] = tokens * planned["flops_per_token"]
        return cost

    def _axis(self, key: str, field: str, name: str, tolerance: float) -> Axis:
        costs = {row.name: row.cost.get(field) for row in self.rows}
        base = costs[self.baseline]
        ratios = {n: c / base for n, c in costs.items() if base and c is not None and n != self.baseline}
        worst = max(ratios, key=lambda n: abs(ratios[n] - 1), default=None)
        deviation = abs(ratios[worst] - 1) if worst else None
        return Axis(key, name, ratios, worst, deviation, self.study["match"] == key, tolerance)

    # Words

    def headline(self) -> str:
        """One sentence: how many variants are better, worse, not told apart."""
        words = {word: [n for n, v in self.verdicts.items() if v.word == word] for word in (BETTER, WORSE, UNDECIDED)}
        if not self.verdicts:
            return "There is nothing but the baseline."
        if not any(row.scores for row in self.rows):
            return "No run has finished."
        if not words[BETTER] and not words[WORSE]:
            return "No variant is told apart from the baseline."
        found = [f"{word} than the baseline: {formats.listed(words[word])}" for word in (BETTER, WORSE) if words[word]]
        found += [f"{UNDECIDED} from it: {formats.listed(words[UNDECIDED])}"] if words[UNDECIDED] else []
        text = "; ".join(found)
        return f"{text[0].upper()}{text[1:]}."

    def title(self) -> str:
        """Name, task and size of the study."""
        study = self.study
        unit = study.get("unit", "token")
        task = study["task"]["name"]
        named = task if study["name"] == task else f"{study['name']}: {task}"
        return (
            f"{named}, {formats.si(study['tokens'])} {unit}s, "
            f"{formats.counted(self.seeds, 'seed')}, {formats.counted(study['tune'], 'tuning trial')} each"
        )

    def score_line(self) -> str:
        """What the score is and which way is better."""
        score = self.study["score"]
        unit = f" in {score['unit']}" if score.get("unit") else ""
        return f"test {score['name'].replace('_', ' ')}{unit}, {'lower' if self.lower_is_better else 'higher'} is better"

    def smallest_line(self) -> str:
        """The smallest difference that the study could have seen."""
        if self.smallest is None:
            why = "one seed shows no spread" if self.seeds < 2 else "too few finished pairs of runs"
            return f"Smallest difference this study could have seen: unknown ({why})."
        return (
            f"Smallest difference this study could have seen: {formats.significant(self.smallest, 2)} "
            f"({POWER:.0%} power, {formats.counted(self.seeds, 'seed')}, {formats.counted(len(self.verdicts), 'comparison')})."
        )

    def axes_line(self) -> str:
        """The axis held equal, checked, and the others."""
        ordered = sorted(self.axes, key=lambda axis: not axis.matched)
        text = "; ".join(axis.describe() for axis in ordered)
        return f"{text[0].upper()}{text[1:]}." if self.study["match"] != "none" else f"Nothing held equal but the data: {text}."

    def tuning_line(self) -> str:
        """How many trials each variant had."""
        planned = self.study["tune"]
        if not planned:
            return "Tuning: none; every variant used the same learning rate."
        short = [f"{row.name} {row.trials}" for row in self.rows if row.trials != planned]
        bad = [f"{row.name} {row.bad_trials}" for row in self.rows if row.bad_trials]
        text = f"Tuning: {formats.counted(planned, 'trial')} each, chosen on validation"
        text += f"; NOT complete: {', '.join(short)}" if short else ""
        return text + (f"; diverged or failed: {', '.join(bad)}." if bad else ".")

    def notes(self) -> list[str]:
        """What must be known about single variants: broken and missing runs, words held back."""
        notes = []
        for row in self.rows:
            parts = []
            for seeds, what in ((row.diverged, "diverged"), (row.failed, "failed")):
                if seeds:
                    parts.append(f"seed{'s' if len(seeds) > 1 else ''} {formats.listed(seeds)} {what}")
            missing = self.seeds - len(row.scores) - len(row.diverged) - len(row.failed)
            if missing > 0:
                parts.append(f"{formats.counted(missing, 'seed')} not run")
            verdict = row.verdict
            if verdict and verdict.n < self.seeds:
                parts.append(f"compared on {verdict.n} of {formats.counted(self.seeds, 'seed')}")
            if verdict and verdict.note:
                parts.append(verdict.note)
            if parts:
                notes.append(f"{row.name}: {'; '.join(parts)}.")
        return notes

    def saved_line(self) -> str | None:
        """Training saved at equal loss, of the variants where it can be read off."""
        saved = [f"{row.name} {formats.percent(row.saved)}" for row in self.rows if row.saved is not None]
        return f"Training saved at equal validation loss (means, no interval): {', '.join(saved)}." if saved else None

    # The table

    def table(self, width: int | None = None) -> View:
        """The verdict table with the lines beneath it, for ``rich.print`` or ``print`` (plain text, 80 columns wide)."""
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, width=width)
        table.add_column("\nvariant", overflow="fold", min_width=7)
        score, unit = self.study["score"]["name"].replace("_", " "), self.study.get("unit", "token")
        table.add_column(f"test\n{score if len(score) <= 8 else 'score'}", justify="right", no_wrap=True)
        table.add_column("difference\n± 95% (Holm)", justify="right", no_wrap=True)
        table.add_column("\nverdict", no_wrap=True)
        broken = any(row.diverged or row.failed for row in self.rows)
        heads = ["\nparams", f"FLOPs/\n{unit if len(unit) <= 7 else 'unit'}", "\ntime", *["\ndiv."] * broken]
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for row in self.rows:
            style = STYLES.get(row.verdict.word, "") if row.verdict else "bold"
            table.add_row(
                Text(row.name),
                formats.fixed(row.score, self.decimals),
                self.difference(row),
                Text(row.verdict.word if row.verdict else "baseline", style),
                formats.si(row.cost.get("parameters")),
                formats.si(row.cost.get("train_flops_per_token")),
                formats.seconds(row.cost.get("seconds")),
                *[str(len(row.diverged)) + (f"+{len(row.failed)}f" if row.failed else "")] * broken,
            )
        direction = f"{self.score_line()}; difference = variant - baseline"
        lines = [self.smallest_line(), self.axes_line(), self.tuning_line(), self.saved_line(), *self.notes()]
        beneath = [Text(line) for line in lines if line]
        return View(Group(Text(self.title(), "bold"), Text(direction), "", table, "", *beneath), width or 80)

    def difference(self, row: Row) -> str:
        """``-0.021 ±0.024``: mean paired difference and half the width of its interval."""
        verdict = row.verdict
        if verdict is None:
            return ""
        mean = formats.fixed(verdict.difference, self.decimals, sign=True)
        if verdict.interval is None or verdict.difference is None:
            return f"{mean} (n={verdict.n})"
        return f"{mean} ±{formats.fixed(verdict.interval[1] - verdict.difference, self.decimals)}"

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> View:
        return self.table()

    def __repr__(self) -> str:
        return f"<Comparison {self.study['name']}: {self.headline()}>"

    def report(self, path: str | Path) -> Path:
        """Write ``report.html``, ``report.md``, ``report.csv`` and ``report.json`` into a folder; returns the page's path.

        Raises:
            GateworkError: the folder cannot be written.
        """
        from gatework.bench.report import write

        return write(self, Path(path))


class View:
    """Something for the terminal that rich renders in colour and ``str`` as plain text."""

    def __init__(self, content: RenderableType, width: int) -> None:
        self.content, self.width = content, width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Any:
        yield self.content

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=self.width, color_system=None, force_terminal=False, highlight=False)
        console.print(self.content)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def finished(record: dict[str, Any]) -> bool:
    """Whether the run ended with a score."""
    score = record["score"]
    return record["status"] == "ok" and isinstance(score, int | float) and math.isfinite(score)


def _mean(values: list[Any]) -> float | None:
    return mean_sd([float(value) for value in values if isinstance(value, int | float)])[0]


def load(run_dir: str | Path) -> Comparison:
    """Read a study's folder (``study.json`` and ``records/``), complete or not.

    Raises:
        GateworkError: the folder holds no study, or a file of it cannot be read.
    """
    folder = Path(run_dir)
    if not (folder / "study.json").is_file():
        raise GateworkError(f"{str(folder)!r} holds no study: there is no study.json in it")
    study = read_json(folder / "study.json", "study")
    records = [read_json(path, "record") for path in sorted((folder / "records").rglob("*.json"))]
    try:
        return Comparison(study, records)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__} {error}"
        raise GateworkError(f"{str(folder)!r} holds no study that this version can read: {what}") from error


__all__ = ["ALPHA", "Axis", "Comparison", "Row", "View", "finished", "load"]
