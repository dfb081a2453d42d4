"""gatework: gated, adaptive and parameter-efficient network parts, and a bench that tells which of them pay.

Parts live in their families (``from gatework.feedforward import VersatileFFN``), models in :mod:`gatework.models`, the comparison
in :mod:`gatework.bench`. Importing the package imports nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "build": "gatework.core.registry",
    "profile": "gatework.core.cost",
    "register": "gatework.core.registry",
    "GateworkError": "gatework.core.errors",
    "PartError": "gatework.core.errors",
}

__all__ = ["GateworkError", "PartError", "build", "profile", "register"]

if TYPE_CHECKING:
    from gatework.core.cost import profile
    from gatework.core.errors import GateworkError, PartError
    from gatework.core.registry import build, register


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gatework' has no attribute {name!r}")
