from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from gatework.bench import statistics
from gatework.bench.statistics import (
    BETTER,
    UNDECIDED,
    WORSE,
    detectable,
    expected_best,
    holm,
    mean_curve,
    mean_sd,
    paired,
    pareto,
    pooled,
    power_of,
    reach,
    smallest_visible,
    steps_saved,
    verdicts,
)


def by_seed(values):
    return dict(enumerate(map(float, values)))


# The paired test


def test_paired_by_hand():
    # d = (-1, -2, -3): mean -2, sd 1, t = -2 / (1 / sqrt 3) = -2 sqrt 3.
    # t(0.975, 2) = 4.30265: half the width is 4.30265 / sqrt 3 = 2.48414.
    found = paired([9.0, 8.0, 7.0], [10.0, 10.0, 10.0])
    assert (found.n, found.mean, found.sd) == (3, -2.0, 1.0)
    assert found.t == pytest.approx(-2 * math.sqrt(3), rel=1e-14)
    # With two degrees of freedom the t distribution is elementary: p = 1 - |t| / sqrt(t² + 2).
    assert found.p == pytest.approx(1 - math.sqrt(12 / 14), rel=1e-12)
    low, high = found.interval(0.05)
    assert (low, high) == pytest.approx((-4.48414, 0.48414), abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 4, 10])
@pytest.mark.parametrize("level", [0.05, 0.01, 0.05 / 7])
def test_paired_is_scipys(n, level):
    rng = np.random.default_rng(n)
    for _ in range(5):
        a, b = rng.normal(3, 1, n).tolist(), rng.normal(3.5, 1, n).tolist()
        found, wanted = paired(a, b), stats.ttest_rel(a, b)
        assert (found.t, found.p) == pytest.approx((wanted.statistic, wanted.pvalue), rel=1e-11)
        assert found.interval(level) == pytest.approx(tuple(wanted.confidence_interval(1 - level)), rel=1e-10)


def test_paired_takes_out_what_the_seed_moves():
    shared = [0.0, 50.0, -20.0]
    found = paired([s + d for s, d in zip(shared, (1.0, 1.5, 0.5), strict=True)], shared)
    assert found.sd == pytest.approx(0.5)


def test_no_pair_one_pair():
    nothing, one = paired([], []), paired([2.0], [3.0])
    assert (nothing.n, nothing.mean, nothing.p, nothing.interval(0.05)) == (0, None, None, None)
    assert (one.n, one.mean, one.sd, one.p, one.interval(0.05)) == (1, -1.0, None, None, None)


def test_no_spread():
    same, shifted = paired([1.0, 2.0], [1.0, 2.0]), paired([1.5, 2.5, 0.5], [1.0, 2.0, 0.0])
    assert (same.mean, same.sd, same.p, same.interval(0.05)) == (0.0, 0.0, 1.0, (0.0, 0.0))
    assert (shifted.mean, shifted.sd, shifted.p, shifted.interval(0.05)) == (0.5, 0.0, 0.0, (0.5, 0.5))


def test_rounding_is_no_spread():
    # 0.1 + 0.2 - 0.3 is 5.6e-17: to call that a finding would be absurd.
    found = paired([0.1 + 0.2, 0.1 + 0.7], [0.3, 0.8])
    assert (found.mean, found.sd, found.p) == (0.0, 0.0, 1.0)
    tiny = paired([1e-15, 3e-15, 2e-15], [0.0, 0.0, 0.0])  # Small scores are not rounding of themselves.
    assert tiny.p == pytest.approx(stats.ttest_1samp([1, 3, 2], 0).pvalue, rel=1e-9)


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])


# Holm


def test_holm_by_hand():
    adjusted, levels = holm([0.01, 0.04, 0.03, 0.005])
    # In order: 4 x 0.005, 3 x 0.01, 2 x 0.03, then the running maximum.
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert levels == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])


def test_holm_with_one_hypothesis_is_no_correction():
    assert holm([0.03]) == ([0.03], [0.05])
    assert holm([]) == ([], [])


def test_holm_is_the_closed_bonferroni_test():
    # Holm's procedure rejects i exactly when Bonferroni's global test rejects every intersection hypothesis that holds i.
    rng = np.random.default_rng(0)
    for _ in range(50):
        p = list(rng.uniform(0, 0.1, 4) ** 1.5)
        adjusted, _ = holm(p)
        for i in range(4):
            sets = [s for k in range(1, 5) for s in itertools.combinations(range(4), k) if i in s]
            assert adjusted[i] == pytest.approx(min(1.0, max(len(s) * min(p[j] for j in s) for s in sets)), rel=1e-12)


@pytest.mark.parametrize("p", [[0.001, 0.02, 0.02, 0.5], [0.02, 0.02], [0.01] * 5, [0.2, 0.2, 0.004], [0.0, 0.0, 0.03]])
def test_holm_does_not_know_the_order(p):
    adjusted, levels = holm(p)
    for order in itertools.permutations(range(len(p))):
        again, moved = holm([p[i] for i in order])
        assert again == [adjusted[i] for i in order]
        assert moved == [levels[i] for i in order]


def test_the_level_agrees_with_the_decision():
    rng = np.random.default_rng(1)
    for _ in range(300):
        p = [float(x) for x in rng.uniform(0, 0.08, rng.integers(1, 7))]
        for value, adjusted, level in zip(p, *holm(p), strict=True):
            assert (adjusted <= 0.05) == (value <= level)
            assert 0.05 / len(p) <= level <= 0.05


# The smallest visible difference


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (3, 0.05), (3, 0.01), (5, 0.01), (12, 0.05)])
def test_detectable_by_simulation(n, alpha):
    sd, repeats = 0.7, 40_000
    delta = detectable(sd, n, alpha)
    d = np.random.default_rng(n).normal(delta, sd, (repeats, n))
    t = d.mean(1) / (d.std(1, ddof=1) / math.sqrt(n))
    power = float(np.mean(np.abs(t) > stats.t.ppf(1 - alpha / 2, n - 1)))
    assert power == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / repeats))


@pytest.mark.parametrize(("delta", "n"), [(0.0, 3), (0.5, 4), (1.5, 6), (3.0, 2), (0.4, 50), (0.2, 400)])
def test_power_is_the_noncentral_t(delta, n):
    critical, shift = stats.t.isf(0.025, n - 1), delta * math.sqrt(n) / 1.3
    with np.errstate(divide="ignore"):  # Older versions of scipy divide by zero inside, and give the right number.
        wanted = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
    assert power_of(delta, 1.3, n, 0.05) == pytest.approx(wanted, rel=1e-7)
    assert power_of(0.0, 1.3, n, 0.05) == pytest.approx(0.05, rel=1e-8)


@pytest.mark.parametrize(("n", "alpha"), [(2, 0.05), (2, 0.05 / 30), (3, 0.001), (4, 0.01), (20, 0.05)])
def test_power_by_adaptive_quadrature(n, alpha):
    # Two and three seeds at a strict level: here the library's noncentral t gives up, so integrate over the spread instead.
    critical, df = stats.t.isf(alpha / 2, n - 1), n - 1
    for shift in (0.0, 1.0, 0.5 * critical, 1.5 * critical, 4 * critical):

        def integrand(s, shift=shift):
            density = 2 * df * s * stats.chi2.pdf(df * s * s, df)
            return density * (stats.norm.sf(critical * s - shift) + stats.norm.cdf(-critical * s - shift))

        middle = shift / critical
        points = sorted({0.5 * middle, middle, 1.5 * middle, 0.5 / critical, 5 / critical, 1.0})
        wanted = integrate.quad(integrand, 0, 8, points=points, limit=400, epsabs=1e-11, epsrel=1e-11)[0]
        assert power_of(shift / math.sqrt(n), 1.0, n, alpha) == pytest.approx(wanted, rel=1e-6)


def test_detectable_scales_and_shrinks():
    assert detectable(2.0, 4, 0.05) == pytest.approx(2 * detectable(1.0, 4, 0.05), rel=1e-7)
    by_n = [detectable(1.0, n, 0.01) for n in (2, 3, 5, 9, 30)]
    assert by_n == sorted(by_n, reverse=True)
    # A textbook approximation for many pairs: (z(0.975) + z(0.8)) / sqrt n.
    assert detectable(1.0, 400, 0.05) == pytest.approx((1.959964 + 0.841621) / 20, rel=0.005)
    assert (detectable(1.0, 1, 0.05), detectable(None, 3, 0.05), detectable(0.0, 3, 0.05)) == (None, None, 0.0)


def test_pooled_weighs_by_degrees_of_freedom():
    two, four = paired([1.0, 3.0], [0.0, 0.0]), paired([1.0, -1.0, 1.0, -1.0], [0.0] * 4)
    assert pooled([two, four, paired([1.0], [0.0])]) == pytest.approx(math.sqrt((1 * 2 + 3 * (4 / 3)) / 4))
    assert pooled([paired([1.0], [0.0])]) is None


# Verdicts


def study(seed, effects, n, sd=1.0, baseline_sd=3.0):
    """Scores of a study whose truth is known: effects of the variants, noise of each run, a shift by seed that all share."""
    rng = np.random.default_rng(seed)
    shift = rng.normal(0, baseline_sd, n)
    return {name: by_seed(10 + shift + effect + rng.normal(0, sd, n)) for name, effect in {"base": 0.0, **effects}.items()}


@pytest.fixture
def no_power(monkeypatch):
    """The power figure costs most of a verdict's time and decides nothing."""
    monkeypatch.setattr(statistics, "detectable", lambda *_, **__: None)


def test_words_and_directions():
    base = by_seed([1.0, 1.1, 0.9])
    low = {seed: value - 0.5 + 0.01 * seed for seed, value in base.items()}
    high = {seed: value + 0.5 + 0.01 * seed for seed, value in base.items()}
    near = {0: 1.1, 1: 1.0, 2: 0.95}
    scores = {"base": base, "low": low, "high": high, "near": near}
    loss = verdicts(scores, "base", seeds=3)
    assert {name: v.word for name, v in loss.items()} == {"low": BETTER, "high": WORSE, "near": UNDECIDED}
    accuracy = verdicts(scores, "base", seeds=3, lower_is_better=False)
    assert {name: v.word for name, v in accuracy.items()} == {"low": WORSE, "high": BETTER, "near": UNDECIDED}
    # The direction changes the word and nothing else.
    assert all(loss[name].interval == accuracy[name].interval and loss[name].p == accuracy[name].p for name in loss)


def test_the_interval_excludes_zero_exactly_when_told_apart(no_power):
    told = 0
    for seed in range(60):
        for v in verdicts(study(seed, {"a": 0.0, "b": 2.0, "c": -4.0, "d": 1.0}, 4), "base", seeds=4).values():
            low, high = v.interval
            assert (low > 0 or high < 0) == (v.word != UNDECIDED) == (v.adjusted_p <= 0.05)
            assert low < v.difference < high
            assert v.joint[0] <= low
            assert high <= v.joint[1]
            told += v.word != UNDECIDED
    assert 20 < told < 220


def test_intervals_are_at_their_documented_levels():
    scores = study(5, {"a": -6.0, "b": 0.2, "c": 5.0}, 4)
    found = verdicts(scores, "base", seeds=4)
    by_p = sorted(found.values(), key=lambda v: v.p)
    assert [v.word for v in by_p] == [by_p[0].word, by_p[1].word, UNDECIDED]
    assert UNDECIDED not in (by_p[0].word, by_p[1].word)
    for v, level in zip(by_p, (0.05 / 3, 0.05 / 2, 0.05), strict=True):
        d = [scores[v.variant][s] - scores["base"][s] for s in range(4)]
        assert v.level == pytest.approx(level)
        for interval, error in ((v.interval, level), (v.joint, 0.05 / 3)):
            wanted = stats.t.interval(1 - error, 3, loc=np.mean(d), scale=stats.sem(d))
            assert interval == pytest.approx(wanted, rel=1e-10)
        assert v.detectable == pytest.approx(detectable(float(np.std(d, ddof=1)), 4, 0.05 / 3), rel=1e-8)


def test_order_of_the_variants_does_not_matter(no_power):
    scores = study(3, {"a": -2.0, "b": 2.0, "c": 0.3}, 4)
    scores["twin"] = dict(scores["a"])  # The same parts under two names: a tie.
    wanted = verdicts(scores, "base", seeds=4)
    for order in itertools.permutations(scores):
        assert verdicts({name: scores[name] for name in order}, "base", seeds=4) == wanted
    assert wanted["twin"].interval == wanted["a"].interval


def test_one_seed_gives_no_verdict():
    v = verdicts({"base": {0: 1.0}, "a": {0: 0.1}}, "base", seeds=1)["a"]
    assert (v.word, v.difference, v.interval, v.joint, v.p, v.adjusted_p, v.detectable) == (
        UNDECIDED, pytest.approx(-0.9), None, None, None, None, None,
    )  # fmt: skip
    assert v.note == "one pair of runs shows no spread"
    assert smallest_visible({"a": v}, 1) is None


def test_two_seeds_can_find_only_the_glaring():
    glaring = verdicts({"base": by_seed([1.0, 2.0]), "a": by_seed([0.5, 1.501])}, "base", seeds=2)["a"]
    plain = verdicts({"base": by_seed([1.0, 2.0]), "a": by_seed([0.5, 1.6])}, "base", seeds=2)["a"]
    assert (glaring.word, plain.word) == (BETTER, UNDECIDED)
    # One degree of freedom is a Cauchy distribution: the half width is 12.706 sd / sqrt 2.
    assert plain.interval[1] - plain.difference == pytest.approx(12.7062047 * plain.sd / math.sqrt(2), rel=1e-8)


def test_zero_variance():
    found = verdicts(
        {"base": by_seed([1.0, 2.0, 3.0]), "same": by_seed([1.0, 2.0, 3.0]), "less": by_seed([0.5, 1.5, 2.5])}, "base", seeds=3
    )
    same, less = found["same"], found["less"]
    assert (same.word, same.note, same.interval) == (UNDECIDED, "equal in every seed", (0.0, 0.0))
    assert (less.word, less.note, less.interval) == (BETTER, "the same difference in every seed", (-0.5, -0.5))


def test_unequal_seeds_are_paired_over_the_common_ones():
    scores = {"base": {0: 1.0, 1: 1.2, 2: 1.1, 5: 9.0}, "a": {1: 0.9, 2: 0.85, 0: 0.7, 7: -9.0}}
    v = verdicts(scores, "base", seeds=5)["a"]
    wanted = stats.ttest_rel([0.7, 0.9, 0.85], [1.0, 1.2, 1.1])
    assert (v.n, v.seeds, v.p) == (3, 5, pytest.approx(wanted.pvalue, rel=1e-10))


def test_nothing_in_common():
    found = verdicts({"base": {0: 1.0, 1: 2.0}, "a": {2: 1.0}, "b": {}}, "base", seeds=3)
    assert {v.word for v in found.values()} == {UNDECIDED}
    assert {v.note for v in found.values()} == {"no seed has both runs"}
    assert {v.difference for v in found.values()} == {None}


def test_an_untested_variant_still_counts_in_the_family():
    scores = study(9, {"a": -4.0}, 3)
    alone = verdicts(scores, "base", seeds=3)["a"]
    beside = verdicts(scores | {"never ran": {}}, "base", seeds=3)["a"]
    assert beside.adjusted_p == pytest.approx(2 * alone.p)
    assert alone.adjusted_p == alone.p


def test_a_broken_run_counts_against_its_side():
    base = by_seed([1.0, 1.1, 0.9, 1.05])
    better = {s: base[s] - 0.5 + 0.01 * s for s in (0, 1, 2)}
    worse = {s: base[s] + 0.5 + 0.01 * s for s in (0, 1, 2)}
    scores = {"base": base, "better": better, "worse": worse}
    whole = verdicts(scores, "base", seeds=4)
    assert [whole[n].word for n in ("better", "worse")] == [BETTER, WORSE]
    own = verdicts(scores, "base", seeds=4, broken={"better": [3], "worse": [3]})
    assert (own["better"].word, own["better"].note) == (UNDECIDED, "not called better: a run of it broke")
    assert own["worse"].word == WORSE
    theirs = verdicts(scores, "base", seeds=4, broken={"base": [3]})
    assert (theirs["worse"].word, theirs["worse"].note) == (UNDECIDED, "not called worse: a run of the baseline broke")
    assert theirs["better"].word == BETTER


def test_false_findings_are_rare(no_power):
    repeats, names = 1500, ("a", "b", "c", "d")
    wrong = covered = together = 0
    for seed in range(repeats):
        found = verdicts(study(seed, dict.fromkeys(names, 0.0), 3), "base", seeds=3).values()
        wrong += any(v.word != UNDECIDED for v in found)
        covered += sum(v.interval[0] <= 0 <= v.interval[1] for v in found)
        together += all(v.joint[0] <= 0 <= v.joint[1] for v in found)
    slack = 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert wrong / repeats <= 0.05 + slack
    assert wrong / repeats >= 0.02  # A procedure that never finds anything would pass the line above.
    assert covered / (repeats * len(names)) >= 0.95 - slack
    assert together / repeats >= 0.95 - slack


def test_the_family_stays_safe_where_some_effects_are_real(no_power):
    repeats = 800
    wrong = hits = covered = 0
    for seed in range(repeats):
        found = verdicts(study(seed, {"a": 0.0, "b": -20.0, "c": 0.0, "d": 20.0}, 4), "base", seeds=4)
        wrong += any(found[name].word != UNDECIDED for name in ("a", "c"))
        hits += (found["b"].word == BETTER) + (found["d"].word == WORSE)
        covered += all(
            found[n].joint[0] <= e <= found[n].joint[1] for n, e in {"a": 0.0, "b": -20.0, "c": 0.0, "d": 20.0}.items()
        )
    slack = 3 * math.sqrt(0.05 * 0.95 / repeats)
    assert wrong / repeats <= 0.05 + slack
    assert covered / repeats >= 0.95 - slack
    assert hits / (2 * repeats) > 0.99


def test_a_real_effect_is_found_as_often_as_promised(no_power):
    # One run's noise is 1, so a paired difference has the standard deviation sqrt 2.
    delta, repeats = detectable(math.sqrt(2), 5, 0.05), 1500
    found = [verdicts(study(seed, {"a": -delta}, 5), "base", seeds=5)["a"].word for seed in range(repeats)]
    assert found.count(BETTER) / repeats == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / repeats))
    assert found.count(WORSE) == 0


def test_smallest_visible_is_pooled_and_for_the_planned_seeds():
    scores = {
        "base": by_seed([0.0] * 4), "a": by_seed([1.0, -1.0, 1.0, -1.0]), "b": {0: 2.0, 1: 0.0}, "c": {0: 1.0},
    }  # fmt: skip
    found = verdicts(scores, "base", seeds=4)
    sd = math.sqrt((3 * (4 / 3) + 1 * 2) / 4)
    assert smallest_visible(found, 4) == pytest.approx(detectable(sd, 4, 0.05 / 3), rel=1e-8)
    assert smallest_visible({}, 4) is None


# Pareto front


def test_pareto():
    #        0    1    2    3    4    5
    costs = [1.0, 2.0, 3.0, 2.0, 4.0, 0.5]
    losses = [5.0, 3.0, 3.0, 2.0, 1.0, 9.0]
    assert pareto(costs, losses) == [5, 0, 3, 4]
    assert pareto(costs, [-x for x in losses], lower_is_better=False) == [5, 0, 3, 4]
    assert pareto([1.0, 1.0], [2.0, 2.0]) == [0, 1]  # Equal points do not beat each other.
    assert pareto([], []) == []


# Steps saved


def test_reach():
    curve = [(10.0, 3.0), (20.0, 2.0), (30.0, 1.0)]
    assert reach(curve, 1.5) == 25.0
    assert reach(curve, 3.0) == 10.0  # Equal to the first measurement.
    assert reach(curve, 3.5) is None  # Before the first measurement: unknown.
    assert reach(curve, 0.5) is None  # Never.
    assert reach([], 1.0) is None


def test_steps_saved_where_the_answer_is_known():
    # Losses fall along straight lines: the variant at twice the speed has the baseline's final loss at half of the training.
    baseline = [(float(x), 10.0 - x) for x in range(1, 9)]
    twice = [(float(x), 10.0 - 2 * x) for x in range(1, 5)] + [(8.0, 1.0)]
    assert steps_saved(baseline, twice) == pytest.approx(0.5)
    # Seen from the other side the slower one needs twice the training.
    assert steps_saved(twice[:4], [(x, y) for x, y in baseline if x <= 4]) == pytest.approx(-1.0)
    assert steps_saved(baseline, baseline) == 0.0
    early = [(1.0, 1.5), (8.0, 1.0)]  # Better than the baseline ever was, at the first measurement.
    assert steps_saved(baseline, early) is None
    assert steps_saved([], twice) is None
    assert steps_saved(baseline, []) is None


def test_steps_saved_on_power_laws():
    # loss = 1 + tokens^-0.5 and 1 + (k tokens)^-0.5: the variant is k times as fast at every loss.
    positions = [float(x) for x in range(100, 10_001, 50)]
    k = 1.6
    base, fast = ([(x, 1 + (s * x) ** -0.5) for x in positions] for s in (1.0, k))
    assert steps_saved(base, fast) == pytest.approx(1 - 1 / k, abs=1e-5)
    assert steps_saved(fast, base) == pytest.approx(1 - k, abs=1e-5)


def test_mean_curve():
    found = mean_curve([{10: 3.0, 20: 2.0, 30: 1.0}, {10: 5.0, 30: 2.0}])
    assert found == [(10, 4.0, 3.0, 5.0), (30, 1.5, 1.0, 2.0)]
    assert mean_curve([]) == []


@pytest.mark.parametrize("lower", [True, False])
def test_expected_best_over_all_subsets(lower):
    scores, best = [3.0, 1.5, 2.0, 7.0, 2.0], min if lower else max
    wanted = []
    for n in range(1, 6):
        picks = [best(pick) for pick in itertools.combinations(scores, n)]
        wanted.append(sum(picks) / len(picks))
    assert expected_best(scores, lower) == pytest.approx(wanted, rel=1e-13)


def test_mean_sd():
    assert mean_sd([]) == (None, None)
    assert mean_sd([2.0]) == (2.0, None)
    assert mean_sd([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, np.std([1, 2, 4], ddof=1)))
