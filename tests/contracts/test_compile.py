"""Every part that says it compiles does, as one graph, once."""

from __future__ import annotations

import pytest

from gatework.core import No, capability, entries

from . import checks
from .parts import MODULES, cases


@pytest.mark.compile
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", cases(*MODULES, capable="compiles"))
def test_compiled_equals_eager_and_compiles_once(case, backend):
    """The graph is the part's affair, and is tested always; inductor makes code of it in the slow tests."""
    checks.check_compilation(case, backend)


@pytest.mark.parametrize("entry", [entry for slot in MODULES for entry in entries(slot)], ids=lambda entry: entry.name)
def test_a_part_that_does_not_compile_says_why(entry):
    answer = capability(entry.cls, "compiles")
    assert answer is True or (isinstance(answer, No) and answer.reason)
