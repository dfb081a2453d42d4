from __future__ import annotations

import math

import pytest

from gatework.bench import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0"), (7, "7"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_499, "999k"), (999_500, "1.00M"),
        (1_300_000, "1.30M"), (2_000_000, "2M"), (123_456_789_012, "123G"), (9.87e14, "987T"), (1.5e18, "1.50E"), (0.25, "0.250"),
        (-1234, "-1.23k"), (999.4, "999"), (999.6, "1000"),
    ],
)  # fmt: skip
def test_si(value, text):
    assert formats.si(value) == text


@pytest.mark.parametrize("exponent", range(-3, 18))
def test_si_keeps_three_digits(exponent):
    factors = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
    for digits in (1.0, 1.234, 4.567, 9.994, 9.999):
        text = formats.si(digits * 10.0**exponent)
        number = float(text.rstrip("kMGTPE")) * factors.get(text[-1], 1.0)
        assert number == pytest.approx(digits * 10.0**exponent, rel=0.0051)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.0, 3, "0"), (3, 3, "3"), (3.0, 2, "3"), (0.04912, 2, "0.049"), (0.0093, 3, "0.00930"), (12.345, 3, "12.3"),
        (1e-7, 2, "1.0e-07"),
        (123_456.0, 2, "120000"), (-0.5, 2, "-0.50"), (math.inf, 2, "inf"), (0.99951, 3, "1.00"), (None, 3, "–"),
    ],
)  # fmt: skip
def test_significant(value, digits, text):
    assert formats.significant(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (24_576, "24 KiB"), (4.1e7, "39.1 MiB"),
        (2**30 * 1.5, "1.50 GiB"), (2**43, "8 TiB"),
    ],
)  # fmt: skip
def test_size(value, text):
    assert formats.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0123, "0.0123s"), (8.256, "8.26s"), (55.4, "55s"), (99.4, "99s"), (99.6, "1m40s"), (125, "2m05s"),
        (3599.4, "59m59s"),
        (3599.6, "1h00m"), (3725, "1h02m"), (7199.9, "2h00m"), (359_999, "4d04h"), (86_400 * 4 + 3600 * 6, "4d06h"),
    ],
)  # fmt: skip
def test_seconds(value, text):
    assert formats.seconds(value) == text


def test_fixed():
    assert formats.fixed(1.23456, 3) == "1.235"
    assert formats.fixed(0.5, 2, sign=True) == "+0.50"
    assert formats.fixed(-0.0001, 3) == "0.000"  # No sign on nothing.
    assert formats.fixed(-0.0001, 3, sign=True) == "+0.000"
    assert formats.fixed(12_961.7, 0) == "12962"
    assert formats.fixed(1.05e-4, None) == "1.05e-4"
    assert formats.fixed(-2e5, None, sign=True) == "-2.00e5"
    assert formats.fixed(-0.0, None) == "0.00e0"
    assert formats.fixed(None, 3) == "–"


def test_percent_ratio_p():
    assert [formats.percent(v) for v in (0.0838, -0.12, 0.0, 1.5, 0.0996, None)] == ["+8.4%", "-12%", "+0.0%", "+150%", "+10%", "–"]
    assert formats.percent(0.02, sign=False) == "2.0%"
    assert [formats.ratio(v) for v in (1.0, 0.5512, 9.994, 12.34, None)] == ["1.00x", "0.55x", "9.99x", "12.3x", "–"]
    assert [formats.p_value(v) for v in (0.0, 0.00012, 0.0089, 0.05, 0.81, 1.0, None)] == [
        "<0.0001", "0.00012", "0.0089", "0.05", "0.81", "1.00", "–",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "spreads", "decimals"),
    [
        ([1.444], [0.02], 3),  # Four digits of the score.
        ([1.444], [0.0002], 4),  # A small spread earns one more, not a row of them.
        ([0.912], [0.02], 4),
        ([105.0, 80.0], [3.0], 1),
        ([12_000.0], [900.0], 0),
        ([0.02], [], 5),
        ([1.05e-4, 8e-5], [1e-6], None),
        ([1e6], [1e5], None),
        ([], [], 3),
        ([0.0, 0.0], [], 3),
    ],
)
def test_decimals_for(scores, spreads, decimals):
    assert formats.decimals_for(scores, spreads) == decimals


def test_words():
    assert [formats.listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]
    assert [formats.counted(n, "seed") for n in (0, 1, 3)] == ["0 seeds", "1 seed", "3 seeds"]
