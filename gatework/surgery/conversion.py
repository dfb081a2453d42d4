"""``Conversion``: what one conversion did to a model, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from gatework.core.cost import count_parameters
from gatework.core.errors import GateworkError, PartError
from gatework.weights import stored_bytes

#: How a conversion is done: ``convert(model, conversion, initialise, **arguments)`` changes the model through
#: :meth:`Conversion.swap` alone; without ``initialise`` only the structure matters, because the values are loaded next.
Convert = Callable[..., None]


@dataclass(frozen=True)
class Converter:
    """A kind of conversion: how it is done, and which parameters are its own (patterns of :func:`fnmatch.fnmatch`)."""

    convert: Convert
    new: tuple[str, ...]


#: The conversions by name; :func:`converter` enters them, :func:`~gatework.surgery.load` does them again.
CONVERTERS: dict[str, Converter] = {}


def converter(name: str, new: tuple[str, ...] = ()) -> Callable[[Convert], Convert]:
    """Enter a kind of conversion under ``name``; ``new`` are the names of the parameters that it adds."""

    def enter(function: Convert) -> Convert:
        CONVERTERS[name] = Converter(function, new)
        return function

    return enter


@dataclass(eq=False)
class Conversion:
    """What one conversion did; ``str`` prints it.

    Attributes:
        model: the converted model.
        name: kind of conversion.
        arguments: as given, in full.
        replaced: one line per kind of replacement, with its count.
        parameters: their number before and after, shared ones once.
        stored_bytes: bytes of all distinct parameters and buffers before and after.
        part: the gatework part that was put in, where there is one (a depth policy).
    """

    model: nn.Module
    name: str
    arguments: dict[str, Any]
    replaced: list[str] = field(default_factory=list)
    parameters: tuple[int, int] = (0, 0)
    stored_bytes: tuple[int, int] = (0, 0)
    part: Any = None
    _originals: list[tuple[str, nn.Module]] = field(default_factory=list, repr=False)

    def swap(self, path: str, module: nn.Module) -> None:
        """Put ``module`` at a path of the model and remember what was there."""
        self._originals.append((path, self.model.get_submodule(path)))
        _set(self.model, path, module)

    def keep(self, paths: Collection[str]) -> None:
        """Of all modules swapped so far, let only those at ``paths`` stay."""
        for path, module in reversed(self._originals):
            if path not in paths:
                _set(self.model, path, module)
        self._originals = [(path, module) for path, module in self._originals if path in paths]

    def undo(self) -> None:
        """Take the conversion back: every module that it replaced returns as it was, with its own tensors.

        The model then has its structure from before, and bitwise its tensors, except that training which moved the model's own
        weights in between is not taken back. Of several conversions, the last one is undone first.
        """
        done = records(self.model)
        mine = [i for i, record in enumerate(done) if record is self._record]
        if not mine:
            raise PartError(f"this conversion ({self.name}) is not in the model any more")
        if mine[0] != len(done) - 1:
            later = ", ".join(record["name"] for record in reversed(done[mine[0] + 1 :]))
            raise PartError(f"undo the later conversions first: {later}")
        _forget_hooks(self.model)
        self._restore()
        done.pop()
        _guard(self.model)

    def _restore(self) -> None:
        for path, module in reversed(self._originals):
            _set(self.model, path, module)
        self._originals.clear()

    def __post_init__(self) -> None:
        self._record: dict[str, Any] = {"name": self.name, "arguments": self.arguments}

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        before, after = self.parameters
        stored = [_size(size) for size in self.stored_bytes]
        lines = [
            f"{self.name}({arguments}) on {type(self.model).__name__}",
            *(f"  {'replaced' if i == 0 else '':<12}{line}" for i, line in enumerate(self.replaced)),
            f"  parameters  {before:,} -> {after:,} ({100 * (after / before - 1):+.2f}%)",
            f"  stored      {stored[0]} -> {stored[1]} ({100 * (self.stored_bytes[1] / self.stored_bytes[0] - 1):+.2f}%)",
        ]
        return "\n".join(lines)


def convert(model: nn.Module, name: str, arguments: dict[str, Any], initialise: bool = True) -> Conversion:
    """Convert ``model`` in place; on an error it is left as it was.

    Raises:
        PartError: where nothing was replaced, or the conversion cannot work on this model.
    """
    if name not in CONVERTERS:
        raise GateworkError(f"there is no conversion {name!r}; there are {', '.join(sorted(CONVERTERS))}")
    conversion = Conversion(model, name, arguments)
    before = count_parameters(model), stored_bytes(model)
    _forget_hooks(model)
    try:
        CONVERTERS[name].convert(model, conversion, initialise, **arguments)
        if not conversion._originals:
            raise PartError(f"the conversion {name} replaced nothing in this {type(model).__name__}")
    except BaseException:
        conversion._restore()
        raise
    conversion.parameters = before[0], count_parameters(model)
    conversion.stored_bytes = before[1], stored_bytes(model)
    records(model).append(conversion._record)
    _guard(model)
    return conversion


def records(model: nn.Module) -> list[dict[str, Any]]:
    """Name and arguments of the model's conversions, first to last."""
    if "gatework_conversions" not in model.__dict__:
        model.gatework_conversions = []  # type: ignore[assignment]
    done: list[dict[str, Any]] = model.gatework_conversions  # type: ignore[assignment]
    return done


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _guard(model: nn.Module) -> None:
    """Plain transformers would load a converted model's checkpoint with random weights and a mere warning: refuse to write it."""
    model.__dict__.pop("save_pretrained", None)
    if records(model):
        model.__dict__["save_pretrained"] = _refuse
    else:
        del model.gatework_conversions


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise GateworkError(
        "plain transformers cannot load a converted model: save it with gatework.surgery.save(model, folder), or undo"
    )


def _forget_hooks(model: nn.Module) -> None:
    # transformers installs its hooks for attentions and hidden states once, on the modules that are there: let it begin anew.
    for module in model.modules():
        module.__dict__.pop("_output_capturing_hooks_installed", None)
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
