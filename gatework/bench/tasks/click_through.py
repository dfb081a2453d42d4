"""``click_through``: made-up clicks on made-up categorical fields, half of which mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import ClickTask
from gatework.core.errors import GateworkError


class ClickThrough(ClickTask):
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
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 400_000,
        "tune_tokens": 200_000,
        "batch_size": 128,
        "learning_rates": (5e-4, 2e-2),
        "baseline": "",
        "model": {"d_model": 8, "deep": 1},
        "match": "none",
    }

    RANK = 4

    def __init__(
        self, fields: int = 12, values: int = 100, examples: int = 20_000, effect: float = 2.0, data_seed: int = 0
    ) -> None:
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
        super().__init__(dict(zip(sizes, pieces, strict=True)))

    def model_arguments(self) -> dict[str, Any]:
        """Rows of the table and fields."""
        return {"features": self.fields * self.values, "fields": self.fields}
