"""Tasks, studies, the runner, the store, statistics and the report."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

_LAZY = {
    "Comparison": "gatework.bench.comparison",
    "compare": "gatework.bench.runner",
    "evaluate": "gatework.bench.saved",
    "load": "gatework.bench.comparison",
    "make_task": "gatework.bench.tasks",
    "resume": "gatework.bench.runner",
    "work": "gatework.bench.worker",
}

__all__ = ["Comparison", "compare", "evaluate", "load", "make_task", "resume", "work"]

if TYPE_CHECKING:
    from gatework.bench.comparison import Comparison, load
    from gatework.bench.runner import compare, resume
    from gatework.bench.saved import evaluate
    from gatework.bench.tasks import make_task
    from gatework.bench.worker import work


#: What a study needs from its first trial to its report: asked for before anything is trained.
_NEEDED = ("optuna", "scipy", "rich", "plotly", "jinja2")


def _missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        for package in filter(_missing, _NEEDED):
            raise ModuleNotFoundError(f'gatework.bench needs {package}: pip install "gatework[bench]"', name=package)
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'gatework.bench' has no attribute {name!r}")
