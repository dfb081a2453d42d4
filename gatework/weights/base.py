"""Weights of any module of any library: parametrized by pattern, made permanent, packed; and the bytes they take.

    weights.apply(model, "blocks.*.feedforward.*", "ternary(per='row')")
    ...                                    # train: the optimizer moves what is stored
    weights.fold(model)                    # plain weights again, or
    weights.pack(model)                    # the small form, where the method has one

A *weight* is a floating-point parameter of at least two axes, whatever its module: the ``weight`` of a linear layer, a
convolution or an embedding, an expert stack, the ``in_proj_weight`` of attention. Norms and biases are none. A convolution is one
matrix with a row for each output channel; any other weight of three axes or more is a stack of matrices.

A parametrized weight is computed whenever it is read. Where a forward pass reads it twice (shared layers, unrolled recurrences),
or for generation token by token without packing, wrap the calls in ``torch.nn.utils.parametrize.cached()``, or fold.

Saving: the ``state_dict`` of a parametrized or packed model loads into a model on which the same ``apply`` (and ``pack``) was
called. (``torch.nn.utils.parametrize`` modules cannot be pickled; ``copy.deepcopy`` works.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gatework.core.contracts import Weight
from gatework.core.cost import count_parameters
from gatework.core.errors import PartError
from gatework.core.patterns import matches, near
from gatework.core.registry import build

#: A packed linear layer unpacks at most about this many weights at a time.
BLOCK = 2**20


@dataclass(frozen=True)
class Report:
    """What :func:`apply`, :func:`fold` or :func:`pack` did to a model.

    Attributes:
        tensors: the shapes of the weights concerned, by name; a tied one stands under each of its names.
        parameters: number of parameters of the whole model, (before, after).
        bytes: :func:`stored_bytes` of the whole model, (before, after).
    """

    tensors: dict[str, tuple[int, ...]]
    parameters: tuple[int, int]
    bytes: tuple[int, int]

    def __str__(self) -> str:
        shown = [f"{name} {tuple(shape)}" for name, shape in self.tensors.items()]
        totals = [f"parameters {self.parameters[0]:,} -> {self.parameters[1]:,}", f"bytes {self.bytes[0]:,} -> {self.bytes[1]:,}"]
        return "\n".join([f"{len(shown)} weights", *(f"  {line}" for line in shown), *totals])


class Packed(nn.Module, ABC):
    """A weight in its small form: a parametrization that needs no gradient and can give single rows of a matrix.

    Its tensors do not change with ``model.to(dtype)``: the ``stored`` tensor it is called with says in which dtype the weight is
    wanted.
    """

    @abstractmethod
    def forward(self, stored: Tensor) -> Tensor:
        """The whole weight."""

    @abstractmethod
    def rows(self, stored: Tensor, rows: Tensor) -> Tensor:
        """The rows of these numbers (1-D) of a matrix, (len(rows), inputs)."""


@dataclass(eq=False)
class _Site:
    """One attribute of a module that holds a weight, under all names that it has in the model."""

    module: nn.Module
    attribute: str
    names: list[str] = field(default_factory=list)

    @property
    def source(self) -> Any:
        """The parametrization list, None for a plain weight."""
        if not parametrize.is_parametrized(self.module, self.attribute):
            return None
        return self.module.parametrizations[self.attribute]  # type: ignore[index]

    @property
    def stored(self) -> Any:
        """The tensor that is stored (None where a parametrization that is not ours stores several)."""
        source = self.source
        return self.module._parameters[self.attribute] if source is None else getattr(source, "original", None)

    @property
    def ours(self) -> bool:
        """Whether :func:`apply` or :func:`pack` has made it what it is."""
        return self.source is not None and isinstance(self.source[0], Weight | Packed)

    @property
    def stacked(self) -> int:
        """The leading axes that stack matrices."""
        convolution = isinstance(self.module, nn.modules.conv._ConvNd)
        return 0 if convolution else self.stored.dim() - 2

    def replace(self, stored: Tensor, parametrization: nn.Module | None = None, cls: type[nn.Module] | None = None) -> None:
        """Hold ``stored`` instead of what is held, under ``parametrization``; the module becomes a ``cls``."""
        if parametrize.is_parametrized(self.module):
            # The class that torch made for this module is that of its deep copies too, and is about to be changed.
            made = type(self.module)
            self.module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        if self.source is not None:
            parametrize.remove_parametrizations(self.module, self.attribute, leave_parametrized=False)
        if cls is not None:
            self.module.__class__ = cls
        delattr(self.module, self.attribute)
        if isinstance(stored, nn.Parameter):
            self.module.register_parameter(self.attribute, stored)
        else:
            self.module.register_buffer(self.attribute, stored)
        if parametrization is not None:
            parametrize.register_parametrization(self.module, self.attribute, parametrization, unsafe=True)


def matrices(shape: torch.Size, stacked: int) -> tuple[int, int, int]:
    """A weight of this shape as S matrices of R rows of I inputs."""
    return shape[:stacked].numel(), shape[stacked], shape[stacked + 1 :].numel()


def _sites(model: nn.Module) -> list[_Site]:
    """All weights of a model, parametrized ones included."""
    found: dict[tuple[int, str], _Site] = {}
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList):
            inside += (path,)
        if path.startswith(inside):
            continue
        own = [name for name, p in module._parameters.items() if p is not None and _is_weight(p)]
        if parametrize.is_parametrized(module):
            own += list(module.parametrizations)
        for attribute in own:
            site = found.setdefault((id(module), attribute), _Site(module, attribute))
            site.names.append(f"{path}.{attribute}".lstrip("."))
    return list(found.values())


def _is_weight(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.dim() >= 2


def apply(model: nn.Module, pattern: str | Sequence[str], part: Any) -> Report:
    """Let weights of a model come from ``part`` from now on, in place.

    A pattern is matched by ``fnmatch`` (``*``, ``?``, ``[...]``; ``*`` crosses dots) with the dotted name of each weight and of
    each module around it, from the beginning or from any dot on:

    - ``"blocks.*.feedforward.*"``, ``"feedforward"``: all weights of all feed-forwards (also below ``depth.blocks``);
    - ``"layers.*.mlp.down_proj"``, ``"down_proj.weight"``: one of each layer;
    - ``"w_in"``: the experts' stacks; ``"blocks.[0-3].*"``: the first four blocks; ``"*"``: everything, embeddings too.

    Call it before the optimizer is made. A part that stores something other than the weights (``stable_rps``) starts from new
    random values; one array serves all weights of one call.

    Args:
        model: any module.
        pattern: one pattern or several; a weight is taken if one of them matches.
        part: a part expression, class or instance of the slot ``weight``.

    Raises:
        PartError: no such part; a pattern that matches nothing; a weight that is parametrized already; a weight that is tied to
            one that no pattern matches. The model is then as it was.
    """
    part = build(part, "weight")
    if not isinstance(part, Weight):
        raise PartError(f"a weight part is expected, such as 'ternary', not a {type(part).__name__}")
    before = count_parameters(model), stored_bytes(model)
    chosen = _choose(model, [pattern] if isinstance(pattern, str) else list(pattern))
    # A tied weight is bound once: all its places share the parametrization and what is stored.
    unique = {id(site.stored): site for site in chosen}
    bound = part.bind([site.stored for site in unique.values()], [site.stacked for site in unique.values()])
    made = dict(zip(unique, bound, strict=True))
    shapes = {name: tuple(site.stored.shape) for site in chosen for name in site.names}
    for site in chosen:
        parametrization, stored = made[id(site.stored)]
        site.replace(stored, parametrization)
    return _report(model, shapes, before)


def _choose(model: nn.Module, patterns: list[str]) -> list[_Site]:
    sites = _sites(model)
    if not sites:
        raise PartError(f"this {type(model).__name__} has no weights: no floating-point parameter of two axes or more")
    if not patterns:
        raise PartError("no pattern is given; '*' takes every weight")
    known = [site.names[0] for site in sites]
    for pattern in patterns:
        if not any(matches(name, pattern) for site in sites for name in site.names):
            raise PartError(f"{pattern!r} matches no weight of this {type(model).__name__}; {near(pattern, known)}")
    chosen = [site for site in sites if any(matches(name, pattern) for name in site.names for pattern in patterns)]
    for site in chosen:
        if site.source is not None:
            part = type(site.source[0]).__name__
            raise PartError(f"{site.names[0]} is parametrized already ({part}); weights.fold(model) first makes that permanent")
    taken = {id(site.stored): site.names[0] for site in chosen}
    for site in sites:
        if site not in chosen and id(site.stored) in taken:
            raise PartError(f"{taken[id(site.stored)]} is tied to {site.names[0]}; name both, or untie them first")
    return chosen


def fold(model: nn.Module) -> Report:
    """Make all weights of :func:`apply` and :func:`pack` permanent, in place: plain parameters, bitwise what the model used.

    What shared an array is apart afterwards; tied weights stay tied. The parameters are new ones: make a new optimizer.

    Raises:
        PartError: nothing to fold.
    """
    before = count_parameters(model), stored_bytes(model)
    sites = [site for site in _sites(model) if site.ours]
    if not sites:
        raise PartError(f"there is nothing to fold: no weight of this {type(model).__name__} comes from a part")
    made: dict[tuple[int, int], nn.Parameter] = {}
    keys = [(id(site.source[0]), id(site.stored)) for site in sites]
    for site, key in zip(sites, keys, strict=True):
        if key not in made:
            trained = site.stored.requires_grad or isinstance(site.source[0], Packed)
            made[key] = nn.Parameter(getattr(site.module, site.attribute).detach().clone(), requires_grad=trained)
    for site, key in zip(sites, keys, strict=True):
        plain = {packed: plain for plain, packed in _BY_ROWS.items()}
        site.replace(made[key], cls=plain.get(parametrize.type_before_parametrizations(site.module)))
    shapes = {name: tuple(made[key].shape) for site, key in zip(sites, keys, strict=True) for name in site.names}
    return _report(model, shapes, before)


def pack(model: nn.Module) -> Report:
    """Swap all weights of :func:`apply` for their small forms, in place, for inference.

    The packed model computes what the parametrized one did. A packed linear layer unpacks blocks of rows for the product, a packed
    embedding the rows it looks up; other modules unpack a weight when they read it. ``model.to(dtype)`` changes the dtype of the
    computation; the packed tensors stay as they are. :func:`fold` unpacks for good.

    To load a packed model, build it, ``apply`` and ``pack`` as before, and ``load_state_dict``.

    Raises:
        PartError: nothing to pack, or a part that has no packed form. The model is then as it was.
    """
    before = count_parameters(model), stored_bytes(model)
    sites = [site for site in _sites(model) if site.ours and isinstance(site.source[0], Weight)]
    if not sites:
        raise PartError(f"there is nothing to pack in this {type(model).__name__}: call weights.apply(model, pattern, part) first")
    shapes = {name: tuple(getattr(site.module, site.attribute).shape) for site in sites for name in site.names}
    made: dict[tuple[int, int], tuple[nn.Module, Tensor]] = {}
    keys = [(id(site.source[0]), id(site.stored)) for site in sites]
    with torch.no_grad():
        for site, key in zip(sites, keys, strict=True):
            if key not in made:
                made[key] = site.source[0].pack(site.stored)
    for site, key in zip(sites, keys, strict=True):
        parametrization, stored = made[key]
        site.replace(stored, parametrization, cls=_by_rows(site))
    return _report(model, shapes, before)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that a model holds; a storage that several share counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def _report(model: nn.Module, shapes: dict[str, tuple[int, ...]], before: tuple[int, int]) -> Report:
    return Report(shapes, (before[0], count_parameters(model)), (before[1], stored_bytes(model)))


class PackedLinear(nn.Linear):
    """A linear layer whose packed weight is unpacked in blocks of rows."""

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``."""
        step = max(1, BLOCK // max(1, self.in_features))
        if step >= self.out_features:
            return F.linear(x, self.weight, self.bias)
        outputs = []
        for rows in torch.arange(self.out_features, device=x.device).split(step):
            bias = None if self.bias is None else self.bias[rows]
            outputs.append(F.linear(x, _rows(self, rows), bias))
        return torch.cat(outputs, -1)


class PackedEmbedding(nn.Embedding):
    """An embedding of which the rows that are looked up are unpacked."""

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens' rows."""
        return _rows(self, tokens.reshape(-1)).view(*tokens.shape, self.embedding_dim)


_BY_ROWS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PackedLinear, nn.Embedding: PackedEmbedding}


def _by_rows(site: _Site) -> type[nn.Module] | None:
    """The class that takes rows of a packed weight, for a plain linear layer or embedding."""
    fits = site.attribute == "weight" and getattr(site.module, "max_norm", None) is None
    return _BY_ROWS.get(parametrize.type_before_parametrizations(site.module)) if fits else None


def _rows(module: nn.Module, rows: Tensor) -> Tensor:
    source: Any = module.parametrizations.weight  # type: ignore[union-attr]
    out: Tensor = source[0].rows(source.original, rows)
    return out


__all__ = ["Packed", "Report", "apply", "fold", "matrices", "pack", "stored_bytes"]
