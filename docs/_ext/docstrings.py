"""Docstrings as the house writes them, made into reStructuredText that napoleon and Sphinx read without complaint."""

from __future__ import annotations

import inspect
import re
from typing import Any

#: Headings whose indented content napoleon reads.
SECTIONS = ("Args", "Attributes", "Example", "Examples", "Note", "Raises", "Returns", "Yields")


def readable(lines: list[str]) -> list[str]:
    """Indented equations become literal blocks, hanging indents become plain paragraphs; sections and lists stay as they are."""
    out: list[str] = []
    section = verbatim = False
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        previous = next((kept for kept in reversed(out) if kept.strip()), "")
        blank = not out or not out[-1].strip()
        if not text:
            out.append("")
            continue
        if indent == 0:
            section, verbatim = text.endswith(":") and text[:-1] in SECTIONS, False
        elif section or verbatim:
            pass
        elif blank and not previous.endswith("::"):
            if not re.match(r"\s*([-*]|\d+\.) ", previous) and previous[:1] != " ":
                verbatim = True
                out += [".. code-block:: text", ""]
        elif blank:
            verbatim = True
        elif not re.match(r"([-*]|\d+\.) ", previous) and previous[:1] != " ":
            line = text
        out.append(line if verbatim or text.startswith((">>>", "...")) else _escaped(line))
    return out


def _escaped(line: str) -> str:
    """Bars are absolute values here, not substitutions; those inside code stay."""
    return "``".join(piece if i % 2 else piece.replace("|", "\\|") for i, piece in enumerate(line.split("``")))


def without(docstring: str, *sections: str) -> str:
    """The docstring without its first sentence and without these sections."""
    lines, skipping = [], False
    body = docstring.split("\n\n", 1)
    for line in (body[1] if len(body) > 1 else "").splitlines():
        if line.strip() and not line.startswith(" "):
            skipping = line.strip().removesuffix(":") in sections and line.strip().endswith(":")
        if not skipping:
            lines.append(line)
    return "\n".join(lines).strip("\n")


def items(cls: type, section: str = "Args") -> dict[str, str]:
    """What a section of a class's docstring says about each item, by name; several names may share one entry."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside, first = False, 0
    for line in (inspect.getdoc(cls) or "").splitlines():
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if text and not indent:
            inside, first = text == f"{section}:", 0
        elif inside and text:
            first = first or indent
            head, colon, rest = text.partition(": ")
            if indent == first and colon:
                names = [name.strip().lstrip("*") for name in head.split(",")]
                found |= dict.fromkeys(names, rest)
            else:
                found |= {name: f"{found[name]} {text}" for name in names}
    return found


def document(obj: Any) -> str:
    """An object's own docstring; empty where it has none, or only the one that ``dataclass`` makes up."""
    text = vars(obj).get("__doc__") if isinstance(obj, type) else getattr(obj, "__doc__", None)
    text = text if isinstance(text, str) else ""
    return "" if isinstance(obj, type) and text.startswith(f"{obj.__name__}(") else inspect.cleandoc(text)
