"""What can be said from a few seeds: paired differences, Holm's correction, the smallest difference a study could see.

Design: every variant runs the same seeds as the baseline (same data order, same streams), so the evidence is the
*paired* differences ``d_s = variant_s - baseline_s`` over the seeds where both runs finished. Their mean has a
Student t interval with ``n - 1`` degrees of freedom.

**Family.** All variants of a study are one family of ``m`` two-sided tests at a family-wise error of ``alpha``
(0.05), corrected by Holm's step-down procedure (Holm 1979): p-values in rising order are compared with ``alpha / m``,
``alpha / (m - 1)``, ... up to the first that is not below. ``m`` counts every planned variant; one that cannot be
tested (fewer than two pairs) enters with p = 1.

**Intervals.** Two are given, because no interval can be at once informative for a rejected hypothesis, consistent
with Holm's verdict, and jointly 95% (the joint region that corresponds to Holm's procedure ends at zero for what was
rejected; Guilbaud 2008, Strassburger and Bretz 2008).

- ``interval``, the one beside each verdict, has the level at which Holm's procedure tested the variant (Ludbrook
  2000): ``1 - alpha / (m - j + 1)`` for the j-th rejection, and ``1 - alpha / (m - r)`` for all that follow the r
  rejections; equal p-values share the strictest of their levels, so the order of the variants does not matter. It
  excludes zero exactly when Holm's procedure tells the two apart; each alone covers with at least 95%. Jointly they
  are not guaranteed 95%.
- ``joint``, at ``1 - alpha / m`` each (Bonferroni): all of them together cover with at least 95%.

**Missing runs.** A seed whose run diverged or failed has no pair. Leaving it out flatters the side that broke, so a
variant with a broken run is never called *better* and, where the baseline broke, never *worse*.

**Smallest visible difference.** The true difference that this test would find with a power of 80%: the ``delta`` at
which a noncentral t variable with noncentrality ``delta * sqrt(n) / sd`` exceeds the critical value at ``alpha / m``
(Holm's first and strictest step) with probability 0.8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special, stats

ALPHA = 0.05
POWER = 0.8
BETTER, WORSE, UNDECIDED = "better", "worse", "not told apart"

#: Differences whose spread is below this fraction of the scores are equal up to rounding.
ROUNDING = 1e-12

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Paired:
    """Paired differences: their number, mean, standard deviation (n - 1), t statistic and two-sided p. None: needs
    more pairs."""

    n: int
    mean: float | None
    sd: float | None
    t: float | None
    p: float | None

    def interval(self, level: float) -> tuple[float, float] | None:
        """The two-sided t interval of the mean that errs with probability ``level`` (0.05: a 95% interval)."""
        if self.mean is None or self.sd is None:
            return None
        half = float(stats.t.isf(level / 2, self.n - 1)) * self.sd / math.sqrt(self.n) if self.sd else 0.0
        return self.mean - half, self.mean + half


def paired(variant: Sequence[float], baseline: Sequence[float]) -> Paired:
    """The paired t test of ``variant - baseline``, value by value (as ``scipy.stats.ttest_rel``, but defined for zero spread).

    With no spread at all the test takes its limit: p is 1 where the differences are zero and 0 where all are the same
    other number."""
    differences = [float(v) - float(b) for v, b in zip(variant, baseline, strict=True)]
    n = len(differences)
    if n == 0:
        return Paired(0, None, None, None, None)
    mean = math.fsum(differences) / n
    if n == 1:
        return Paired(1, mean, None, None, None)
    sd = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    floor = ROUNDING * max(map(abs, [*variant, *baseline]), default=0.0)
    if sd <= floor:
        same = abs(mean) <= floor
        return Paired(n, 0.0 if same else mean, 0.0, 0.0 if same else math.copysign(math.inf, mean), 1.0 if same else 0.0)
    t = mean / (sd / math.sqrt(n))
    return Paired(n, mean, sd, t, float(2 * stats.t.sf(abs(t), n - 1)))


def holm(p: Sequence[float], alpha: float = ALPHA) -> tuple[list[float], list[float]]:
    """Holm's step-down correction.

    Returns: The adjusted p-values (rejected: at most ``alpha``) and the level at which each hypothesis was tested, in
        the order given. After the first hypothesis that is kept, all later ones share its level; equal p-values share
        the first one's."""
    m = len(p)
    adjusted, levels = [1.0] * m, [alpha] * m
    running, level, stopped = 0.0, alpha, False
    order = sorted(range(m), key=lambda i: p[i])
    for step, i in enumerate(order):
        running = max(running, min(1.0, (m - step) * p[i]))
        adjusted[i] = running
        tied = step > 0 and p[i] == p[order[step - 1]]
        if not stopped and not tied:
            level = alpha / (m - step)
            stopped = p[i] > level
        levels[i] = level
    return adjusted, levels


def power_of(delta: float, sd: float, n: int, alpha: float) -> float:
    """The probability that a two-sided paired t test at ``alpha`` over ``n`` pairs sees a true mean difference.

    The upper and lower tail of the noncentral t distribution, written as the mean of a chi-squared distribution over
    the normal numerator ``z + delta sqrt(n) / sd`` (library routines for the noncentral t fail at the large critical
    values of two or three seeds)."""
    df = n - 1
    critical = float(stats.t.isf(alpha / 2, df))
    shift = abs(delta) * math.sqrt(n) / sd

    # Gauss-Legendre on both sides of z = -shift, where the integrand has a kink; beyond 9 the normal density is nothing.
    kink = -min(shift, 9.0)
    nodes, weights = _legendre()
    z = np.concatenate([kink + (end - kink) * (nodes + 1) / 2 for end in (-9.0, 9.0)])
    step = np.concatenate([abs(end - kink) / 2 * weights for end in (-9.0, 9.0)])
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return float(step @ (density * special.chdtr(df, df * ((z + shift) / critical) ** 2)))


@functools.cache
def _legendre() -> tuple[Any, Any]:
    return np.polynomial.legendre.leggauss(300)


def detectable(sd: float | None, n: int, alpha: float, power: float = POWER) -> float | None:
    """The smallest true difference that a paired t test over ``n`` pairs finds with probability ``power``; None where
    it can find none (n < 2)."""
    if sd is None or n < 2:
        return None
    if sd == 0:
        return 0.0
    high = sd
    while power_of(high, sd, n, alpha) < power:
        high *= 2
    return float(optimize.brentq(lambda delta: power_of(delta, sd, n, alpha) - power, 0.0, high, xtol=1e-9 * sd))


def pooled(samples: Sequence[Paired]) -> float | None:
    """The standard deviation of paired differences, pooled over variants by their degrees of freedom."""
    usable = [(s.n - 1, s.sd) for s in samples if s.sd is not None]
    if not usable:
        return None
    return math.sqrt(sum(df * sd**2 for df, sd in usable) / sum(df for df, _ in usable))


@dataclass(frozen=True)
class Verdict:
    """What the study says about one variant against the baseline. Differences are variant minus baseline, in the unit
    of the score."""

    variant: str
    n: int
    seeds: int
    difference: float | None
    sd: float | None
    interval: tuple[float, float] | None
    level: float
    joint: tuple[float, float] | None
    p: float | None
    adjusted_p: float | None
    word: str
    detectable: float | None
    note: str


def verdicts(
    scores: Mapping[str, Mapping[int, float]],
    baseline: str,
    *,
    seeds: int,
    lower_is_better: bool = True,
    broken: Mapping[str, Sequence[int]] | None = None,
    alpha: float = ALPHA,
) -> dict[str, Verdict]:
    """One :class:`Verdict` per variant other than the baseline.

    Args:
        scores: of finished runs, by variant and seed. A variant without any is listed with an empty mapping.
        baseline: the variant to compare with.
        seeds: how many seeds the study planned.
        lower_is_better: the direction of the score.
        broken: seeds whose run diverged or failed, by variant.
        alpha: the family-wise error.
    """
    broken = broken or {}
    names = [name for name in scores if name != baseline]
    base = scores.get(baseline, {})
    samples = {}
    for name in names:
        common = sorted(set(scores[name]) & set(base))
        samples[name] = paired([scores[name][s] for s in common], [base[s] for s in common])
    tested = [samples[name].p for name in names]
    adjusted, levels = holm([1.0 if p is None else p for p in tested], alpha)
    found = {}
    for name, adjusted_p, level in zip(names, adjusted, levels, strict=True):
        sample = samples[name]
        word, note = UNDECIDED, ""
        if sample.p is None:
            note = "no seed has both runs" if sample.n == 0 else "one pair of runs shows no spread"
        elif adjusted_p <= alpha and sample.mean:
            word = BETTER if (sample.mean < 0) == lower_is_better else WORSE
            # A broken run counts against its own side: it is missing because it went badly.
            if word == BETTER and broken.get(name):
                word, note = UNDECIDED, "not called better: a run of it broke"
            elif word == WORSE and broken.get(baseline):
                word, note = UNDECIDED, "not called worse: a run of the baseline broke"
            elif sample.sd == 0:
                note = "the same difference in every seed"
        elif sample.mean == 0 and sample.sd == 0:
            note = "equal in every seed"
        found[name] = Verdict(
            variant=name,
            n=sample.n,
            seeds=seeds,
            difference=sample.mean,
            sd=sample.sd,
            interval=sample.interval(level),
            level=level,
            joint=sample.interval(alpha / len(names)),
            p=sample.p,
            adjusted_p=None if sample.p is None else adjusted_p,
            word=word,
            detectable=detectable(sample.sd, sample.n, alpha / len(names)),
            note=note,
        )
    return found


def smallest_visible(found: Mapping[str, Verdict], seeds: int, alpha: float = ALPHA) -> float | None:
    """The smallest difference that the study could have seen: by the pooled spread of its variants, with the
    ``seeds`` that it planned."""
    samples = [Paired(v.n, v.difference, v.sd, None, v.p) for v in found.values()]
    return detectable(pooled(samples), seeds, alpha / len(found)) if found else None


def pareto(costs: Sequence[float], scores: Sequence[float], lower_is_better: bool = True) -> list[int]:
    """The indices, by rising cost, of the points that no other point beats: none is at most as costly and at least as
    good, and better in one."""
    sign = 1.0 if lower_is_better else -1.0
    points = [(c, sign * s) for c, s in zip(costs, scores, strict=True)]

    def beaten(i: int) -> bool:
        (c, s) = points[i]
        return any(oc <= c and os <= s and (oc < c or os < s) for oc, os in points)

    return sorted((i for i in range(len(points)) if not beaten(i)), key=lambda i: points[i])


def reach(curve: Curve, loss: float) -> float | None:
    """How far along ``curve`` (position, loss) the loss first falls to ``loss``, by linear interpolation; None
    outside of the curve's range.

    A curve that starts at or below ``loss`` says only that the point lies before its first measurement, so that is
    None too, unless it is equal."""
    for i, (x, y) in enumerate(curve):
        if y <= loss:
            if i == 0:
                return x if y == loss else None
            x0, y0 = curve[i - 1]
            return x0 + (x - x0) * (y0 - loss) / (y0 - y)
    return None


def steps_saved(baseline: Curve, variant: Curve) -> float | None:
    """The fraction of training that the variant saves at equal validation loss: ``1 - variant's tokens / baseline's tokens``.

    Both are mean validation curves (tokens or steps, loss). The loss in question is the worse of the two final ones,
    because both curves reach it: a better variant is asked how early it had the baseline's final loss, a worse one
    how early the baseline had the variant's (then the result is negative: -0.25 means a quarter more training for the
    same loss). None where the faster curve reaches that loss before its first measurement. Learning rates decay at
    the end of both runs, so the curve that is read in its middle is at a disadvantage there: the figure errs towards
    zero."""
    if not baseline or not variant:
        return None
    (b_end, b_loss), (v_end, v_loss) = baseline[-1], variant[-1]
    if v_loss <= b_loss:
        needed = reach(variant, b_loss)
        return None if needed is None else 1 - needed / b_end
    needed = reach(baseline, v_loss)
    return None if needed is None or needed <= 0 else 1 - v_end / needed


def mean_curve(curves: Sequence[Mapping[int, float]]) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, greatest) over runs, at the steps where every run has a value."""
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(c) for c in curves)))
    columns = [(step, [c[step] for c in curves]) for step in steps]
    return [(step, math.fsum(values) / len(values), min(values), max(values)) for step, values in columns]


def expected_best(scores: Sequence[float], lower_is_better: bool = True) -> list[float]:
    """The expected best score of n of these trials drawn without replacement, for n = 1 ... all of them: how hard a
    variant is to tune.

    Exact over all subsets: the i-th best of N is the best of n with probability C(N - i, n - 1) / C(N, n).
    """
    ranked = sorted(scores, reverse=not lower_is_better)
    total = len(ranked)
    return [
        math.fsum(x * math.comb(total - i, n - 1) for i, x in enumerate(ranked, 1)) / math.comb(total, n)
        for n in range(1, total + 1)
    ]


def mean_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1) of a few numbers; None where there are too few."""
    n = len(values)
    if n == 0:
        return None, None
    mean = math.fsum(values) / n
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
