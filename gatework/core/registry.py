"""The registry: parts by name, looked up with did-you-mean errors, checked against their signatures, built.

``@register("golu", paper="golu")`` enters a class; its contract says which slot it fills. Everything else (listing,
contract tests, docs, the command line) is derived from here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from gatework.core.contracts import CAPABILITIES
from gatework.core.errors import PartError
from gatework.core.expression import Spec, parse, parse_pattern, show

# : The packages that hold parts. They are imported by name when a part is looked up, so that ``core`` depends on none
# of them.
PACKAGES = (
    "activations", "gates", "experts", "feedforward", "mixers", "depth", "weights", "optim", "learners",
)

#: Sizes that belong to the model around a part: an expression may repeat them, but not change them.
TIED = ("d_model", "n_experts")


@dataclass(frozen=True)
class Entry:
    """A registered part: its id, class and the id of its paper in ``papers.toml`` (None for a textbook part)."""

    name: str
    cls: type
    paper: str | None

    @property
    def slot(self) -> str:
        """The place in a model that the part fills."""
        return str(self.cls.slot)  # type: ignore[attr-defined]

    @property
    def family(self) -> str:
        """The folder that holds it."""
        return str(self.cls.family)  # type: ignore[attr-defined]

    @property
    def summary(self) -> str:
        """The first sentence of the class's docstring."""
        text = inspect.getdoc(self.cls) or ""
        return " ".join(text.split("\n\n")[0].split()).rstrip(".")


_entries: dict[str, Entry] = {}

C = TypeVar("C", bound=type)


def register(name: str, paper: str | None = None) -> Callable[[C], C]:
    """Enter a class into the registry under ``name`` (lower case, unique over all slots).

    ``paper`` is the key of its entry in ``papers.toml``. The class derives from a contract, which gives it its
    ``slot`` and ``family``.
    """

    def enter(cls: C) -> C:
        if not name.isidentifier() or name != name.lower():
            raise PartError(f"a part's name is a lower-case identifier, not {name!r}")
        known = _entries.get(name)
        if known and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PartError(f"the name {name!r} is taken by {known.cls.__module__}.{known.cls.__qualname__}")
        if not getattr(cls, "slot", ""):
            raise PartError(f"{cls.__name__} derives from no contract; see gatework.core.contracts")
        unknown = set(getattr(cls, "capabilities", {})) - set(CAPABILITIES)
        if unknown:
            raise PartError(f"{cls.__name__} declares unknown capabilities {sorted(unknown)}; there are {list(CAPABILITIES)}")
        _entries[name] = Entry(name, cls, paper)
        cls.part_name = name  # type: ignore[attr-defined]
        return cls

    return enter


def export(package: str) -> dict[str, type]:
    """Import every module of a family's package and return the public classes of its parts by class name.

    A family's ``__init__`` lists its parts with this, so that adding a method touches no list.
    """
    module = importlib.import_module(package)
    for info in pkgutil.iter_modules(module.__path__):
        importlib.import_module(f"{package}.{info.name}")
    return {
        entry.cls.__name__: entry.cls for entry in _entries.values() if entry.cls.__module__.startswith(package + ".")
    }


def entries(slot: str | None = None) -> list[Entry]:
    """All registered parts (of one slot), sorted by family and name."""
    for package in PACKAGES:
        importlib.import_module(f"gatework.{package}")
    chosen = [entry for entry in _entries.values() if slot is None or entry.slot == slot]
    return sorted(chosen, key=lambda entry: (entry.family, entry.name))


def slots() -> list[str]:
    """The names of all slots that have a part."""
    return sorted({entry.slot for entry in entries()})


def lookup(name: str, slot: str | None = None) -> Entry:
    """The entry called ``name``; of that ``slot``, where one is given.

    Raises:
        PartError: saying what was meant and what exists.
    """
    known = {entry.name: entry for entry in entries()}
    entry = known.get(name)
    kind = slot or "part"
    if entry is None:
        there = [e.name for e in known.values() if slot is None or e.slot == slot]
        raise PartError(f"no {kind} {name!r}; {suggest(name, there)}")
    if slot is not None and entry.slot != slot:
        there = [e.name for e in known.values() if e.slot == slot]
        raise PartError(f"{name!r} is {_a(entry.slot)}, not {_a(slot)}; there are {', '.join(there)}")
    return entry


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def suggest(name: str, there: Iterable[str]) -> str:
    """``did you mean 'x'?`` for a close match, else the list of what exists."""
    there = sorted(there)
    close = difflib.get_close_matches(name, there, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(there) or 'none'}"


def parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor parameters of a part, ``self`` left out."""
    every = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {p.name: p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def slot_of(cls: type, parameter: str) -> str | None:
    """The slot whose parts a constructor parameter takes: what the class's ``slots`` says, or its own name.

    By its name alone a parameter takes parts only if its annotation leaves room for one (``Any`` or a list): ``balance: float`` is
    a number.
    """
    declared: dict[str, str] = dict(getattr(cls, "slots", {}))
    if parameter in declared:
        return declared[parameter]
    options = _options(_hints(cls).get(parameter, Any))
    room = any(option is Any or typing.get_origin(option) is list for option in options)
    return parameter if room and parameter in slots() else None


def check(part: Any, slot: str | None = None) -> Spec:
    """Validate an expression against the registry and the signatures, without building it; returns the canonical form.

    Raises:
        PartError: unknown part, unknown or doubled argument, argument of the wrong type.
    """
    spec: Any = parse(part) if isinstance(part, str) else part
    if not isinstance(spec, Spec):
        raise PartError(f"{part!r} is not {_a(slot or 'part')}; write name or name(argument=value, ...)")
    entry = lookup(spec.name, slot)
    known = parameters(entry.cls)
    args = dict(spec.args)
    names = [name for name in known if name not in TIED and name not in ("blocks", "params", "optimizer", "model")]
    if len(spec.positional) > len(names):
        raise PartError(f"{spec.name} takes at most {len(names)} arguments, got {len(spec.positional)}: {spec}")
    for name, value in zip(names, spec.positional, strict=False):
        if name in args:
            raise PartError(f"argument {name!r} of {spec.name} is given twice: {spec}")
        args[name] = value
    hints = _hints(entry.cls)
    for name, value in args.items():
        if name not in known:
            raise PartError(f"{spec.name} has no argument {name!r}; {suggest(name, known)}")
        args[name] = _check_value(spec.name, name, value, hints.get(name, Any), slot_of(entry.cls, name))
    order = list(known)
    return Spec(spec.name, dict(sorted(args.items(), key=lambda item: order.index(item[0]))))


def _hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):
        return {}


def _check_value(part: str, name: str, value: Any, hint: Any, slot: str | None) -> Any:
    if slot is not None:
        options = _options(hint)
        plain = [option for option in options if typing.get_origin(option) is not list]
        if len(plain) < len(options):  # A list of parts will do.
            if isinstance(value, list | tuple):
                return [_check_value(part, name, item, Any, slot) for item in value]
            if Any not in plain:  # A part alone will not, as in ``moe(experts=8)``.
                if _fits(value, hint):
                    return value
                wanted = " or ".join([*map(_describe, plain), f"a list of {slot} parts"])
                raise PartError(f"{part}: {name} must be {wanted}, got {show(value)}")
        if isinstance(value, str):
            value = parse(value)
        if isinstance(value, Spec):
            return check(value, slot)
        if value is None:
            return None
        raise PartError(f"{part}: {name} is {_a(slot)} part such as {name}={entries(slot)[0].name}, not {value!r}")
    if isinstance(value, Spec):
        if value.args or value.positional:
            raise PartError(f"{part}: {name} takes no part, got {value}")
        value = value.name  # A bare word where no part is meant is a string: score=softmax.
    if not _fits(value, hint):
        raise PartError(f"{part}: {name} must be {_describe(hint)}, got {show(value)}")
    return _exact(value, hint)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _exact(value: Any, hint: Any) -> Any:
    """A whole number as a float where a float is meant: ``capacity=2`` and ``capacity=2.0`` are the same."""
    options = _options(hint)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if whole and float in options and int not in options else value


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if hint is type(None) or hint is None:
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if origin in (tuple, list):
        return isinstance(value, tuple | list) and _all_fit(value, typing.get_args(hint), origin is list)
    return True


def _all_fit(values: Sequence[Any], hints: tuple[Any, ...], alike: bool) -> bool:
    if alike or hints[-1:] == (...,):
        return all(_fits(value, hint) for value in values for hint in hints[:1])
    return len(values) == len(hints) and all(map(_fits, values, hints))


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if origin is tuple:
        return "(" + ", ".join("..." if option is ... else _describe(option) for option in typing.get_args(hint)) + ")"
    if hint is type(None):
        return "None"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}.get(hint, str(hint))


def build(part: Any, slot: str | None = None, /, **context: Any) -> Any:
    """Build a part from an expression (text or :class:`Spec`), a class, or an instance (which is returned as it is).

    ``context`` offers what the model around the part knows (``d_model``, ``heads``, ``d_ff``, ``n_experts``,
    ``blocks``, ...): each is passed on if the constructor has a parameter of that name and the expression does not
    give it. ``d_model`` and ``n_experts`` belong to the model: an expression that gives another value is refused.

    Raises:
        PartError: unknown part or argument, wrong type, sizes that do not fit, a required argument that nobody gave, a
            class or an instance of a part that fills another slot.
    """
    cls: type
    if isinstance(part, nn.Module | type):
        cls = part if isinstance(part, type) else type(part)
        name, args = cls.__name__, {}
        fills = getattr(cls, "slot", None)
        if slot is not None and isinstance(fills, str) and fills != slot:
            raise PartError(f"{name} is {_a(fills)}, not {_a(slot)}")
        if isinstance(part, nn.Module):
            return part
    else:
        spec = check(part, slot)
        cls, name, args = lookup(spec.name, slot).cls, spec.name, dict(spec.args)
    known = parameters(cls)
    for key in TIED:
        if key in context and key in args and args[key] != context[key]:
            raise PartError(f"{name}: {key} is {context[key]} in the model around it, the expression says {args[key]}")
    args = {key: value for key, value in context.items() if key in known} | args
    missing = [key for key, p in known.items() if p.default is p.empty and key not in args]
    if missing:
        raise PartError(f"{name} needs {', '.join(missing)}; write {name}({', '.join(f'{key}=...' for key in missing)})")
    try:
        return cls(**args)
    except PartError:
        raise
    except ValueError as error:
        raise PartError(f"{name}: {error}") from error
    except (RuntimeError, OverflowError) as error:  # From torch: sizes beyond its range or this machine's memory.
        reason = "there is not enough memory" if "allocate" in str(error) else str(error).splitlines()[0]
        raise PartError(f"{name} cannot be built with these sizes: {reason}") from error


def build_pattern(pattern: Any, slot: str, count: int, /, **context: Any) -> list[Any]:
    """Build ``count`` parts from a pattern that is repeated along the layers: ``"gla,gla,attention"`` for 6 layers
    twice.

    Raises:
        PartError: if the pattern is longer than ``count``, or is an instance (layers would share it).
    """
    items: list[Any]
    if isinstance(pattern, str):
        items = list(parse_pattern(pattern))
    else:
        items = list(pattern) if isinstance(pattern, list) else [pattern]
    if not 0 < len(items) <= count:
        raise PartError(f"a {slot} pattern of {len(items)} does not fit {count} layers")
    if any(isinstance(item, nn.Module) for item in items):
        raise PartError(f"give the {slot} as an expression or a class: an instance would be shared by all layers")
    return [build(items[i % len(items)], slot, **context) for i in range(count)]
