"""What a user may write in a study, read and checked one value at a time: TOML, variants, names, numbers."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatework.core.errors import GateworkError
from gatework.core.expression import parse_settings, parse_value
from gatework.core.registry import suggest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a study file; relative paths in it are relative to the file.

    Raises:
        GateworkError: no such file, malformed TOML or an unknown key, with the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GateworkError(f"there is no study file {str(path)!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GateworkError(f"the study file {str(path)!r} cannot be read: {_reason(error)}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise GateworkError(f"{path} is not valid TOML: {error}") from None
    known = {
        "name",
        "task",
        "data",
        "baseline",
        "variants",
        "match",
        "tokens",
        "tune_tokens",
        "seeds",
        "tune",
        "learning_rates",
        "batch_size",
        "model",
        "evaluations",
        "imports",
    }
    for key in values:
        if key not in known:
            raise GateworkError(f"{path}, line {_line(text, key)}: unknown key {key!r}; {suggest(key, known)}")
    if isinstance(values.get("data"), str):
        values["data"] = str(path.parent / values["data"])
    values.setdefault("name", path.stem)
    return values


def _line(text: str, key: str) -> int:
    pattern = re.compile(rf"\s*(\[\s*)?[\"']?{re.escape(key)}[\"']?\s*[\].=]")
    return next((number for number, line in enumerate(text.splitlines(), 1) if pattern.match(line)), 1)


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def parse(text: str) -> dict[str, str]:
    """Settings by name; none for an empty text."""
    return parse_settings(text) if text.strip() else {}


def settings_text(where: str, value: Any) -> str:
    """Settings as one canonical text, from a text or a table."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{key}={_literal(item)}" for key, item in value.items())
    if not isinstance(value, str):
        raise GateworkError(f"{where} is a text of settings such as 'mixer=gla', not {value!r}")
    return ", ".join(f"{key}={item}" for key, item in parse(value).items())


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(_literal, value))
    return str(value)


def variant_table(value: Any) -> dict[str, str]:
    """Variants by name, from a table or from a list of ``NAME="settings"`` texts."""
    if isinstance(value, list | tuple):
        pairs = {}
        for text in value:
            name, equals, settings = str(text).partition("=")
            if not equals or not settings.strip():
                raise GateworkError(
                    f'a variant is written NAME="key=value, ...", as in wide="feedforward=versatile_ffn", not {text!r}'
                )
            if name.strip() in pairs:
                raise GateworkError(f"the variant {name.strip()!r} is given twice")
            pairs[name.strip()] = settings
        value = pairs
    if not isinstance(value, Mapping):
        raise GateworkError(f"variants is a table of names and settings, not {value!r}")
    for name in value:
        if study_name("variant", name) == "baseline":
            raise GateworkError("a variant cannot be called 'baseline'; give the baseline's settings with --baseline")
    return {name: settings_text(f"variant {name!r}", settings) for name, settings in value.items()}


def model_table(value: Any) -> dict[str, Any]:
    """Settings of the model, from a text or a table; numbers are numbers in both."""
    if not isinstance(value, str):
        return dict(value)
    table: dict[str, Any] = {}
    for key, text in parse(value).items():
        plain = parse_value(text) if "," not in text else text
        table[key] = plain if plain is None or isinstance(plain, int | float) else text
    return table


def study_name(kind: str, value: Any) -> str:
    """A name that is fit for a file."""
    if not isinstance(value, str) or not _NAME.fullmatch(value) or len(value) > 80:
        raise GateworkError(f"the {kind} name {value!r} may hold letters, digits, '_', '-' and '.' only, at most 80 of them")
    return value


def count(name: str, value: Any, least: int = 1) -> int:
    """A whole number of at least ``least``; 2e6 is one."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number) or number != int(number) or number < least:
        raise GateworkError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(number)


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two positive numbers, low and high."""
    numbers = isinstance(value, list | tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
    if not numbers or len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise GateworkError(f"{name} is a range of two positive numbers, low and high, not {value!r}")
    return float(value[0]), float(value[1])


def choice(name: str, value: Any, options: tuple[Any, ...]) -> Any:
    """One of the options."""
    if value not in options:
        raise GateworkError(f"{name} must be one of {', '.join(map(str, options))}, not {value!r}")
    return value
