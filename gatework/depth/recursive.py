"""``Recursive``: a block of few unique layers run several times, each time with its own low-rank update of every linear.

Bae et al., Relaxed Recursive Transformers: Effective Parameter Sharing with Layer-wise LoRA, 2024 (ICLR 2025), arXiv 2410.20672; no
official release was found. With L virtual layers, R loops, m = L / R unique layers and cyclic sharing, virtual layer i = r m + j
(0 <= r < R, 0 <= j < m) runs unique layer j, in which every linear has the weight

    W_i = W'_j + B_i A_i,    A_i (rank, in),  B_i (out, rank)

What W'_j starts as, given L layers with weights W_0 ... W_{L-1}:

    average    the mean of W_j, W_{j+m}, ..., W_{j+(R-1)m}
    stepwise   W_s, s the j-th of m evenly spaced numbers from 0 to L - 1, rounded half to even
    lower      W_j
    upper      W_{L-m+j}
    random     W_s, s the j-th of m of the L layers drawn without replacement, in order

What the updates start as: ``svd``, the best approximation of rank ``rank`` to W_i - W'_j = U S V^T (A_i = V_r^T, B_i = U_r S_r), or
``zero`` (B_i = 0, A_i as in ``nn.Linear``).

Differences: the paper adapts pretrained models only, by SVD. A model built from scratch starts here with ``stepwise`` and
``zero``: differences of random matrices have no low-rank structure, and their average is too small by sqrt(R). The paper's
depth-wise batching is a scheduler, not a depth policy.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.depth.base import Block
from gatework.depth.stack import Stack

Init = Literal["stepwise", "average", "lower", "upper", "random"]


def sources(layers: int, loops: int, init: Init = "stepwise") -> list[list[int]]:
    """The layers whose weights' mean each of the ``layers / loops`` unique layers starts from.

    ``random`` draws from torch's random state.

    Raises:
        PartError: ``layers`` is not divisible by ``loops``, or the name is unknown.

    Example:
        >>> sources(6, 2, "stepwise"), sources(6, 2, "average")
        ([[0], [2], [5]], [[0, 3], [1, 4], [2, 5]])
    """
    if loops < 1:
        raise PartError(f"loops must be at least 1, got {loops}")
    if layers < 1 or layers % loops:
        raise PartError(f"the number of layers {layers} is not divisible by loops {loops}")
    unique = layers // loops
    if init == "average":
        return [list(range(j, layers, unique)) for j in range(unique)]
    if init == "stepwise":
        chosen = np.linspace(0, layers - 1, unique).round().astype(int).tolist()
    elif init == "lower":
        chosen = list(range(unique))
    elif init == "upper":
        chosen = list(range(layers - unique, layers))
    elif init == "random":
        chosen = sorted(torch.randperm(layers, device="cpu")[:unique].tolist())
    else:
        raise PartError(f"init must be stepwise, average, lower, upper or random, got {init!r}")
    return [[layer] for layer in chosen]


def svd_lora_init(delta: Float[Tensor, "out in"], rank: int) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """A and B whose product B A is the nearest matrix of at most this rank; all singular values go to B.

    The squared Frobenius error is the sum of the squared singular values that are left out. Computed in float32 at least; the
    factors have the dtype of ``delta``, and ``rank`` is cut to its smaller side.
    """
    exact = delta.to(torch.promote_types(delta.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    return vh[:rank].to(delta.dtype).contiguous(), (u[:, :rank] * s[:rank]).to(delta.dtype)


class _LowRank(nn.Module):
    """``x A^T B^T``."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def extra_repr(self) -> str:
        return f"rank={len(self.a)}"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a), self.b)


class LoRALinear(nn.Module):
    """A linear with a low-rank update: ``y = x (W + B A)^T + b``.

    It takes the cheaper way. For few tokens the update runs beside the linear, ``2 rank (in + out)`` FLOPs per token; for many
    (more than ``in out / (in + out)``) ``W + B A`` is formed once, ``2 rank in out``, and kept for the backward pass. In half
    precision, which would round the update away in the sum, and with a frozen W, whose gradient the sum would need, it always
    runs beside.

    Args:
        base: the linear that holds (or borrows) W and b.
        a: A (rank, in).
        b: B (out, rank).
    """

    def __init__(self, base: nn.Linear, a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> None:
        super().__init__()
        self.base = base
        self.lora = _LowRank(a, b)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """``W + B A``, for code that takes a linear's weight instead of calling it."""
        return torch.addmm(self.base.weight, self.lora.b, self.lora.a)

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base.bias

    def forward(self, x: Float[Tensor, "*B in"]) -> Float[Tensor, "*B out"]:
        """Apply the linear and its update."""
        if self._sums(x):
            return F.linear(x, self.weight, self.bias)
        y: Tensor = self.base(x) + self.lora(x)
        return y

    def _sums(self, x: Tensor) -> bool:
        sizes, tokens = (self.in_features, self.out_features), x.numel() // self.in_features
        if tokens * sum(sizes) <= sizes[0] * sizes[1] or x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type):
            return False
        return isinstance(self.base, nn.Linear) and (self.base.weight.requires_grad or not torch.is_grad_enabled())


class Borrower:
    """Mixed into the class of a module that reads some of its parameters from another module, its owner."""

    _borrowed: tuple[type, tuple[str, ...]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unfilled, self._borrowed, self.__getstate__()

    def active_parameters(self) -> int:
        """Its own parameters: what is borrowed is counted where it is owned."""
        return sum(p.numel() for p in self.parameters())  # type: ignore[attr-defined]


def _unfilled(cls: type, names: tuple[str, ...]) -> Any:
    made: Any = _borrowing(cls, names)
    return made.__new__(made)


@functools.cache
def _borrowing(cls: type, names: tuple[str, ...]) -> type:
    def borrowed(name: str) -> property:
        def read(self: Any) -> Any:
            parent, child = self._owner
            return getattr(getattr(parent, child) if child else parent, name)

        return property(read)

    fields: dict[str, Any] = {name: borrowed(name) for name in names}
    return type(cls.__name__, (Borrower, cls), fields | {"__module__": cls.__module__, "_borrowed": (cls, names)})


def _borrow(module: nn.Module, layer: nn.Module, path: str, names: Sequence[str]) -> None:
    """Make the parameters ``names`` of ``module`` those of the module at ``path`` of ``layer``, which alone registers them.

    So each is in ``parameters()`` and in the ``state_dict`` once, under its owner's name, and whoever replaces it or its owner
    there (a checkpoint, a quantisation) has replaced it everywhere.
    """
    for name in names:
        del module._parameters[name]
    cls: Any = type(module)
    module.__class__ = _borrowing(cls, tuple(names))
    parent, _, child = path.rpartition(".")
    vars(module)["_owner"] = (layer.get_submodule(parent), child)  # In a tuple, which does not register it as a child.


def share(
    layers: Sequence[nn.Module],
    loops: int,
    rank: int = 8,
    init: Init = "stepwise",
    lora: Literal["svd", "zero"] = "zero",
    share_norms: bool = True,
) -> list[Any]:
    """Copies of ``layers`` that are ``loops`` cycles over the same weights.

    Copy ``r m + j`` has modules and buffers of its own and takes its parameters from copy j; each ``nn.Linear`` becomes a
    :class:`LoRALinear`. The layers given are left as they are; for ``loops`` 1 they are returned themselves. Arguments are those of
    :class:`Recursive`.

    Raises:
        PartError: settings that do not fit, layers a cycle apart of different structure, nothing to put an update on.
    """
    if rank < 0:
        raise PartError(f"rank must be at least 0, got {rank}")
    if lora not in ("svd", "zero"):
        raise PartError(f"lora must be svd or zero, got {lora!r}")
    chosen = sources(len(layers), loops, init)
    if loops == 1:
        return list(layers)
    unique = len(layers) // loops
    for j in range(unique):
        for i in {*range(j, len(layers), unique), *chosen[j]} - {j}:
            if difference := _difference(layers[j], layers[i]):
                raise PartError(f"layers {j} and {i} cannot share, they differ in {difference}: a pattern repeats in each loop")
    if rank and not any(_linears(layer) for layer in layers):
        raise PartError("there is no nn.Linear in the layers for a low-rank update: give rank=0 to share them as they are")

    before = [{name: p.detach() for name, p in layer.named_parameters()} for layer in layers]
    shared = [
        {name: _mean([before[i][name] for i in chosen[j]]) for name, p in before[j].items() if share_norms or p.dim() > 1}
        for j in range(unique)
    ]
    made = [_copy(layer) for layer in layers]
    for layer, new, values in zip(layers, made, shared * loops, strict=True):
        for path, weight in _linears(layer) if rank else ():
            parent, _, name = path.rpartition(".")
            linear: Any = new.get_submodule(path)
            update = LoRALinear(linear, *_update(weight.detach(), values[f"{path}.weight"], rank, lora))
            setattr(new.get_submodule(parent), name, update.train(linear.training))
    for i, (layer, new) in enumerate(zip(layers, made, strict=True)):
        values, bases = shared[i % unique], {f"{path}.base": path for path, _ in _linears(layer)} if rank else {}
        for path, module in new.named_modules():
            names = {name: f"{bases.get(path, path)}.{name}".lstrip(".") for name, p in module._parameters.items() if p is not None}
            names = {name: old for name, old in names.items() if old in before[i]}
            for name, old in names.items():
                value = values[old] if old in values else before[i][old].clone()
                module._parameters[name] = nn.Parameter(value, layer.get_parameter(old).requires_grad)
            if i >= unique and (borrowed := [name for name, old in names.items() if old in values]):
                _borrow(module, made[i % unique], path, borrowed)
    return made


def _copy(layer: nn.Module) -> nn.Module:
    """A copy of the modules and buffers; the parameters, and objects such as a configuration, are the same."""
    values = [value for module in layer.modules() for value in vars(module).values()]
    same = [value for value in values if not isinstance(value, dict | list | tuple | set | nn.Module | Tensor)]
    return copy.deepcopy(layer, {id(value): value for value in (*layer.parameters(), *same)})


def _linears(layer: nn.Module) -> list[tuple[str, Tensor]]:
    """Paths and weights of the linears inside a layer."""
    return [
        (path, module.weight) for path, module in layer.named_modules()
        if path and isinstance(module, nn.Linear) and "weight" in module._parameters
    ]


def _mean(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0].clone()
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return torch.stack([value.to(dtype) for value in values]).mean(0).to(values[0].dtype)


def _update(weight: Tensor, shared: Tensor, rank: int, lora: str) -> tuple[Tensor, Tensor]:
    """A and B of one linear."""
    if lora == "svd":
        return svd_lora_init(weight - shared, rank)
    rank = min(rank, *weight.shape)
    a, b = weight.new_empty(rank, weight.shape[1]), weight.new_zeros(len(weight), rank)
    nn.init.kaiming_uniform_(a, a=5**0.5)
    return a, b


def _difference(one: nn.Module, other: nn.Module) -> str | None:
    """The first place in which two layers are not built alike."""
    modules = [dict(layer.named_modules()) for layer in (one, other)]
    for path in modules[0] | modules[1]:
        a, b = (found.get(path) for found in modules)
        if type(a) is not type(b):
            return f"{path} ({type(a).__name__} and {type(b).__name__})"
    shapes = [{name: tuple(p.shape) for name, p in layer.named_parameters()} for layer in (one, other)]
    for name in shapes[0] | shapes[1]:
        if shapes[0].get(name) != shapes[1].get(name):
            return f"{name} ({shapes[0].get(name)} and {shapes[1].get(name)})"
    return None


@register("recursive", paper="recursive")
class Recursive(Stack):
    """Few unique layers run several times, with a low-rank update each time.

    Args:
        blocks: L layers; ``L / loops`` keep weights, the others run with theirs. A pattern of parts repeats in each loop.
        loops: how often the unique layers are run; 1 is the plain stack.
        rank: rank of the update that each virtual layer has on each of its ``nn.Linear`` (at most the linear's smaller side); 0
            shares strictly.
        init: what the unique layers start from, of the L layers given: ``stepwise`` evenly spaced ones, the first and the last
            among them; ``average`` the mean of those that share; ``lower`` the first; ``upper`` the last; ``random`` a random
            choice.
        lora: ``zero`` starts every update at 0; ``svd`` at the best approximation of what the layer's own weight differs by from
            the shared one, for layers that are trained already.
        share_norms: share vectors too (norm gains, biases); False leaves each virtual layer its own.

    The blocks stay L modules, with settings, buffers (statistics, schedules) and side outputs of their own: the losses of all
    loops add up. A weight that no ``nn.Linear`` holds (stacked experts, convolutions) is shared without an update. Each parameter
    is registered once, the shared ones in the first ``L / loops`` blocks.

    Parameters: those of the unique layers, and ``rank * (in + out)`` per linear and virtual layer. FLOPs: those of L layers, and
    at most ``2 rank (in + out)`` per linear and token. Weight decay on A and B pulls the virtual layers together. FSDP has to
    wrap the policy as one unit, since blocks read each other's weights.

    Initialisation: the blocks' own, of those that ``init`` picks; updates start at 0 (B 0, A uniform within ``1 / sqrt(in)``).
    ``average`` of untrained blocks is too small by ``sqrt(loops)``.

    Decoding: each virtual layer's mixer keeps its own state, as in the plain stack.

    Source: arXiv 2410.20672.

    Raises:
        PartError: a number of blocks that ``loops`` does not divide, a negative rank, an unknown name, blocks one cycle apart of
            different structure.
    """

    def __init__(
        self,
        blocks: list[Block] | nn.ModuleList,
        loops: int = 2,
        rank: int = 8,
        init: Init = "stepwise",
        lora: Literal["svd", "zero"] = "zero",
        share_norms: bool = True,
    ) -> None:
        super().__init__(share(list(blocks), loops, rank, init, lora, share_norms) if len(blocks) else [])
        self.loops, self.rank, self.init, self.lora, self.share_norms = loops, rank, init, lora, share_norms

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"loops={self.loops}, rank={self.rank}, init={self.init}, lora={self.lora}"
        return f"{shown}, share_norms={self.share_norms}"
