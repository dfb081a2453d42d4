"""``ternary`` and ``pack``: weights of three values in a pretrained model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from gatework import weights
from gatework.surgery.conversion import Conversion, convert, converter
from gatework.surgery.layout import describe


def ternary(
    model: nn.Module,
    pattern: str | Sequence[str] | None = None,
    per: Literal["tensor", "row"] = "tensor",
    pack: bool = False,
) -> Conversion:
    """Make weights of a pretrained model ternary, in place (:class:`gatework.weights.Ternary`).

    This changes the function: train afterwards (:func:`~gatework.surgery.distill` moves the full-precision weights behind the
    ternary ones), then :func:`pack`.

    Args:
        model: a Hugging Face model of a layout that :func:`~gatework.surgery.describe` knows.
        pattern: which weights, as :func:`gatework.weights.apply` reads it; by default the linear maps of all blocks, without
            embedding and head.
        per: the weights that share a scale: a matrix or one of its rows.
        pack: store five weights in a byte at once, for a model that is not trained any more.

    Raises:
        PartError: a pattern that matches nothing, weights that are parametrized or packed already.
    """
    names = [pattern] if isinstance(pattern, str) else None if pattern is None else list(pattern)
    return convert(model, "ternary", {"pattern": names, "per": per, "pack": pack})


@converter("ternary")
def _ternary(model: nn.Module, conversion: Conversion, initialise: bool, pattern: list[str] | None, per: str, pack: bool) -> None:
    if pattern is None:
        pattern = [f"{path}.weight" for path in describe(model).linears]
    _detach(model, conversion)
    if not initialise:
        _ones(model)
    report = weights.apply(model, pattern, f"ternary(per={per!r})")
    if pack:
        weights.pack(model)
    _keep(conversion, report)
    conversion.replaced.append(f"{len(report.tensors)} weights by ternary ones, a scale per {per}{', packed' if pack else ''}")


def pack(model: nn.Module) -> Conversion:
    """Store the weights that a conversion made ternary in their small form, in place, for inference.

    The function stays the same (:func:`gatework.weights.pack`); undone, the full-precision weights are back.

    Raises:
        PartError: nothing to pack.
    """
    return convert(model, "pack", {})


@converter("pack")
def _pack(model: nn.Module, conversion: Conversion, initialise: bool) -> None:
    _detach(model, conversion)
    if not initialise:
        _ones(model)
    report = weights.pack(model)
    _keep(conversion, report)
    conversion.replaced.append(f"{len(report.tensors)} parametrized weights by their packed form")


def _detach(model: nn.Module, conversion: Conversion) -> None:
    """Put copies that share the tensors in the places of all modules with weights: the originals stay untouched for ``undo``."""
    copies: dict[int, nn.Module] = {}
    done: tuple[str, ...] = ()
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not path or path.startswith(done):
            continue
        if any(p is not None and p.dim() > 1 for p in module._parameters.values()) or parametrize.is_parametrized(module):
            if id(module) not in copies:
                tensors: Any = (*module.parameters(), *module.buffers())
                copies[id(module)] = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
            conversion.swap(path, copies[id(module)])
            done += (f"{path}.",)


def _keep(conversion: Conversion, report: weights.Report) -> None:
    """Put the originals back where nothing was converted."""
    conversion.keep({name.rpartition(".")[0] for name in report.tensors})


def _ones(model: nn.Module) -> None:
    # The values are loaded next; what stands there until then may be anything, and quantisation looks at it.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.fill_(1.0)
