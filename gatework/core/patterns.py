"""Names in a model chosen by pattern."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is this dotted name or that of a module around it, read from any dot on.

    ``fnmatch``: ``*``, ``?``, ``[...]``; ``*`` crosses dots.
    """
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(some, pattern) or fnmatchcase(some, f"*.{pattern}") for some in around)


def near(pattern: str, names: Iterable[str]) -> str:
    """What a pattern that matches nothing could have meant: ``there are ...``; the numbers of layers stand as ``*``."""
    every = list(dict.fromkeys(re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name) for name in names))
    close = difflib.get_close_matches(pattern, every, n=4, cutoff=0.0)
    more = f" and {len(every) - len(close)} more" if len(every) > len(close) else ""
    return f"there are {', '.join(close)}{more}"
