"""What every sequence mixer and every depth policy keeps, in each of its forms."""

from __future__ import annotations

import pytest

from . import checks
from .parts import policies, variants


@pytest.mark.parametrize("case", variants("mixer", capable="causal"))
def test_causality(case):
    checks.check_causality(case)


@pytest.mark.parametrize("case", variants("mixer"))
def test_wrong_calls_meet_one_sentence(case):
    checks.check_wrong_calls(case)


@pytest.mark.parametrize("case", variants("mixer", capable="decodes") + policies("decodes"))
def test_whole_pieces_and_token_by_token(case):
    checks.check_decoding(case)


@pytest.mark.parametrize("case", variants("mixer", capable="decodes") + policies("decodes"))
def test_states_are_reordered(case):
    checks.check_reordering(case)


@pytest.mark.parametrize("case", variants("mixer", capable="decodes") + policies("decodes"))
def test_state_bytes_are_what_the_state_holds(case):
    checks.check_state_bytes(case)


@pytest.mark.parametrize("case", variants("mixer", capable="decodes") + policies("decodes"))
def test_padding_on_either_side(case):
    checks.check_padding(case)


@pytest.mark.parametrize("case", variants("mixer", capable="packs") + policies("packs"))
def test_packed_equals_separate(case):
    checks.check_packing(case)


@pytest.mark.parametrize("case", variants("mixer", capable="keeps"))
def test_kept_tokens(case):
    checks.check_keep(case)


@pytest.mark.parametrize("case", policies())
def test_policies_are_causal_and_run_rows_apart(case):
    checks.check_causality(case)
    checks.check_batch_invariance(case)
