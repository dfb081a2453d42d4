"""Every gate that takes balance terms keeps its contract with every term that fits it."""

from __future__ import annotations

import pytest

from gatework.core import entries
from gatework.core.registry import parameters

from . import checks
from .parts import Case


def with_every_term() -> list:
    """A case for each gate."""
    cases = []
    for gate in (entry for entry in entries("gate") if "balance" in parameters(entry.cls)):
        offered = set(getattr(gate.cls, "offers", ()))
        terms = [term.name for term in entries("balance") if offered.issuperset(term.cls.conditions)]
        cases.append(pytest.param(Case(gate.cls, {"balance": terms}), id=gate.name))
    return cases


EVERY = pytest.mark.parametrize("case", with_every_term())
CHECKS = (
    checks.check_gradients, checks.check_state_dict, checks.check_copies, checks.check_checkpointing, checks.check_side_outputs,
    checks.check_mask, checks.check_routing, checks.check_repr,
)  # fmt: skip


@EVERY
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_with_every_term(case, check):
    check(case)


@pytest.mark.compile
@pytest.mark.parametrize("case", [case for case in with_every_term() if case.id == "noisy_topk"])
def test_compiled(case):
    checks.check_compilation(case)
