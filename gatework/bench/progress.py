"""What one sees while a study runs: a live table on a terminal, one line per finished trial elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gatework.bench.store import Trial


class Display:
    """Shows trials as they run; use as a context manager.

    Args:
        title: of the study.
        matched: what was fitted, for the expected length of each trial.
        score: name of the score.
        unit: of the budget, "token" or "example".
        quiet: show nothing.
        tune_share: length of a tuning trial relative to a final run.
    """

    def __init__(
        self,
        title: str,
        matched: Mapping[str, Any],
        score: str = "score",
        unit: str = "token",
        quiet: bool = False,
        tune_share: float = 1.0,
    ) -> None:
        self._title, self._matched, self._score, self._unit, self._tune_share = title, matched, score, unit, tune_share
        self._console = Console(stderr=True, quiet=quiet)
        self._live = (
            Live(console=self._console, refresh_per_second=4, transient=True) if self._console.is_terminal and not quiet else None
        )
        self._quiet = quiet
        self._start = time.monotonic()
        self._first: float | None = None
        self._shown: set[str] | None = None

    def __enter__(self) -> Display:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """One line about what is going on."""
        if self._live:
            self._live.update(Text(text, style="dim"))
        elif not self._quiet:
            print(text, file=sys.stderr, flush=True)

    def update(self, trials: list[Trial]) -> None:
        """Show the present state."""
        left = self._left(trials)
        finished = {trial.plan.key for trial in trials if trial.finished}
        if self._live:
            self._live.update(self._table(trials, len(finished), left))
        elif not self._quiet:
            for number, trial in enumerate((t for t in trials if t.finished and t.plan.key not in (self._shown or set())), 1):
                if self._shown is not None:  # What was there when we began is not news.
                    print(self._line(trial, len(self._shown) + number, len(trials), left), file=sys.stderr, flush=True)
        self._shown = finished

    def _weight(self, trial: Trial) -> float:
        entry = self._matched[trial.plan.variant]
        share = self._tune_share if trial.plan.phase == "tune" else 1.0
        return float(entry["tokens"] * entry["seconds_per_token"] * share)

    def _left(self, trials: list[Trial]) -> float | None:
        """Seconds until the end, from what was done since the start."""
        total = sum(map(self._weight, trials))
        done = sum(self._weight(t) * (1.0 if t.finished else _share(t)) for t in trials)
        if self._first is None:
            self._first = done
        gained = done - self._first
        if gained <= 0.005 * total:
            return None
        return (time.monotonic() - self._start) * (total - done) / gained

    def _line(self, trial: Trial, number: int, total: int, left: float | None) -> str:
        record = trial.record or {}
        what = f"[{number:>{len(str(total))}}/{total}] {trial.plan.key:<28}"
        if record.get("status") == "ok":
            what += f" {self._score} {record['score']:.4f}  {record['cost']['tokens_per_second']:,.0f} {self._unit}s/s"
        else:
            what += f" {record.get('status')}: {str(record.get('error')).splitlines()[0][:80]}"
        return what + (f"  {_time(left)} left" if left is not None and number < total else "")

    def _table(self, trials: list[Trial], finished: int, left: float | None) -> Group:
        head = Text.assemble(
            (self._title, "bold"),
            f"  {finished} of {len(trials)} trials, {_time(time.monotonic() - self._start)}",
            f", {_time(left)} left" if left is not None else "",
        )
        table = Table.grid(padding=(0, 2))
        for trial in trials:
            if trial.state == "RUNNING":
                at = trial.progress
                table.add_row(
                    trial.plan.key,
                    ProgressBar(total=1.0, completed=_share(trial), width=16),
                    f"loss {at['train_loss']:.3f}" if "train_loss" in at else "",
                    f"{at['tokens_per_second']:,.0f} {self._unit}s/s" if "tokens_per_second" in at else "",
                )
        return Group(head, ProgressBar(total=len(trials), completed=finished, width=60), table)


def _share(trial: Trial) -> float:
    if trial.state != "RUNNING" or not trial.progress.get("steps"):
        return 0.0
    return float(trial.progress["step"] / trial.progress["steps"])


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
