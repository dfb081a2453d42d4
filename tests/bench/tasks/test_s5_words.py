"""The task ``s5_words``."""

from __future__ import annotations

import itertools

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.bench.tasks.s5_words import multiplication
from gatework.core import GateworkError

from .made import take

SIZES = {"s5": 120, "a5": 60, "z60": 60, "z2": 2}


def closure(table, some):
    """The subgroup that some elements generate."""
    found = {0} | set(some)
    while True:
        more = {int(table[a, b]) for a in found for b in found} | found
        if more == found:
            return found
        found = more


def commutators(table):
    inverse = (table == 0).long().argmax(1)
    n = torch.arange(len(table))
    a, b = torch.meshgrid(n, n, indexing="ij")
    return set(table[table[a, b], table[inverse[a], inverse[b]]].flatten().tolist())


@pytest.mark.parametrize("group", SIZES)
def test_the_tables_are_groups(group):
    elements, table = multiplication(group)
    n = torch.arange(SIZES[group])
    assert len(elements) == len(set(elements)) == len(table) == SIZES[group]
    assert elements == sorted(elements)
    assert torch.equal(table[0], n)
    assert torch.equal(table[:, 0], n)  # The identity has the index 0.
    assert torch.equal(table.sort(0).values, n[:, None].expand_as(table))
    assert torch.equal(table.sort(1).values, n.expand_as(table))
    a, b, c = torch.meshgrid(n, n, n, indexing="ij")
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])


@pytest.mark.parametrize("group", ["s5", "a5"])
def test_products_of_permutations_by_hand(group):
    elements, table = multiplication(group)
    for p, q in itertools.product(range(0, len(elements), 7), range(0, len(elements), 11)):
        after = tuple(elements[p][elements[q][i]] for i in range(5))
        assert elements[int(table[p, q])] == after


def test_which_groups_are_solvable():
    """Commutators generate: all of A5 (it is perfect), A5 in S5, the identity alone in an abelian group."""
    derived = {group: closure(multiplication(group)[1], commutators(multiplication(group)[1])) for group in SIZES}
    assert {group: len(found) for group, found in derived.items()} == {"s5": 60, "a5": 60, "z60": 1, "z2": 1}
    assert {multiplication("s5")[0][i] for i in derived["s5"]} == set(multiplication("a5")[0])


@pytest.mark.parametrize("group", SIZES)
def test_two_generators_generate(group):
    made = make_task("s5_words", group=group, generators=True)
    assert len(made.alphabet) == 2
    assert len(closure(made.products, made.alphabet.tolist())) == SIZES[group]
    assert set(take(made, 0, 64, 1)[0][0].unique().tolist()) == set(made.alphabet.tolist())


def test_the_generators_of_s5_are_the_cycle_and_the_transposition():
    elements, _ = multiplication("s5")
    made = make_task("s5_words", generators=True)
    cycle, swap = (elements[i] for i in made.alphabet.tolist())
    assert [cycle[i] for i in range(5)] == [1, 2, 3, 4, 0]
    assert [swap[i] for i in range(5)] == [1, 0, 2, 3, 4]


@pytest.mark.parametrize(("group", "generators"), [(group, generators) for group in SIZES for generators in (False, True)])
def test_a_label_is_the_product_so_far(group, generators):
    made = make_task("s5_words", group=group, generators=generators, length=9)
    elements, _ = multiplication(group)
    assert made.model_arguments() == {"vocab_size": SIZES[group]}
    for x, y in take(made, 1, 8, 2):
        assert x.shape == y.shape == (8, 9)
        for row, labels in zip(x.tolist(), y.tolist(), strict=True):
            if group.startswith("z"):
                assert labels == [sum(row[: t + 1]) % SIZES[group] for t in range(9)]
                continue
            where = list(range(5))  # Where each of five things stands: the next permutation moves all of them.
            for token, label in zip(row, labels, strict=True):
                where = [elements[token][i] for i in where]
                assert tuple(where) == elements[label]


def test_elements_are_uniform():
    x = torch.cat([x for x, _ in take(make_task("s5_words"), 0, 1000, 8)])
    share = x.flatten().bincount(minlength=120).double() / x.numel()
    torch.testing.assert_close(share, torch.full((120,), 1 / 120, dtype=torch.float64), rtol=0, atol=0.0012)


def test_z2_is_parity():
    words, bits = make_task("s5_words", group="z2", length=40, extrapolate=True), make_task("parity", extrapolate=True)
    assert all(torch.equal(a, b) for key in bits.fixed for a, b in zip(words.fixed[key], bits.fixed[key], strict=True))


def test_a_product_that_is_forgotten_after_the_training_length_shows_in_the_last_place_first():
    made = make_task("s5_words", length=8, extrapolate=True)

    def answer(x):
        y, product = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.long)
        for t in range(x.shape[1]):
            product = made.products[x[:, t], product] if t < 8 else torch.zeros_like(product)
            y[:, t] = product
        return torch.nn.functional.one_hot(y, 120).float()

    said = made.evaluate(answer, "test")
    assert (said["error"], said["last_error"], said["row_error"]) == (0, 0, 0)
    assert said["error_at_32"] == pytest.approx(24 / 32 * 119 / 120, abs=0.01)
    assert said["last_error_at_32"] == pytest.approx(119 / 120, abs=0.02)
    assert said["row_error_at_32"] == 1


def test_wrong_arguments_are_refused():
    with pytest.raises(GateworkError, match="length must be at least 1, got 0"):
        make_task("s5_words", length=0)
    with pytest.raises(GateworkError, match="group must be one of 's5', 'a5', 'z60', 'z2', got 's4'"):
        make_task("s5_words", group="s4")
