"""What every registered part that is a module keeps, whatever its slot."""

from __future__ import annotations

import pytest

from gatework.core import entries, papers

from . import checks
from .parts import MASKLESS, MODULES, Case, variants

EVERY = pytest.mark.parametrize("case", variants(*MODULES))


@EVERY
def test_shapes_and_dtypes(case):
    checks.check_shapes_and_dtypes(case)


@EVERY
def test_gradients_are_finite_and_reach_every_parameter(case):
    checks.check_gradients(case)


@EVERY
def test_state_dict_holds_all(case):
    checks.check_state_dict(case)


@EVERY
def test_deepcopy_and_pickle_in_the_middle_of_training(case):
    checks.check_copies(case)


@EVERY
def test_bfloat16_is_finite_under_autocast_and_without(case):
    checks.check_bfloat16(case)


@EVERY
def test_same_seed_same_numbers(case):
    checks.check_determinism(case)


@EVERY
def test_gradients_of_stride_0(case):
    checks.check_expanded_gradients(case)


@EVERY
def test_activation_checkpointing(case):
    checks.check_checkpointing(case)


@EVERY
def test_side_outputs(case):
    checks.check_side_outputs(case)


# Where rows compete for places, the parts' own tests show that padding takes none.
@pytest.mark.parametrize("case", variants(*(slot for slot in MODULES if slot not in MASKLESS), capable="batch_invariant"))
def test_padding_is_in_no_output_and_no_statistic(case):
    checks.check_mask(case)


@pytest.mark.parametrize("case", variants(*MODULES, capable="batch_invariant"))
def test_rows_do_not_depend_on_each_other(case):
    checks.check_batch_invariance(case)


@EVERY
def test_repr_tells_parts_apart(case):
    checks.check_repr(case)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_docstring_is_complete(entry):
    checks.check_docstring(Case(entry.cls), papers.paper(entry.paper).source if entry.paper else None)


@pytest.mark.parametrize("case", variants("gate"))
def test_routings_are_valid(case):
    checks.check_routing(case)
