"""The task ``listops``."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest
import torch

from gatework.bench.tasks import listops_eval, make_task
from gatework.bench.tasks.base import IGNORE
from gatework.bench.tasks.listops import CLOSE, MAX, MED, MIN, OPERATORS, PAD, SM, _Trees
from gatework.core import GateworkError

from .made import take

WORDS = [*"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]
FUNCTIONS = {
    MIN: min, MAX: max, MED: lambda values: int(statistics.median(values)), SM: lambda values: sum(values) % 10,
}  # fmt: skip


def read(text):
    return [WORDS.index(word) for word in text.split()]


def parse(tokens):
    """A tree as a digit or (operator, arguments); what is left over is an error."""

    def expression(i):
        if tokens[i] < 10:
            return tokens[i], i + 1
        operator, arguments, i = tokens[i], [], i + 1
        while tokens[i] != CLOSE:
            argument, i = expression(i)
            arguments.append(argument)
        return (operator, arguments), i + 1

    tree, end = expression(0)
    assert end == len(tokens)
    return tree


def value(tree):
    return tree if isinstance(tree, int) else FUNCTIONS[tree[0]]([value(argument) for argument in tree[1]])


def depth(tree):
    return 1 if isinstance(tree, int) else 1 + max(map(depth, tree[1]))


def widths(tree):
    return [] if isinstance(tree, int) else [len(tree[1]), *(n for argument in tree[1] for n in widths(argument))]


def chance(tree, levels, arguments, level=1):
    """The probability that the released generator draws a tree of this shape: a digit, or with 1/4 (at the root always, on the
    lowest level never) an operator with 2 to ``arguments`` arguments."""
    if isinstance(tree, int):
        return 1 if level == levels else Fraction(3, 4)
    own = Fraction(1, arguments - 1) * (1 if level == 1 else Fraction(1, 4))
    return own * math.prod(chance(argument, levels, arguments, level + 1) for argument in tree[1])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("[MIN 3 [SM 9 9 9 ] ]", 3),
        ("[SM 9 9 9 ]", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 9 4 1 ]", 4),
        ("[MED 8 1 9 4 ]", 6),
        ("[MED 0 0 9 9 ]", 4),
        ("[SM [MED 5 6 ] [MAX 0 1 ] [MIN 8 9 ] ]", 4),
        ("7", 7),
    ],
)
def test_values_by_hand(text, wanted):
    assert listops_eval(read(text)) == wanted


@pytest.mark.parametrize("text", ["", "1 2", "[MIN 1 2", "[MIN ]", "]", "[MAX 1 2 ] ]", "[MAX 1 ] 3"])
def test_what_is_no_expression_has_no_value(text):
    with pytest.raises(ValueError, match=r"does not belong where it stands|one whole expression is wanted"):
        listops_eval(read(text))


def test_padding_has_no_value():
    with pytest.raises(ValueError, match="the token 15 does not belong"):
        listops_eval([*read("[MIN 1 2 ]"), PAD])


@pytest.mark.parametrize(("length", "levels", "arguments"), [(64, 6, 4), (4, 2, 2), (30, 3, 10), (50, 9, 2)])
def test_rows(length, levels, arguments):
    made = make_task("listops", length=length, depth=levels, arguments=arguments)
    seen = set()
    for x, y in take(made, 1, 64, 3):
        assert x.shape == y.shape == (64, length)
        for row, labels in zip(x.tolist(), y.tolist(), strict=True):
            size = [*row, PAD].index(PAD)
            assert row[size:] == [PAD] * (length - size)
            tree = parse(row[:size])
            assert tree[0] in OPERATORS
            assert depth(tree) <= levels
            assert all(2 <= n <= arguments for n in widths(tree))
            assert [i for i, label in enumerate(labels) if label != IGNORE] == [size - 1]
            assert labels[size - 1] == value(tree)
            seen.add(size)
    assert min(seen) == 4
    assert max(seen) > length // 2


def test_longer_rows_are_filled_beyond_their_half():
    made = make_task("listops", length=20, extrapolate=True)
    for times, least, most in ((1, 4, 20), (2, 21, 40), (4, 41, 80)):
        x, _ = made.fixed["test", times]
        sizes = (x != PAD).sum(1)
        assert set(sizes.tolist()) == set(range(least, most + 1))
        counts = sizes.bincount(minlength=most + 1)[least:].double() / len(sizes)
        assert (counts - 1 / (most + 1 - least)).abs().max() < 0.035


@pytest.mark.parametrize(("levels", "arguments"), [(2, 3), (3, 2), (4, 3)])
def test_the_probability_of_a_length_is_exact(levels, arguments):
    @cache
    def some(level, count, size):
        """The probability that ``count`` arguments on a level have ``size`` tokens."""
        if count == 0:
            return Fraction(size == 0)
        return sum(one(level, n) * some(level, count - 1, size - n) for n in range(1, size + 1))

    @cache
    def one(level, size):
        digit = Fraction(size == 1)
        return digit if level == levels else Fraction(3, 4) * digit + Fraction(1, 4) * operator(level, size)

    @cache
    def operator(level, size):
        total = sum(some(level + 1, count, size - 2) for count in range(2, arguments + 1)) if size > 2 else 0
        return Fraction(total) / (arguments - 1)

    weights = _Trees(levels, arguments, 30).weights
    for size in range(31):
        assert weights[size] == pytest.approx(float(operator(1, size)), rel=1e-12, abs=1e-15)


def test_trees_have_the_distribution_of_the_released_generator_given_their_length():
    levels, arguments, size, draws = 4, 3, 11, 20_000

    def shape(tree):
        return 0 if isinstance(tree, int) else (MIN, tuple(map(shape, tree[1])))

    trees, dice = _Trees(levels, arguments, size), random.Random(0)
    drawn = [trees.draw(size, dice) for _ in range(draws)]
    found = Counter(shape(parse(tokens)) for tokens in drawn)
    wanted = {tree: chance(tree, levels, arguments) for tree in found}
    assert float(sum(wanted.values())) == pytest.approx(trees.weights[size])  # No shape is missing.
    for tree, probability in wanted.items():
        assert found[tree] / draws == pytest.approx(float(probability / sum(wanted.values())), abs=0.006)
    tokens = Counter(token for row in drawn for token in row)
    for alike in (range(10), OPERATORS):
        total = sum(tokens[token] for token in alike)
        assert all(tokens[token] / total * len(alike) == pytest.approx(1, abs=0.04) for token in alike)


def test_the_share_of_the_most_frequent_value_is_said():
    made = make_task("listops")
    y = made.fixed["test", 1][1]
    values, (most, count) = y[y != IGNORE], Counter(y[y != IGNORE].tolist()).most_common(1)[0]
    said = made.evaluate(lambda x: torch.nn.functional.one_hot(torch.full_like(x, most), 16).float(), "test")
    assert said["majority_accuracy"] == said["accuracy"] == pytest.approx(count / len(values))
    assert 0.1 < said["majority_accuracy"] < 0.3


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"length": 3}, "length must be at least 4, an operator with two digits, got 3"),
        ({"depth": 1}, "depth and arguments must be at least 2, got 1 and 4"),
        ({"arguments": 1}, "depth and arguments must be at least 2, got 6 and 1"),
        (
            {"depth": 4, "extrapolate": True},
            "no tree of depth 4 and at most 4 arguments has 129 to 256 tokens; a larger depth has longer ones",
        ),
    ],
)
def test_sizes_that_no_tree_fits_are_refused(options, sentence):
    with pytest.raises(GateworkError, match=sentence):
        make_task("listops", **options)
