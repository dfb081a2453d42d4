"""Part expressions: ``moe(experts=8, gate=topk(k=2))``, parsed with ``ast``, never evaluated, printed back
canonically."""

from __future__ import annotations

import ast
import warnings
from dataclasses import dataclass, field
from typing import Any

from gatework.core.errors import PartError

MAX_LENGTH = 4000
MAX_DEPTH = 20


@dataclass(frozen=True)
class Spec:
    """A part by name with its keyword arguments, not built yet; ``str`` prints it as an expression that parses back
    to an equal one."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)
    #: Arguments given by position; :func:`gatework.core.registry.check` gives them their names.
    positional: tuple[Any, ...] = ()

    def __str__(self) -> str:
        shown = [_show(value) for value in self.positional]
        shown += [f"{name}={_show(value)}" for name, value in self.args.items()]
        return f"{self.name}({', '.join(shown)})" if shown else self.name

    def __hash__(self) -> int:
        return hash(str(self))


def _show(value: Any) -> str:
    if isinstance(value, Spec):
        return str(value)
    if isinstance(value, list | tuple):
        inside = ", ".join(map(_show, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside},)" if len(value) == 1 else f"({inside})"
    return repr(value)


def parse(text: str) -> Spec:
    """Read one part expression.

    Only calls, names and literals (numbers, strings, booleans, None, lists and tuples of those) are understood.

    Raises:
        PartError: for anything else, with the expression and the place.
    """
    tree = _tree(text)
    return _spec(tree, text)


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
                raise PartError(f"{name!r} is given twice in {text!r}")
            if not value.strip():
                raise PartError(f"{name!r} has no value in {text!r}; write {name}=VALUE")
            settings[name] = value.strip()
        elif name is None:
            raise PartError(f"{text!r} is not a list of settings; write name=value, as in mixer=gla")
        else:
            settings[name] += ", " + piece
    return settings


def parse_value(text: str) -> Any:
    """Read a literal (``3``, ``1e-3``, ``true``, ``'a'``) or a part expression; bare words are expressions."""
    node = _tree(text)
    return _value(node, text, 0)


def _split(text: str) -> list[str]:
    """Split at commas outside brackets and quotes."""
    pieces, depth, quote, start = [], 0, "", 0
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            pieces.append(text[start:position])
            start = position + 1
    pieces.append(text[start:])
    pieces = [piece.strip() for piece in pieces]
    if not all(pieces):
        raise PartError(f"an empty place between commas in {text!r}")
    return pieces


def _tree(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise PartError(f"a part expression has at most {MAX_LENGTH} characters, this one has {len(text)}")
    depth = deepest = 0
    for character in text:
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
        raise PartError(f"{text!r} is not a part expression: {error.msg}{where}; write name(argument=value, ...)") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise PartError(f"{text[:60]!r} is not a part expression: {error}") from None


def _spec(node: ast.expr, text: str, depth: int = 0) -> Spec:
    if isinstance(node, ast.Name):
        return Spec(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise PartError(f"{_source(node, text)!r} in {text!r} is not a part; write name or name(argument=value, ...)")
    args: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise PartError(f"'**' in {text!r} is not understood; write each argument as name=value")
        if keyword.arg in args:
            raise PartError(f"argument {keyword.arg!r} is given twice in {text!r}")
        args[keyword.arg] = _value(keyword.value, text, depth + 1)
    return Spec(node.func.id, args, tuple(_value(arg, text, depth + 1) for arg in node.args))


def _value(node: ast.expr, text: str, depth: int) -> Any:
    if depth > 4 * MAX_DEPTH:
        raise PartError(f"{text[:60]!r} nests too deep")
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool | int | float | str)):
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
        f"{_source(node, text)!r} in {text!r} is neither a number, a string, a list nor a part; nothing is evaluated"
    )


def _source(node: ast.expr, text: str) -> str:
    return (ast.get_source_segment(text.strip(), node) or text)[:60]
