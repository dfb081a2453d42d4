"""Part expressions: ``moe(experts=8, gate=topk(k=2))``, parsed with ``ast``, never evaluated, printed back
canonically."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gatework.core.errors import PartError

MAX_LENGTH = 4000
MAX_DEPTH = 20
#: Whole numbers beyond this fit no tensor.
MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Spec:
    """A part by name with its keyword arguments, not built yet; ``str`` prints it as an expression that parses back
    to an equal one."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    #: Arguments given by position; :func:`gatework.core.registry.check` gives them their names.
    positional: tuple[Any, ...] = ()

    def __str__(self) -> str:
        shown = [show(value) for value in self.positional]
        shown += [f"{name}={show(value)}" for name, value in self.args.items()]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def __hash__(self) -> int:
        # Equal specs may differ in the order of their arguments, and in 1 against 1.0.
        return hash((self.name, frozenset(self.args), len(self.positional)))


def show(value: Any) -> str:
    """An argument's value as an expression has it."""
    if isinstance(value, Spec):
        return str(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(map(show, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def parse(text: str) -> Spec:
    """Read one part expression.

    Only calls, names and literals (finite numbers, strings, booleans, None, lists and tuples of those) are understood.

    Raises:
        PartError: for anything else, with the expression and the place.
    """
    spec: Spec = _printable(_spec(_tree(text), text), text)
    return spec


def parse_pattern(text: str) -> list[Spec]:
    """Read a comma-separated pattern of expressions, ``"gla, gla, attention(heads=4)"``; a single expression is a
    pattern of one."""
    return [parse(piece) for piece in _split(text)]


def parse_settings(text: str) -> dict[str, str]:
    """Read the settings of a variant, ``"mixer=gla,gla,attention, feedforward=moe(experts=8)"``, as texts by name.

    A piece without ``name=`` continues the pattern before it.
    """
    settings: dict[str, str] = {}
    name = None
    for piece in _split(text):
        head, equals, value = piece.partition("=")
        if equals and head.strip().isidentifier():
            name = head.strip()
            if name in settings:
                raise PartError(f"{name!r} is given twice in {_quoted(text)}")
            if not value.strip():
                raise PartError(f"{name!r} has no value in {_quoted(text)}; write {name}=VALUE")
            settings[name] = value.strip()
        elif name is None:
            raise PartError(f"{_quoted(text)} is not a list of settings; write name=value, as in mixer=gla")
        else:
            settings[name] += ", " + piece
    return settings


def parse_value(text: str) -> Any:
    """Read a literal (``3``, ``1e-3``, ``true``, ``'a'``) or a part expression; bare words are expressions."""
    return _printable(_value(_tree(text), text, 0), text)


def _code(text: str) -> Iterator[tuple[int, str]]:
    """The characters outside quotes, with their positions."""
    quote, escaped = "", False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = character == "\\"
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        else:
            yield position, character


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    pieces, depth, start = [], 0, 0
    for position, character in _code(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            pieces.append(text[start:position])
            start = position + 1
    pieces.append(text[start:])
    pieces = [piece.strip() for piece in pieces]
    if not all(pieces):
        raise PartError(f"an empty place between commas in {_quoted(text)}")
    return pieces


def _tree(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise PartError(f"a part expression has at most {MAX_LENGTH} characters, this one has {len(text)}")
    depth = deepest = 0
    for _, character in _code(text):
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise PartError(f"a part expression nests at most {MAX_DEPTH} deep, this one {deepest}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        where = f" at character {error.offset}" if error.offset else ""
        reason = error.msg.partition(". ")[0]  # What follows guesses at a Python statement.
    except ValueError as error:  # A null byte, a lone surrogate.
        where, reason = "", str(error)
    except (RecursionError, MemoryError):
        where, reason = "", "it nests too deep"
    raise PartError(f"{_quoted(text)} is not a part expression: {reason}{where}; write name(argument=value, ...)") from None


def _printable(value: Any, text: str) -> Any:
    """``value``, unless it prints longer than what can be read back."""
    length = len(show(value))
    if length > MAX_LENGTH:
        raise PartError(f"a part expression has at most {MAX_LENGTH} characters, {_quoted(text)} has {length} as it is printed")
    return value


def _spec(node: ast.expr, text: str, depth: int = 0) -> Spec:
    if isinstance(node, ast.Name) and node.id not in ("true", "false"):
        return Spec(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id in ("true", "false"):
        raise PartError(f"{_source(node, text)} in {_quoted(text)} is not a part; write name or name(argument=value, ...)")
    args: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PartError(f"'**' in {_quoted(text)} is not understood; write each argument as name=value")
        if keyword.arg in args:
            raise PartError(f"argument {keyword.arg!r} is given twice in {_quoted(text)}")
        args[keyword.arg] = _value(keyword.value, text, depth + 1)
    return Spec(node.func.id, args, tuple(_value(arg, text, depth + 1) for arg in node.args))


def _value(node: ast.expr, text: str, depth: int) -> Any:
    if depth > 4 * MAX_DEPTH:
        raise PartError(f"{_quoted(text)} nests too deep")
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
        huge = node.value > MAX_INTEGER if isinstance(node.value, int) else node.value == math.inf
        if huge:
            raise PartError(f"the number {_source(node, text)} in {_quoted(text)} is too large")
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text, depth + 1)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.List | ast.Tuple):
        values = [_value(item, text, depth + 1) for item in node.elts]
        return values if isinstance(node, ast.List) else tuple(values)
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    if isinstance(node, ast.Name | ast.Call):
        return _spec(node, text, depth)
    raise PartError(
        f"{_source(node, text)} in {_quoted(text)} is neither a number, a string, a list nor a part; nothing is evaluated"
    )


def _source(node: ast.expr, text: str) -> str:
    return _quoted(ast.get_source_segment(text.strip(), node) or text)


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:117] + "...")
