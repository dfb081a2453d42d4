"""``click_through``: made-up clicks on made-up categorical fields, half of which mean nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, Predict, Split, Task, digest
from gatework.core.errors import GateworkError


class ClickThrough(Task):
    """Binary labels from first- and second-order effects of categorical values; the score is 1 - AUC.

    Every example has one value per field; values are drawn with probabilities proportional to 1 / rank, so that most are rare.
    Half of the fields, and in the other half half of the values, have no effect (``informative`` says which have: all others
    are noise). An informative feature f has a weight w_f ~ N(0, 1) and a vector u_f ~ N(0, I) of length 4:

        logit = a sum_f w_f + b sum_(f < g) <u_f, u_g> + const,      label ~ Bernoulli(sigmoid(logit))

    with a and b such that both sums have a standard deviation of ``effect`` / sqrt(2) over the examples, and a mean logit of
    -1. ``x`` (B, fields) names rows of one table: values of field k are k * values .. (k + 1) * values - 1.

    Args:
        fields: even; half are informative.
        values: per field, even.
        examples: for training; a quarter as many each validate and test.
        effect: standard deviation of the logit.
        data_seed: seed of the effects and the examples.

    Raises:
        GateworkError: for sizes that do not fit, or where scikit-learn, which computes the AUC, is not installed.
    """

    name = "click_through"
    backbone = "click_through"
    unit = "example"
    score_name = "auc_error"
    score_unit = "1 - AUC"
    lower_is_better = True

    EVALUATION_BATCH = 1024
    RANK = 4

    def __init__(
        self, fields: int = 12, values: int = 100, examples: int = 20_000, effect: float = 2.0, data_seed: int = 0
    ) -> None:
        try:
            import sklearn.metrics  # noqa: F401
        except ImportError:
            raise GateworkError('click_through needs scikit-learn: pip install "gatework[bench]"') from None
        if fields < 4 or fields % 2 or values < 2 or values % 2:
            raise GateworkError(f"fields must be even and at least 4, values even and at least 2, got {fields} and {values}")
        if examples < 100 or not effect > 0:
            raise GateworkError(f"examples must be at least 100 and effect positive, got {examples} and {effect}")
        self.fields, self.values = fields, values
        generator = torch.Generator().manual_seed(data_seed)
        means_something = torch.zeros(fields, values, dtype=torch.bool)
        for field in torch.randperm(fields, generator=generator)[: fields // 2].tolist():
            means_something[field, torch.randperm(values, generator=generator)[: values // 2]] = True
        #: Which features have an effect, by row of the table.
        self.informative = means_something.flatten()
        weight = torch.randn(fields * values, generator=generator) * self.informative
        vector = torch.randn(fields * values, self.RANK, generator=generator) * self.informative[:, None]
        sizes = {"train": examples, "validation": examples // 4, "test": examples // 4}
        count = sum(sizes.values())
        chances = 1 / torch.arange(1, values + 1, dtype=torch.float64)
        # Each field has an order of its own: which of its values are frequent says nothing of which mean something.
        ranks = torch.multinomial(chances, count * fields, replacement=True, generator=generator).view(count, fields)
        order = torch.stack([torch.randperm(values, generator=generator) + k * values for k in range(fields)])
        x = order.gather(1, ranks.T).T.contiguous()
        first, v = weight[x].sum(1), vector[x]
        second = (v.sum(1).square() - v.square().sum(1)).sum(1) / 2
        share = effect / 2**0.5
        logit = share * (first - first.mean()) / first.std() + share * (second - second.mean()) / second.std() - 1
        y = torch.bernoulli(logit.sigmoid(), generator=generator)
        pieces = zip(x.split(list(sizes.values())), y.split(list(sizes.values())), strict=True)
        self.splits = dict(zip(sizes, pieces, strict=True))
        self.data_hash = digest(*(tensor for split in self.splits.values() for tensor in split))

    def model_arguments(self) -> dict[str, Any]:
        """Rows of the table and fields."""
        return {"features": self.fields * self.values, "fields": self.fields}

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
        """``loss`` (cross-entropy in nats), ``auc`` and ``auc_error`` (1 - AUC)."""
        from sklearn.metrics import roc_auc_score

        x, y = self.splits[split]
        pieces = x.split(self.EVALUATION_BATCH)[:max_batches]
        output = torch.cat([predict(piece).float() for piece in pieces])
        y = y[: len(output)]
        auc = float(roc_auc_score(y.numpy(), output.numpy())) if output.isfinite().all() else float("nan")
        return {"loss": float(self.loss(output, y)), "auc": auc, "auc_error": 1 - auc}
