"""``ranking``: made-up users whose history says what decides their clicks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, Predict, Split, Task, digest
from gatework.core.errors import GateworkError


class Ranking(Task):
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
    unit = "example"
    score_name = "auc_error"
    score_unit = "1 - AUC"
    lower_is_better = True

    EVALUATION_BATCH = 1024
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
        try:
            import sklearn.metrics  # noqa: F401
        except ImportError:
            raise GateworkError('ranking needs scikit-learn: pip install "gatework[bench]"') from None
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
        self.splits = dict(zip(sizes, pieces, strict=True))
        self.data_hash = digest(*(tensor for split in self.splits.values() for tensor in split))

    def model_arguments(self) -> dict[str, Any]:
        """Numbers of items and queries, and the longest history."""
        return {"items": self.items, "queries": self.queries, "history": self.history}

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Passes over the training set, each in an order of its own; an incomplete last batch is left out."""
        x, y = self.splits["train"]
        size = min(batch_size, len(x))
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(len(x), generator=generator).split(size):
                if len(chosen) == size:
                    yield x[chosen], y[chosen]

    def units_per_batch(self, batch_size: int) -> int:
        """Examples."""
        return min(batch_size, len(self.splits["train"][0]))

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean binary cross-entropy of logits."""
        return torch.nn.functional.binary_cross_entropy_with_logits(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (cross-entropy in nats), ``auc`` and ``auc_error`` (1 - AUC) over all, and the AUC by length of the history:
        ``auc_empty``, ``auc_short`` (up to a quarter of the longest), ``auc_long`` (the rest); NaN where all labels are equal."""
        x, y = self.splits[split]
        output = torch.cat([predict(piece).float() for piece in x.split(self.EVALUATION_BATCH)[:max_batches]])
        x, y = x[: len(output)], y[: len(output)]
        length = (x[:, 2:] != 0).sum(1)
        short = max(1, self.history // 4)
        groups = {"empty": length == 0, "short": (length > 0) & (length <= short), "long": length > short}
        by_length = {f"auc_{name}": _auc(output[rows], y[rows]) for name, rows in groups.items()}
        auc = _auc(output, y)
        return {"loss": float(self.loss(output, y)), "auc": auc, "auc_error": 1 - auc} | by_length


def _auc(output: Tensor, y: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    if not output.isfinite().all() or not 0 < float(y.sum()) < len(y):
        return float("nan")
    return float(roc_auc_score(y.numpy(), output.numpy()))
