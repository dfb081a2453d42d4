"""``s5_words``: the word problem of a finite group (Merrill, Petty and Sabharwal, The Illusion of State in State-Space Models,
2024, arXiv 2404.08819, section 4). That of S5 is complete for NC1 (Barrington 1989), those of abelian groups are in TC0.

Differences from the released data: rows are drawn fresh, elements have their lexicographic index, and a new element acts
after the product so far, as a permutation that is applied next.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, SequenceTask
from gatework.core.errors import GateworkError

#: Elements of each group that generate it: for the permutations the cycle (0 1 2 3 4) with (0 1) or (0 1 2), else stay and step.
GENERATORS = {
    "s5": ((1, 2, 3, 4, 0), (1, 0, 2, 3, 4)), "a5": ((1, 2, 3, 4, 0), (1, 2, 0, 3, 4)), "z60": (0, 1), "z2": (0, 1),
}  # fmt: skip


class S5Words(SequenceTask):
    """Elements of a group are shown, the model says their product so far; the score is the share of wrong products.

    The label of place t is the index of ``p_t o ... o p_0``, with ``(p o q)(i) = p[q[i]]``; every place carries one. Elements
    have the lexicographic index of their permutation, the identity 0; inputs and labels share the vocabulary of all elements.
    ``accuracy`` is over all prefixes, ``last_error`` over the products of whole rows, ``row_error`` over rows without a mistake.

    ``s5`` (120 elements) and ``a5`` (60) are not solvable: a model of fixed depth whose state is moved by commuting transitions
    cannot track them at every length. The controls ``z60`` (addition modulo 60, as many elements as ``a5``) and ``z2`` (parity)
    are abelian.

    Args:
        group: ``s5``, ``a5``, ``z60`` or ``z2``.
        generators: inputs are two generators of the group instead of all its elements: the cycle (0 1 2 3 4) and the
            transposition (0 1), in ``a5`` the three-cycle (0 1 2); in the cyclic groups 0 and 1.
        length: elements of a row.
        extrapolate: also evaluate at 2 and 4 times the length.

    Raises:
        GateworkError: for a length below 1.
    """

    name = "s5_words"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 1_000_000,
        "tune_tokens": 400_000,
        "batch_size": 64,
        "learning_rates": (1e-3, 1e-2),
        "baseline": "mixer=attention, feedforward=glu",
        "model": {"d_model": 64, "layers": 2, "heads": 2, "tie_embeddings": False},
    }

    def __init__(
        self,
        group: Literal["s5", "a5", "z60", "z2"] = "s5",
        generators: bool = False,
        length: int = 16,
        extrapolate: bool = False,
    ) -> None:
        if length < 1:
            raise GateworkError(f"length must be at least 1, got {length}")
        elements, self.products = multiplication(group)
        chosen = [elements.index(g) for g in GENERATORS[group]] if generators else list(range(len(elements)))
        self.alphabet = torch.tensor(chosen)
        super().__init__(len(elements), length, extrapolate)

    def rows(self, count: int, length: int, generator: torch.Generator) -> Batch:
        """Uniform elements of the alphabet, and the products of all prefixes."""
        x = self.alphabet[torch.randint(len(self.alphabet), (count, length), generator=generator)]
        product, products = torch.zeros(count, dtype=torch.long), []
        for t in range(length):
            product = self.products[x[:, t], product]
            products.append(product)
        return x, torch.stack(products, 1)


def multiplication(group: str) -> tuple[list[Any], Tensor]:
    """The elements of a group in their order (permutations as tuples, of a cyclic group numbers), and the index of ``p o q`` at
    [index of p, index of q]."""
    if group.startswith("z"):
        numbers = torch.arange(int(group[1:]))
        return numbers.tolist(), (numbers[:, None] + numbers) % len(numbers)
    elements = [p for p in itertools.permutations(range(5)) if group == "s5" or _even(p)]
    permutations, digits = torch.tensor(elements), 5 ** torch.arange(4, -1, -1)
    # Read as numbers of base 5 the permutations rise with their lexicographic index.
    return elements, torch.searchsorted((permutations * digits).sum(-1), (permutations[:, permutations] * digits).sum(-1))


def _even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0
