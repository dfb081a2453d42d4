"""``reversal``: facts learnt in one direction and asked for in the other.

Wang and Sun, Is the Reversal Curse a Binding Problem? Uncovering Limitations of Transformers from a Basic Generalization
Failure, 2025, arXiv 2504.01928, section 2; the released generator was read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import IGNORE, Batch, ExampleTask, Predict, Split
from gatework.core.errors import GateworkError


class Reversal(ExampleTask):
    """Facts (s, r, o) and their reversals (o, r^-1, s); of group B one direction is held out. The score is 1 - MRR, among all.

    Each relation pairs the entities of a group at random, each with one other, in a random direction. Of group A both directions of
    all facts are trained on, which is what shows that r^-1 reverses r. Of group B one direction, drawn for each fact, is trained
    on; the others, half each, validate and test. So whatever is asked for can be told from its reversal, which was learnt.

    An entity's name is a first and a last name, tokens of their own; each of them is shared by ``multiplicity`` entities, each pair
    belongs to one. An input row is (subject, relation, object), numbers of entities and relations, of which relation
    r + ``relations`` is the inverse of r; the object is -100 in evaluation. A model, which is given the names, says the
    log-probability of every entity (:class:`gatework.models.EntityModel`).

    An entity's rank among all is 1 and the number of those with a higher log-probability, and half those with an equal one.

    Args:
        group_a, group_b: entities of each group, even.
        relations: number of relations, their inverses not counted.
        multiplicity: entities that share a name, a divisor of the number of all entities.
        seed: of facts and names.

    Raises:
        GateworkError: sizes that do not fit.
    """

    name = "reversal"
    backbone = "entities"
    score_name = "mrr_error"
    score_unit = "1 - MRR"
    EVALUATION_BATCH = 64
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 1_000_000,
        "tune_tokens": 300_000,
        "batch_size": 256,
        "learning_rates": (3e-4, 1e-2),
        "baseline": "level=surface",
        "model": {"d_model": 64, "layers": 2, "heads": 4},
        "match": "none",
    }

    def __init__(
        self, group_a: int = 500, group_b: int = 200, relations: int = 6, multiplicity: int = 10, seed: int = 0
    ) -> None:
        if min(group_a, group_b) < 2 or group_a % 2 or group_b % 2 or relations < 1:
            given = f"{group_a}, {group_b} and {relations}"
            raise GateworkError(f"group_a and group_b must be even and at least 2, relations at least 1, got {given}")
        self.entities, self.relations = group_a + group_b, relations
        distinct = self.entities // max(multiplicity, 1)
        if multiplicity < 1 or self.entities % multiplicity or multiplicity > distinct:
            wanted = f"divides the {self.entities} entities into at least as many names as entities share one"
            raise GateworkError(f"multiplicity {wanted}, got {multiplicity}")
        generator = torch.Generator().manual_seed(seed)
        #: Tokens of every entity's name, (entities, 2).
        self.names = _names(self.entities, distinct, multiplicity, generator)
        known = _facts(torch.arange(group_a), relations, generator)
        some = _facts(torch.arange(group_a, self.entities), relations, generator)
        swap = torch.rand(len(some), 1, generator=generator) < 0.5
        told, held = torch.where(swap, self.reverse(some), some), torch.where(swap, some, self.reverse(some))
        order = torch.randperm(len(held), generator=generator)
        #: The direction of group B's facts that is trained on, the reversal of ``held`` row by row.
        self.told, self.held = told[order], held[order]
        half = max(1, len(held) // 2)
        splits = {"validation": self.held[:half], "test": self.held[half:] if len(held) > 1 else self.held}
        train = torch.cat([known, self.reverse(known), told])
        super().__init__({"train": (train, train[:, 2])} | {name: self._asked(facts) for name, facts in splits.items()})

    def reverse(self, facts: Tensor) -> Tensor:
        """The facts (o, r^-1, s) of facts (s, r, o)."""
        subject, relation, object = facts.unbind(1)
        return torch.stack([object, (relation + self.relations) % (2 * self.relations), subject], 1)

    def _asked(self, facts: Tensor) -> Batch:
        return torch.cat([facts[:, :2], torch.full_like(facts[:, :1], IGNORE)], 1), facts[:, 2]

    def model_arguments(self) -> dict[str, Any]:
        """The names, and the number of relations with their inverses."""
        return {"names": self.names, "relations": 2 * self.relations}

    def loss(self, output: Tensor, y: Tensor) -> Tensor:
        """Mean negative log-probability of the objects."""
        return torch.nn.functional.nll_loss(output.float(), y)

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``loss`` (nats), ``mrr`` (mean of 1 / rank), ``mrr_error``, ``accuracy`` (share of rank 1); ``mrr_told`` of as many facts
        of group B as they were trained on: what was not learnt cannot be reversed."""
        output, _, y = self.outputs(predict, split, max_batches)
        place = ranks(output, y)
        said = {"loss": float(self.loss(output, y)), "mrr": float((1 / place).mean())}
        first = 0 if split == "validation" else len(self.held) - len(self.splits[split][0])
        x, y = self._asked(self.told[first : first + len(output)])
        told = torch.cat([predict(piece).float() for piece in x.split(self.EVALUATION_BATCH)])
        said |= {"mrr_error": 1 - said["mrr"], "mrr_told": float((1 / ranks(told, y)).mean())}
        return said | {"accuracy": float((place == 1).double().mean())}


def ranks(scores: Tensor, y: Tensor) -> Tensor:
    """The rank of entry ``y`` of each row: 1, and how many are larger (or not a number), and half of those that are equal."""
    own = scores.gather(1, y[:, None])
    larger, equal = (~(scores <= own)).sum(1), (scores == own).sum(1) - 1
    return (1 + larger + equal.clamp(min=0) / 2).double()


def _facts(group: Tensor, relations: int, generator: torch.Generator) -> Tensor:
    """For each relation the entities of a group, paired at random: (relations len(group) / 2, 3)."""
    rows = []
    for relation in range(relations):
        pairs = group[torch.randperm(len(group), generator=generator)].view(-1, 2)
        rows.append(torch.stack([pairs[:, 0], torch.full_like(pairs[:, 0], relation), pairs[:, 1]], 1))
    return torch.cat(rows)


def _names(entities: int, distinct: int, multiplicity: int, generator: torch.Generator) -> Tensor:
    """First names 0 .. distinct - 1 and last names from ``distinct`` on, each ``multiplicity`` times, no pair twice."""
    first = torch.arange(entities) // multiplicity
    last = (first + torch.arange(entities) % multiplicity) % distinct
    pairs = list(zip(first.tolist(), last.tolist(), strict=True))
    taken = set(pairs)
    # Two entities at a time exchange their last names, unless one of the new pairs is taken.
    for i, j in torch.randint(entities, (20 * entities, 2), generator=generator).tolist():
        (a, b), (c, d) = pairs[i], pairs[j]
        if (a, d) not in taken and (c, b) not in taken:
            taken -= {(a, b), (c, d)}
            taken |= {(a, d), (c, b)}
            pairs[i], pairs[j] = (a, d), (c, b)
    names = torch.tensor(pairs)[torch.randperm(entities, generator=generator)]
    return names + torch.tensor([0, distinct])
