"""What every registered weight part keeps, and that these checks can fail."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from gatework import weights
from gatework.core import No, Weight, capability, entries
from gatework.weights import Packed

from . import checks, weighted
from .parts import Case, cases, variants

EVERY = pytest.mark.parametrize("case", variants("weight"))
EACH = pytest.mark.parametrize("case", cases("weight"))


@EVERY
def test_weights(case):
    weighted.check_weights(case.fresh)


@EVERY
def test_gradients(case):
    weighted.check_gradients(case.fresh)


@EACH
def test_training(case):
    weighted.check_training(case.fresh)


@EACH
def test_determinism(case):
    weighted.check_determinism(case.fresh)


@EVERY
def test_fold(case):
    weighted.check_fold(case.fresh)


@EACH
def test_a_second_part_and_refusal_of_a_second_time(case):
    weighted.check_refolding(case.fresh)


@EACH
def test_pack(case):
    if weighted.has_packed_form(case.fresh):
        weighted.check_pack(case.fresh)


@EVERY
def test_state_dict(case):
    weighted.check_state_dict(case.fresh)


@EACH
def test_copies(case):
    weighted.check_copies(case.fresh)


@EVERY
def test_repr_tells_parts_apart(case):
    checks.check_repr(case)


@pytest.mark.compile
@pytest.mark.parametrize("case", cases("weight", capable="compiles"))
def test_compiled_equals_eager_and_compiles_once(case):
    weighted.check_compilation(case.fresh)


@pytest.mark.parametrize("entry", entries("weight"), ids=lambda entry: entry.name)
def test_a_part_that_does_not_compile_says_why(entry):
    answer = capability(entry.cls, "compiles")
    assert answer is True or (isinstance(answer, No) and answer.reason)


# -- the checks can fail


class Halves(Packed):
    def __init__(self, stored):
        super().__init__()
        self.register_buffer("bits", stored.detach().to(torch.float32).view(torch.int32))

    def forward(self, stored):
        return self.bits.view(torch.float32).to(stored.dtype)

    def rows(self, stored, rows):
        return self(stored)[rows]


class Rounded(Weight):
    """The weight itself as float32 holds it, packed in that."""

    def forward(self, stored):
        return stored + (stored.detach().to(torch.float32).to(stored.dtype) - stored).detach()

    def pack(self, stored):
        return Halves(stored), stored.new_empty(0)


class Constant(Rounded):
    def forward(self, stored):
        return torch.ones_like(stored)


class Shape(Rounded):
    def forward(self, stored):
        return stored.float() if stored.dtype == torch.float64 else stored


class Noisy(Rounded):
    def forward(self, stored):
        return stored * (1 + 0.01 * torch.rand_like(stored)) if stored.dim() == 3 else super().forward(stored)


class Remembers(Rounded):
    """Keeps something that is not in its state."""

    def bind(self, weights, stacked):
        bound = super().bind(weights, stacked)
        for part, weight in bound:
            part.first = float(weight.detach().flatten()[0])
        return bound

    def forward(self, stored):
        return super().forward(stored) + self.first


class Uphill(Rounded):
    """Its gradient points uphill."""

    def forward(self, stored):
        return -stored + (2 * stored).detach()


class PacksOther(Rounded):
    def pack(self, stored):
        return Halves(stored * 1.001), stored.new_empty(0)


class PacksLarge(Rounded):
    def pack(self, stored):
        packed = Halves(stored)
        packed.register_buffer("more", torch.zeros(2 * stored.numel()))
        return packed, stored.new_empty(0)


CHECKS = [
    weighted.check_weights, weighted.check_gradients, weighted.check_training, weighted.check_determinism, weighted.check_fold,
    weighted.check_refolding, weighted.check_pack, weighted.check_state_dict, weighted.check_copies,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_good_part_passes(check):
    check(Rounded)


@pytest.mark.parametrize(
    ("part", "check", "message"),
    [
        (Shape, weighted.check_weights, "float32"),
        (Constant, weighted.check_gradients, "no gradient reaches"),
        (Uphill, weighted.check_training, "took the loss from"),
        (Noisy, weighted.check_determinism, "read twice"),
        (Noisy, weighted.check_fold, "folded"),
        (PacksOther, weighted.check_pack, "packed weights"),
        (PacksLarge, weighted.check_pack, "bytes packed"),
        (Remembers, weighted.check_state_dict, "output after loading"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_part_is_found_out(part, check, message):
    with pytest.raises(AssertionError, match=message):
        check(part)


def test_a_part_without_a_packed_form_says_so_and_changes_nothing():
    class Bare(Weight):
        def forward(self, stored):
            return 2 * stored

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    weights.apply(model, "0", Rounded())
    weights.apply(model, "1", Bare())
    before = repr(model)
    with pytest.raises(ValueError, match=r"^Bare has no packed form; weights.fold makes its weights permanent$"):
        weights.pack(model)
    assert repr(model) == before
    assert not weighted.has_packed_form(partial(Bare))


def test_every_part_of_the_slot_is_covered():
    assert {entry.name for entry in entries("weight")} >= {"ternary", "stable_rps", "roast"}
    assert all(issubclass(entry.cls, Weight) for entry in entries("weight"))
    assert isinstance(cases("weight")[0].values[0], Case)
