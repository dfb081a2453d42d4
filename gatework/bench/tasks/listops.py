"""``listops``: nested list operations (Nangia and Bowman, ListOps, 2018, arXiv 1804.06028), with the trees of the Long Range Arena
(Tay et al., 2020, arXiv 2011.04006).

The distribution over trees is that of the released generator. It draws trees until one has a length that is wanted; here the
length is drawn first and the tree given its length, exactly, so that long trees cost no more than their tokens. The arena's
sizes are ``depth=10, arguments=10`` and 500 to 2000 tokens, and it writes expressions with further parentheses, which say
nothing that the operators' brackets do not say.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch

from gatework.bench.tasks.base import IGNORE, Batch, Predict, SequenceTask, Split
from gatework.core.errors import GateworkError

#: Behind the digits 0 to 9 the token ids: minimum, maximum, median (rounded down), sum modulo 10, the closing bracket, padding.
MIN, MAX, MED, SM, CLOSE, PAD = range(10, 16)
OPERATORS = (MIN, MAX, MED, SM)
#: The fewest tokens that an operator needs: itself, two digits, the bracket.
SMALLEST = 4


class ListOps(SequenceTask):
    """The value of a nested expression such as ``[MAX 2 9 [MIN 4 7 ] 0 ]``; the score is the share of wrong values.

    A tree's root is an operator. Each argument is an operator with probability 1/4 (above the lowest level), else a uniform
    digit; operators are ``[MIN``, ``[MAX``, ``[MED`` (the median, rounded down) and ``[SM`` (the sum modulo 10), each with 2 to
    ``arguments`` arguments, uniformly. The number of tokens is drawn first, uniform among those from 4 to ``length`` that a tree
    can have, and the tree from the distribution given that number. A row holds one expression and padding behind it; its only
    label, the value of the root, stands at the last bracket.

    Values are not uniform (minima and maxima pull to 0 and 9): ``majority_accuracy`` of an evaluation is what the most frequent
    value alone would score.

    Args:
        length: the most tokens of an expression in training, the width of a row.
        depth: levels of a tree, that of the digits included.
        arguments: the most arguments of an operator.
        extrapolate: also evaluate at 2 and 4 times the length, where expressions fill more than half of a row.

    Raises:
        GateworkError: for sizes that no tree fits.
    """

    name = "listops"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 1_000_000,
        "tune_tokens": 400_000,
        "batch_size": 32,
        "learning_rates": (1e-3, 1e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 2, "heads": 2, "tie_embeddings": False},
    }

    def __init__(self, length: int = 64, depth: int = 6, arguments: int = 4, extrapolate: bool = False) -> None:
        if length < SMALLEST:
            raise GateworkError(f"length must be at least {SMALLEST}, an operator with two digits, got {length}")
        if depth < 2 or arguments < 2:
            raise GateworkError(f"depth and arguments must be at least 2, got {depth} and {arguments}")
        self.depth, self.arguments = depth, arguments
        self._trees: dict[int, _Trees] = {}
        super().__init__(PAD + 1, length, extrapolate)

    def rows(self, count: int, length: int, generator: torch.Generator) -> Batch:
        """Expressions, padding behind each; the label at its last token."""
        if length not in self._trees:
            self._trees[length] = _Trees(self.depth, self.arguments, length)
        trees, least = self._trees[length], SMALLEST if length == self.length else length // 2 + 1
        sizes = [size for size in range(least, length + 1) if trees.weights[size] > 0]
        if not sizes:
            built = f"depth {self.depth} and at most {self.arguments} arguments"
            raise GateworkError(f"no tree of {built} has {least} to {length} tokens; a larger depth has longer ones")
        dice = random.Random(int(torch.randint(2**62, (), generator=generator)))
        x, y = torch.full((count, length), PAD), torch.full((count, length), IGNORE)
        for row in range(count):
            tokens = trees.draw(dice.choice(sizes), dice)
            x[row, : len(tokens)] = torch.tensor(tokens)
            y[row, len(tokens) - 1] = listops_eval(tokens)
        return x, y

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """The scores of every sequence task, and ``majority_accuracy``."""
        y = self.fixed[split, 1][1]
        counts = y[y != IGNORE].bincount()
        return super().evaluate(predict, split, max_batches) | {"majority_accuracy": float(counts.max() / counts.sum())}


def listops_eval(tokens: Sequence[int]) -> int:
    """The value of an expression.

    Args:
        tokens: ids, without padding.

    Raises:
        ValueError: for tokens that are not one whole expression.

    Example:
        >>> listops_eval([11, 2, 9, 10, 4, 7, 14, 0, 14])  # [MAX 2 9 [MIN 4 7 ] 0 ]
        9
    """
    stack: list[tuple[int, list[int]]] = [(PAD, [])]
    for token in tokens:
        if token in OPERATORS:
            stack.append((token, []))
        elif 0 <= token < 10:
            stack[-1][1].append(token)
        elif token == CLOSE and len(stack) > 1 and stack[-1][1]:
            operator, values = stack.pop()
            stack[-1][1].append(_apply(operator, values))
        else:
            raise ValueError(f"the token {token} does not belong where it stands in {list(tokens)}")
    if len(stack) > 1 or len(stack[0][1]) != 1:
        raise ValueError(f"one whole expression is wanted, not {list(tokens)}")
    return stack[0][1][0]


def _apply(operator: int, values: list[int]) -> int:
    if operator == MIN:
        return min(values)
    if operator == MAX:
        return max(values)
    if operator == SM:
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


class _Trees:
    """Trees of a given number of tokens.

    ``forests[level][k][n]`` is the probability that k arguments on that level have n tokens in all, ``weights[n]`` that of a
    tree with an operator as its root.
    """

    OPERATOR = 0.25  # The probability that an argument above the lowest level is an operator.

    def __init__(self, depth: int, arguments: int, length: int) -> None:
        self.arguments = arguments
        digit, nothing = np.zeros(length + 1), np.zeros(length + 1)
        digit[1], nothing[0] = 1, 1
        self.forests: dict[int, list[Any]] = {}
        one = digit
        for level in range(depth, 0, -1):
            if level < depth:
                self.weights = np.zeros(length + 1)  # Of an operator on this level: it and its bracket are two tokens.
                self.weights[2:] = sum(self.forests[level + 1][2:])[:-2] / (arguments - 1)
                one = (1 - self.OPERATOR) * digit + self.OPERATOR * self.weights
            self.forests[level] = [nothing]
            for _ in range(arguments):
                self.forests[level].append(np.convolve(self.forests[level][-1], one)[: length + 1])
        self._cumulated = cache(self._cumulate)

    def draw(self, size: int, dice: random.Random, level: int = 1) -> list[int]:
        """The tokens of an operator on a level, ``size`` in all."""
        rest = size - 2
        left = 2 + self._pick(level + 1, 0, rest, dice)  # How many arguments.
        tokens = [dice.choice(OPERATORS)]
        while left:
            piece = self._pick(level + 1, left, rest, dice)
            tokens += [dice.randrange(10)] if piece == 1 else self.draw(piece, dice, level + 1)
            left, rest = left - 1, rest - piece
        return [*tokens, CLOSE]

    def _pick(self, level: int, left: int, rest: int, dice: random.Random) -> int:
        cumulated = self._cumulated(level, left, rest)
        return bisect(cumulated, dice.random() * cumulated[-1])

    def _cumulate(self, level: int, left: int, rest: int) -> list[float]:
        """Cumulated weights: of 2, 3, ... arguments with ``rest`` tokens, where ``left`` is 0; else of 0, 1, ... tokens of the
        first of ``left`` arguments that have ``rest``."""
        forests = self.forests[level]
        if not left:
            return list(accumulate(float(forests[k][rest]) for k in range(2, self.arguments + 1)))
        return list(accumulate((forests[1][: rest + 1] * forests[left - 1][rest::-1]).tolist()))
