"""Every public name has a docstring and stands in the built pages, or the build fails.

Public are the names in a module's ``__all__``; without one, those that it defines and that start with no underscore. The modules
are ``public_modules`` in conf.py; a package's ``.*`` stands for its modules.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from docstrings import document
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.pycode import ModuleAnalyzer


def modules(patterns: Iterable[str]) -> list[ModuleType]:
    """The modules that are meant, in order; ``package.*`` is every public module of a package."""
    names: list[str] = []
    for pattern in patterns:
        if pattern.endswith(".*"):
            package = importlib.import_module(pattern[:-2])
            found = [info.name for info in pkgutil.iter_modules(package.__path__) if not info.name.startswith("_")]
            names += [f"{pattern[:-2]}.{name}" for name in found]
        else:
            names.append(pattern)
    return [importlib.import_module(name) for name in dict.fromkeys(names)]


def names(module: ModuleType) -> list[str]:
    """A module's public names."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [name for name, obj in vars(module).items() if not name.startswith("_") and defined_in(obj) == module.__name__]


def defined_in(obj: Any) -> str | None:
    """The module that defines a class or a function; None for anything else."""
    return obj.__module__ if inspect.isclass(obj) or inspect.isroutine(obj) else None


def comment(module: ModuleType, name: str) -> list[str]:
    """The ``#:`` comment of a constant, in whichever module of the package it is written."""
    value = getattr(module, name)
    package = module.__name__.split(".")[0]
    homes = [m for key, m in list(sys.modules.items()) if key.split(".")[0] == package and vars(m).get(name) is value]
    for home in homes:
        found = ModuleAnalyzer.for_module(home.__name__).find_attr_docs().get(("", name))
        if found:
            return [line for line in found if line.strip()]
    return []


def undocumented(patterns: Iterable[str]) -> Iterator[str]:
    """Public names without a docstring (a constant: without a ``#:`` comment)."""
    for module in modules(patterns):
        for name in names(module):
            obj = getattr(module, name)
            known = document(obj) if isinstance(obj, ModuleType) or defined_in(obj) else comment(module, name)
            if not known:
                yield f"{module.__name__}.{name}"


def absent(patterns: Iterable[str], shown: Iterable[str]) -> list[str]:
    """Public names that no page describes; ``shown`` are the names that some page does."""
    shown = set(shown)
    everything = [(f"{module.__name__}.{name}", getattr(module, name)) for module in modules(patterns) for name in names(module)]
    # What several modules make public stands on one page; a class also counts by where it is defined.
    there = {id(obj) for full, obj in everything if {full, f"{defined_in(obj)}.{getattr(obj, '__qualname__', '')}"} & shown}
    return [full for full, obj in everything if not isinstance(obj, ModuleType) and id(obj) not in there]


def check(app: Sphinx, exception: Exception | None) -> None:
    """Fail a build whose pages or docstrings leave a public name out."""
    if exception:
        return
    patterns = app.config.public_modules
    shown = app.env.domains.python_domain.objects
    problems = [f"{name} has no docstring" for name in undocumented(patterns)]
    problems += [f"{name} is on no page" for name in absent(patterns, shown)]
    if problems:
        raise ExtensionError("public names must be documented: " + "; ".join(problems))


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the check to the end of the build."""
    app.add_config_value("public_modules", [], "env")
    app.connect("build-finished", check)
    return {"version": "1", "parallel_read_safe": True}
