"""``recall``: multi-query associative recall (Arora et al., Zoology, 2023, arXiv 2312.04927, appendix).

The generator follows the released code, with the differences that :class:`Recall` names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import IGNORE, Batch, SequenceTask
from gatework.core.errors import GateworkError


class Recall(SequenceTask):
    """Key-value pairs are shown, then each key once more: the model answers with its value; the score is the share of
    wrong answers.

    A row starts with ``k1 v1 k2 v2 ...``; keys are distinct tokens of the vocabulary's lower half (0 excluded),
    values distinct tokens of its upper half. Each key stands once more at ``2 pairs + 2 gap``, gaps distinct and
    drawn with probability proportional to ``alpha g^(alpha - 1)``, g = 1, 2, ... (most queries come soon). The label
    at a query is its value; all other positions carry none and hold noise tokens that are no key of the row.

    Difference from the released generator: its noise comes from an unseeded generator and may repeat a key; ours is
    seeded and may not.

    Args:
        vocab_size: even.
        length: tokens of a row, even.
        pairs: key-value pairs; 4 pairs fit into ``length``.
        alpha: exponent of the gaps' power law, at most 10.
        extrapolate: also evaluate at 2 and 4 times the length, with as many pairs, whose queries may then come later.

    Raises:
        GateworkError: for sizes that do not fit.
    """

    name = "recall"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 1_000_000,
        "tune_tokens": 400_000,
        "batch_size": 32,
        "learning_rates": (1e-3, 1e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 2, "heads": 2},
    }

    def __init__(
        self, vocab_size: int = 128, length: int = 64, pairs: int = 8, alpha: float = 0.01, extrapolate: bool = False
    ) -> None:
        if vocab_size % 2 or length % 2:
            raise GateworkError(f"vocab_size {vocab_size} and length {length} must be even")
        if pairs < 1:
            raise GateworkError(f"pairs must be at least 1, got {pairs}")
        if 4 * pairs > length:
            raise GateworkError(f"{pairs} pairs need a length of at least {4 * pairs}, got {length}")
        if pairs > vocab_size // 2 - 1:
            raise GateworkError(f"{pairs} pairs need a vocabulary of at least {2 * pairs + 2}, got {vocab_size}")
        if not 0 < alpha <= 10:  # Far beyond, the powers overflow.
            raise GateworkError(f"alpha must be positive and at most 10, got {alpha}")
        self.pairs, self.alpha = pairs, alpha
        super().__init__(vocab_size, length, extrapolate)

    def rows(self, count: int, length: int, generator: torch.Generator) -> Batch:
        """Rows, and labels that are -100 where there is nothing to answer."""
        half, pairs = self.vocab_size // 2, self.pairs
        # A random order of the tokens 1 .. half-1 per row: the first are the keys, the rest may be noise.
        lower = torch.rand(count, half - 1, generator=generator).argsort(1) + 1
        keys, values = lower[:, :pairs], torch.rand(count, half, generator=generator).argsort(1)[:, :pairs] + half
        noise_tokens = torch.cat([lower[:, pairs:], torch.zeros(count, 1).long(), torch.arange(half).expand(count, -1) + half], 1)
        draw = torch.randint(noise_tokens.shape[1], (count, length), generator=generator)
        x = noise_tokens.gather(1, draw)
        x[:, 0 : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2] = keys, values
        places = (length - 2 * pairs) // 2
        weights = self.alpha * torch.arange(1, places + 1, dtype=torch.float64) ** (self.alpha - 1)
        gaps = torch.multinomial(weights.expand(count, -1), pairs, generator=generator)
        queries = 2 * pairs + 2 * gaps
        y = torch.full_like(x, IGNORE)
        return x.scatter(1, queries, keys), y.scatter(1, queries, values)
