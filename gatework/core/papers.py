"""The catalogue of papers, ``papers.toml``: what each one is, which parts implement it, what it claims."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, fields
from importlib import resources

from gatework.core.errors import PartError
from gatework.core.registry import suggest


@dataclass(frozen=True)
class Paper:
    """One entry of the catalogue.

    Attributes:
        name: its id, the key of the entry.
        title: as published.
        year: of the first publication.
        source: where it is, an ``https`` address.
        parts: registry ids of the parts that implement it.
        claim: one sentence that an experiment at this library's scale can confirm or refute.
    """

    name: str
    title: str
    year: int
    source: str
    parts: tuple[str, ...]
    claim: str


def read(text: str) -> dict[str, Paper]:
    """Read a catalogue from TOML text; papers by id, in the order of the text.

    Raises:
        ValueError: for text that is not TOML, and for an entry whose fields are not those of :class:`Paper`.
    """
    wanted = {field.name for field in fields(Paper)} - {"name"}
    papers = {}
    for name, entry in tomllib.loads(text).items():
        if not isinstance(entry, dict) or set(entry) != wanted:
            given = sorted(entry) if isinstance(entry, dict) else entry
            raise ValueError(f"the entry {name!r} of papers.toml needs {', '.join(sorted(wanted))}; it has {given}")
        papers[name] = Paper(name=name, **entry | {"parts": tuple(entry["parts"])})
    return papers


@functools.cache
def papers() -> dict[str, Paper]:
    """All papers of the library by id."""
    return read(resources.files("gatework").joinpath("papers.toml").read_text(encoding="utf-8"))


def paper(name: str) -> Paper:
    """The paper called ``name``.

    Raises:
        PartError: saying what was meant and what exists.
    """
    known = papers()
    if name not in known:
        raise PartError(f"no paper {name!r}; {suggest(name, known)}")
    return known[name]


__all__ = ["Paper", "paper", "papers", "read"]
