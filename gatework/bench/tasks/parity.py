"""``parity``: is the number of ones so far odd? The smallest problem of state tracking.

In finite precision a linear recurrence whose transitions have eigenvalues in [0, 1] cannot track it at every length (Grazzi et
al., Unlocking State-Tracking in Linear RNNs Through Negative Eigenvalues, 2024, arXiv 2411.12537).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import IGNORE, Batch, SequenceTask
from gatework.core.errors import GateworkError


class Parity(SequenceTask):
    """Bits are shown, the model says the parity of all so far; the score is the share of wrong answers (chance: 0.5).

    Bits are uniform and independent; the label of place t is ``x_0 xor ... xor x_t``. With ``dense`` every place carries it, so
    that a row is an example of every length up to its own. Without, each row carries one label, that of a length drawn uniformly
    from ``least .. length``; bits behind it are noise, which no causal model sees. In a longer row of an evaluation the length is
    then one of more than half of the row.

    Args:
        length: bits of a row.
        least: the shortest length that is asked for without ``dense``.
        dense: whether every place carries a label.
        extrapolate: also evaluate at 2 and 4 times the length.

    Raises:
        GateworkError: for lengths that do not fit.
    """

    name = "parity"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 1_000_000,
        "tune_tokens": 400_000,
        "batch_size": 32,
        "learning_rates": (1e-3, 1e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 2, "heads": 2, "tie_embeddings": False},
    }

    def __init__(self, length: int = 40, least: int = 3, dense: bool = True, extrapolate: bool = False) -> None:
        if not 1 <= least <= length:
            raise GateworkError(f"least must be between 1 and the length {length}, got {least}")
        self.least, self.dense = least, dense
        super().__init__(2, length, extrapolate)

    def rows(self, count: int, length: int, generator: torch.Generator) -> Batch:
        """Bits and their running parities, all of them or one of each row."""
        x = torch.randint(2, (count, length), generator=generator)
        y = x.cumsum(1) % 2
        if not self.dense:
            first = self.least if length == self.length else length // 2 + 1
            end = torch.randint(first - 1, length, (count, 1), generator=generator)
            y = torch.full_like(y, IGNORE).scatter(1, end, y.gather(1, end))
        return x, y
