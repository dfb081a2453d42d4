"""How the contract tests build an instance of any registered part, and inputs that fit it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from gatework.core import CAPABILITIES, Routing, advance, build, capability, entries, losses, metrics
from gatework.core.registry import parameters
from gatework.depth.base import Block

#: LENGTH is that of mixers which run at one length only, because of an argument ``tokens`` or ``grid``.
WIDTH, HEADS, EXPERTS, LAYERS, LENGTH = 16, 2, 4, 2, 24
GRID = (4, 6)
#: Slots whose parts are modules from tensors to tensors.
MODULES = ("activation", "channel_gate", "gate", "feedforward", "mixer", "depth")
#: Those of them that take no mask.
MASKLESS = ("activation", "channel_gate")


@dataclass(frozen=True)
class Case:
    """A part's class with the arguments of a small instance."""

    cls: type
    args: Mapping[str, Any] = field(default_factory=dict)
    #: The mixer in the blocks that a depth policy runs.
    mixer: Any = "attention"

    @property
    def slot(self) -> str:
        return self.cls.slot

    @property
    def width(self) -> int:
        """Of the inputs: WIDTH, where the class's ``example`` names no other."""
        return int(self.cls.example.get("d_model", WIDTH))

    def fresh(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
        """An instance as it is constructed."""
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "d_model": WIDTH, "heads": HEADS, "n_experts": EXPERTS, "n_layers": LAYERS, "tokens": LENGTH,
        }
        known = parameters(self.cls)
        if "blocks" in known:
            sizes["blocks"] = [
                Block(build(self.mixer, "mixer", **sizes), build("glu", "feedforward", d_model=WIDTH), WIDTH) for _ in range(LAYERS)
            ]
        offered = {name: value for name, value in sizes.items() if name in known}
        return self.cls(**(offered | dict(self.cls.example) | dict(self.args))).to(dtype)

    def new(self, dtype: torch.dtype = torch.float64, seed: int = 0, train: bool = False) -> Any:
        """An instance in use: no parameter at a special value such as 0, a short training behind it, schedules moved."""
        part = self.fresh(torch.float64, seed)
        with torch.no_grad():
            for p in part.parameters():
                p.add_(0.3 * torch.randn_like(p))
            part.train()
            for step in (1, 2, 3):
                call(part, self.x(seed=100 + step))
                advance(part, step, 3)
            losses(part)
            metrics(part)
        return part.to(dtype).train(train)

    def x(self, batch: int = 3, length: int = LENGTH, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
        """Inputs: (B, T, D), for a gate (B T, D)."""
        x = torch.randn(batch, length, self.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return x.flatten(0, 1) if self.slot == "gate" else x

    def mask(self, x: Tensor, seed: int = 2) -> Tensor:
        """A mask with holes for inputs ``x``, at least one real token in every row."""
        real = torch.rand(x.shape[:-1], generator=torch.Generator().manual_seed(seed)) < 0.6
        real[..., 0] = True
        return real


def call(part: nn.Module, x: Tensor, **settings: Any) -> Tensor:
    """The part's output as one tensor; of a routing the dense matrix."""
    y = part(x, **conditions(part, x), **settings)
    return y.dense() if isinstance(y, Routing) else y


def conditions(part: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a gate must be given beside the tokens ``x``."""
    return {name: example_inputs(part.part_name).condition(name, x) for name in getattr(part, "conditions", ())}


def example_inputs(name: str) -> ModuleType:
    """The module ``inputs/<id>.py``, which says what a part with inputs of its own is called with.

    For a gate with conditions ``condition(name, x)``: the tensor for tokens ``x``, row by row a function of x. For a
    component ``make()``: a small instance; ``inputs(dtype, seed)``: a tuple of inputs, three rows (of which each output has
    one too, where the component is ``batch_invariant``).
    """
    return importlib.import_module(f"{__package__}.inputs.{name}")


def objective(y: Tensor) -> Tensor:
    """A scalar in which every element of ``y`` has its own weight."""
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (y * weights.to(y.dtype)).sum()


def cases(*slots: str, capable: str | None = None) -> list[Any]:
    """Test parameters, one for each registered part of the slots (that has the capability); ids are the parts' names."""
    found = [entry for slot in slots for entry in entries(slot) if capable is None or capability(entry.cls, capable)]
    return [pytest.param(Case(entry.cls), id=entry.name) for entry in found]


def policies(capable: str | None = None) -> list[Any]:
    """Every depth policy over every mixer that decodes; slow but for attention, whose state grows, and gla, whose does not."""
    return [
        pytest.param(
            Case(policy.cls, mixer=mixer.name), id=f"{policy.name}-{mixer.name}",
            marks=() if mixer.name in ("attention", "gla") else pytest.mark.slow,
        )
        for policy in entries("depth") for mixer in entries("mixer")
        if capability(mixer.cls, "decodes") and (capable is None or capability(policy.cls, capable))
    ]


def alternatives(cls: type) -> Iterator[tuple[str, Any]]:
    """Constructor arguments of plain types with a value that is not the default (which need not fit the sizes)."""
    hints = get_type_hints(cls.__init__)
    for name, parameter in parameters(cls).items():
        default, hint = parameter.default, hints.get(name)
        if default is parameter.empty or hint is Any:
            continue
        options = get_args(hint)
        if get_origin(hint) is Literal:
            yield from ((name, option) for option in options if option != default)
        elif hint is bool:
            yield name, not default
        elif hint is float:
            yield name, default / 2 or 0.5
        elif hint is int:
            yield name, 1 if name == "heads" else default // 2 or default + 1
        elif type(None) in options and default is None:
            plain = [option for option in options if option is not type(None)]
            if plain[0] is int:
                yield name, 8 if name == "d_ff" else 1
            elif plain[0] is float:
                yield name, 0.5
            elif name == "grid":
                yield name, GRID
            elif get_origin(plain[0]) is Literal:
                yield from ((name, option) for option in get_args(plain[0]))


def variants(*slots: str, capable: str | None = None) -> list[Any]:
    """Like :func:`cases`, and each part again until every plain argument has had each of its values, as many changed in one
    instance as fit together; each of them changed alone is a slow test."""
    found = cases(*slots, capable=capable)
    for entry in (entry for slot in slots for entry in entries(slot) if capable is None or capability(entry.cls, capable)):
        alone = [(name, value) for name, value in alternatives(entry.cls) if _fits(entry.cls, {name: value}, capable)]
        left = alone
        while left:
            together: dict[str, Any] = {}
            for name, value in left:
                if name not in together and _fits(entry.cls, together | {name: value}, capable):
                    together[name] = value
            left = [(name, value) for name, value in left if (name, value) not in together.items()]
            found.append(_variant(entry, together))
        found += [_variant(entry, {name: value}, pytest.mark.slow) for name, value in alone]
    return found


@functools.cache
def _answers(cls: type, args: tuple[tuple[str, Any], ...]) -> Mapping[str, bool] | None:
    """What an instance with these arguments can do; None where they do not fit each other or the sizes."""
    try:
        part = Case(cls, dict(args)).fresh()
    except ValueError:
        return None
    return {name: bool(capability(part, name)) for name in CAPABILITIES}


def _fits(cls: type, args: Mapping[str, Any], capable: str | None) -> bool:
    answers = _answers(cls, tuple(args.items()))
    return answers is not None and (capable is None or answers[capable])


def _variant(entry: Any, args: Mapping[str, Any], *marks: Any) -> Any:
    shown = ", ".join(f"{name}={value}" for name, value in args.items())
    return pytest.param(Case(entry.cls, args), id=f"{entry.name}({shown})", marks=marks)
