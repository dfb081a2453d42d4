"""``selective_copy``: tokens among noise are repeated in their order (Gu and Dao, Mamba, 2023, arXiv 2312.00752, section 4.1.1; the
fixed places are the copying task of Arjovsky et al., Unitary Evolution RNNs, 2016, arXiv 1511.06464).

The sizes of the paper are ``vocab_size=16, copied=16, length=4112``. Difference from the released generator: ours is seeded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import IGNORE, Batch, SequenceTask
from gatework.core.errors import GateworkError


class SelectiveCopy(SequenceTask):
    """Tokens stand among noise, then markers ask for them in their order; the score is the share of wrong answers.

    The first ``length - copied`` places hold ``copied`` data tokens, uniform of 1 .. vocab_size - 2, at random places; everywhere
    else stands the noise token 0. The last ``copied`` places hold the marker ``vocab_size - 1``, and the label at the j-th of
    them is the j-th data token. No other place carries a label.

    A linear recurrence whose transition does not depend on the input can copy from fixed places, by its delays, but not from
    random ones: it cannot leave the noise out.

    Args:
        vocab_size: token ids, the noise and the marker included.
        length: tokens of a row.
        copied: data tokens of a row.
        fixed_places: the data tokens stand at the first places (plain copying), all noise behind them.
        extrapolate: also evaluate at 2 and 4 times the length, with as many data tokens among more noise.

    Raises:
        GateworkError: for sizes that do not fit.
    """

    name = "selective_copy"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 1_000_000,
        "tune_tokens": 400_000,
        "batch_size": 32,
        "learning_rates": (1e-3, 1e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 2, "heads": 2, "tie_embeddings": False},
    }

    def __init__(
        self, vocab_size: int = 10, length: int = 72, copied: int = 8, fixed_places: bool = False, extrapolate: bool = False
    ) -> None:
        if vocab_size < 4:
            raise GateworkError(f"vocab_size must be at least 4 (noise, marker and two data tokens), got {vocab_size}")
        if copied < 1:
            raise GateworkError(f"copied must be at least 1, got {copied}")
        if length < 2 * copied:
            raise GateworkError(f"{copied} tokens to copy need a length of at least {2 * copied}, got {length}")
        self.copied, self.fixed_places = copied, fixed_places
        super().__init__(vocab_size, length, extrapolate)

    def rows(self, count: int, length: int, generator: torch.Generator) -> Batch:
        """Rows, and labels that are -100 before the markers."""
        copied, slots = self.copied, length - self.copied
        data = torch.randint(1, self.vocab_size - 1, (count, copied), generator=generator)
        if self.fixed_places:
            places = torch.arange(copied).expand(count, -1)
        else:
            places = torch.rand(count, slots, generator=generator).argsort(1)[:, :copied].sort(1).values
        x = torch.zeros(count, length, dtype=torch.long).scatter(1, places, data)
        x[:, slots:] = self.vocab_size - 1
        y = torch.full_like(x, IGNORE)
        y[:, slots:] = data
        return x, y
