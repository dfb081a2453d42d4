"""Small experiments that measure what papers claim, one module per paper, named by its id.

``gatework claims`` lists them, ``gatework claims ID`` runs one. Each verdict is *holds here*, *does not hold here* or *not told
apart*, of each finding by its 95% interval.
"""

from __future__ import annotations

import importlib
import pkgutil

from gatework.claims.base import Claim, Finding, Outcome
from gatework.core.errors import GateworkError
from gatework.core.registry import suggest


def claims() -> dict[str, Claim]:
    """The experiments by their paper's id."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if info.name != "base"]
    return {name: importlib.import_module(f"{__name__}.{name}").CLAIM for name in names}


def claim(paper: str) -> Claim:
    """The experiment of a paper.

    Raises:
        GateworkError: saying what was meant and what exists.
    """
    known = claims()
    if paper not in known:
        raise GateworkError(f"no claim {paper!r} has an experiment; {suggest(paper, known)}")
    return known[paper]


__all__ = ["Claim", "Finding", "Outcome", "claim", "claims"]
