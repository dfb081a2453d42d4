"""``ranking``: made-up users whose history says what decides their clicks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import ClickTask, Predict, Split, auc
from gatework.core.errors import GateworkError


class Ranking(ClickTask):
    """Clicks of users of hidden types on pairs of a query and an item; the score is 1 - AUC.

    Items and queries have hidden vectors a_i, c_q ~ N(0, I) of length 4. Each user type t has a matrix W_t and a vector u_t of such
    numbers: the matrix decides which items suit which queries, the vector which items come into the history.

        history items ~ softmax_i(1.5 u_t . a_i)    logit = effect c_q . W_t a_i / its standard deviation
        label ~ Bernoulli(sigmoid(logit))

    So an empty history leaves the type open, and every item of a longer one says a little about it. Lengths of histories are
    uniform over 0 .. ``history``. A row of ``x`` (B, 2 + history) holds the query, the item (from 1) and the items of the history,
    filled up with 0.

    Args:
        items: number of items.
        queries: number of queries.
        types: number of user types.
        history: most items of a history, at least 2.
        examples: for training; a quarter as many each validate and test.
        effect: standard deviation of the logit.
        data_seed: seed of the hidden numbers and the examples.

    Raises:
        GateworkError: for sizes that do not fit, or where scikit-learn, which computes the AUC, is not installed.
    """

    name = "ranking"
    backbone = "ranker"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 400_000,
        "tune_tokens": 200_000,
        "batch_size": 128,
        "learning_rates": (5e-4, 2e-2),
        "baseline": "",
        "model": {"d_model": 16, "experts": 8},
        "match": "none",
    }

    WIDTH = 4

    def __init__(
        self,
        items: int = 200,
        queries: int = 20,
        types: int = 4,
        history: int = 8,
        examples: int = 60_000,
        effect: float = 3.0,
        data_seed: int = 0,
    ) -> None:
        if min(items, queries, types) < 2 or history < 2:
            raise GateworkError(f"items, queries, types and history must be at least 2, got {items}, {queries}, {types}, {history}")
        if examples < 100 or not effect > 0:
            raise GateworkError(f"examples must be at least 100 and effect positive, got {examples} and {effect}")
        self.items, self.queries, self.history = items, queries, history
        generator = torch.Generator().manual_seed(data_seed)
        a, c, u = (torch.randn(count, self.WIDTH, generator=generator) for count in (items, queries, types))
        w = torch.randn(types, self.WIDTH, self.WIDTH, generator=generator)
        suits = torch.einsum("qd,tde,ie->tqi", c, w, a)
        sizes = {"train": examples, "validation": examples // 4, "test": examples // 4}
        count = sum(sizes.values())
        kind, query, item = (torch.randint(most, (count,), generator=generator) for most in (types, queries, items))
        #: The hidden type of every example, in the order of the splits.
        self.types = kind
        past = torch.multinomial((1.5 * u @ a.T).softmax(1)[kind], history, replacement=True, generator=generator) + 1
        length = torch.randint(history + 1, (count, 1), generator=generator)
        past = past * (torch.arange(history) < length)
        #: The logit that each label was drawn from.
        self.logits = effect * suits[kind, query, item] / suits.std()
        y = torch.bernoulli(self.logits.sigmoid(), generator=generator)
        x = torch.cat([query[:, None], item[:, None] + 1, past], 1)
        pieces = zip(x.split(list(sizes.values())), y.split(list(sizes.values())), strict=True)
        super().__init__(dict(zip(sizes, pieces, strict=True)))

    def model_arguments(self) -> dict[str, Any]:
        """Numbers of items and queries, and the longest history."""
        return {"items": self.items, "queries": self.queries, "history": self.history}

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``auc`` and ``auc_error`` (1 - AUC) over all, and the AUC by length of the history:
        ``auc_empty``, ``auc_short`` (up to a quarter of the longest), ``auc_long`` (the rest); NaN where all labels are equal."""
        output, x, y = self.outputs(predict, split, max_batches)
        length = (x[:, 2:] != 0).sum(1)
        short = max(1, self.history // 4)
        groups = {"empty": length == 0, "short": (length > 0) & (length <= short), "long": length > short}
        found = auc(output, y)
        said = {"loss": float(self.loss(output, y)), "auc": found, "auc_error": 1 - found}
        return said | {f"auc_{name}": auc(output[rows], y[rows]) for name, rows in groups.items()}
