"""What the experiments behind the papers' claims share: a finding, its verdict, and what is written down of them."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from gatework.bench.record import hardware, versions, write_json
from gatework.bench.report import write_text
from gatework.bench.statistics import ALPHA, paired

#: Resamples behind an interval of a slope.
BOOTSTRAP = 2000
HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not told apart"


@dataclass(frozen=True)
class Finding:
    """One measured quantity against what the paper predicts of it.

    Attributes:
        what: what was measured.
        predicted: what the paper says of it, in words.
        measured: the mean.
        interval: its 95% interval.
        verdict: ``holds here``, ``does not hold here`` or ``not told apart``.
    """

    what: str
    predicted: str
    measured: float
    interval: tuple[float, float]
    verdict: str


@dataclass(frozen=True)
class Outcome:
    """All findings of one claim, and how they came about."""

    paper: str
    statement: str
    findings: tuple[Finding, ...]
    settings: Mapping[str, Any]
    seconds: float

    @property
    def verdict(self) -> str:
        """It holds where every finding does, and does not where any does not."""
        words = {finding.verdict for finding in self.findings}
        return FAILS if FAILS in words else OPEN if OPEN in words else HOLDS

    def write(self, folder: Path) -> Path:
        """Write ``PAPER.json`` and ``PAPER.md``; returns the latter."""
        about = asdict(self) | {"verdict": self.verdict, "versions": versions(), "hardware": hardware()}
        write_json(folder / f"{self.paper}.json", about)
        path = folder / f"{self.paper}.md"
        write_text(path, self.markdown())
        return path

    def markdown(self) -> str:
        """The findings as a table."""
        lines = [f"# {self.paper}: {self.verdict}", "", self.statement, ""]
        lines += ["| measured | predicted | mean | 95% interval | verdict |", "|---|---|---|---|---|"]
        for f in self.findings:
            low, high = f.interval
            lines.append(f"| {f.what} | {f.predicted} | {f.measured:.3f} | [{low:.3f}, {high:.3f}] | {f.verdict} |")
        about = ", ".join(f"{key} {json.dumps(value)}" for key, value in self.settings.items())
        words = ", ".join(f"{key} {value}" for key, value in (versions() | hardware()).items())
        return "\n".join([*lines, "", f"Settings: {about}. It took {self.seconds:.0f} s.", "", words]) + "\n"


class Claim(ABC):
    """A paper's claim as an experiment: ``run`` measures, on fixed seeds.

    ``paper`` is its id in ``papers.toml``, ``statement`` the sentence that is tested, ``settings`` the full size, ``quick`` what a
    first look changes of it, ``duration`` what the full size takes on two cores.
    """

    paper: ClassVar[str]
    statement: ClassVar[str]
    duration: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]]
    quick: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def measure(self, say: Callable[[str], None], **settings: Any) -> Sequence[Finding]:
        """The findings at these settings; ``say`` takes a line of progress."""

    def run(self, quick: bool = False, say: Callable[[str], None] = lambda line: None) -> Outcome:
        """Measure at full size, or for a first look."""
        settings = dict(self.settings) | (dict(self.quick) if quick else {})
        start = time.monotonic()
        findings = tuple(self.measure(say, **settings))
        return Outcome(self.paper, self.statement, findings, settings, time.monotonic() - start)


def slope(what: str, errors: Mapping[int, Sequence[float]], low: float, high: float, words: str) -> Finding:
    """The exponent of n in an error that falls as a power of n.

    The least-squares slope of the logarithm of the mean error over replicates on log n; the interval is the percentile bootstrap
    over the replicates of each n.

    Args:
        what: what the errors are of.
        errors: for each n the errors of its replicates.
        low, high: where the exponent is predicted to lie.
        words: the prediction in words.
    """
    sizes = np.log(np.array(list(errors)))
    weights = (sizes - sizes.mean()) / np.square(sizes - sizes.mean()).sum()
    draw = np.random.default_rng(0)
    rows = [np.array(row) for row in errors.values()]
    means = np.stack([row[draw.integers(len(row), size=(BOOTSTRAP, len(row)))].mean(1) for row in rows], 1)
    ends = np.quantile(np.log(means) @ weights, [0.025, 0.975])
    measured = float(np.log([row.mean() for row in rows]) @ weights)
    return _finding(what, words, measured, (float(ends[0]), float(ends[1])), low, high)


def judged(what: str, words: str, values: Sequence[float], low: float, high: float) -> Finding:
    """The mean of ``values`` with its 95% t interval, predicted to lie in [low, high]."""
    found = paired(values, [0.0] * len(values))
    interval = found.interval(ALPHA)
    assert found.mean is not None
    assert interval is not None
    return _finding(what, words, found.mean, interval, low, high)


def _finding(what: str, words: str, measured: float, interval: tuple[float, float], low: float, high: float) -> Finding:
    """The prediction holds where the whole interval lies within [low, high], and does not where all of it lies outside."""
    inside = low <= interval[0] and interval[1] <= high
    outside = interval[1] < low or interval[0] > high
    return Finding(what, words, measured, interval, HOLDS if inside else FAILS if outside else OPEN)
