"""Measured cost: the FLOPs that ran, wall-clock time, peak memory, bytes saved for the backward pass, parameters.

FLOPs are counted from the operations that really ran, below autograd, so dynamic compute is counted as it happens: a
token that a part skips costs nothing, a recomputation counts twice. A multiply-add is 2 FLOPs; matrix products,
convolutions and attention count, element-wise functions, normalisations, gathers and reductions count 0 (the convention
of ``torch.utils.flop_counter``, whose formulas are used). :data:`FORMULAS` adds the operations that torch leaves at 0:
fused CPU attention, ``grouped_mm``, matrix-vector products, in-place products, triangular solves, fused LSTM, the fused
layers that ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` run in evaluation.

Attention costs two products of T x T forward, and backward five with the fused kernels' recomputation of the scores, four
without. Fused kernels with ``is_causal`` leave out what the mask hides: only the pairs that see each other are counted (torch's
own counter counts all). A mask given as a tensor hides nothing from the count, because it spares no kernel the work.
"""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from gatework.core.contracts import State, losses, metrics

aten = torch.ops.aten


def _attention(op: Any) -> Callable[..., int]:
    """The formula of a fused attention operation, forward or backward."""
    place = [argument.name for argument in op.default._schema.arguments].index("is_causal")
    backward = op.default._schema.arguments[0].name.startswith("grad")

    def count(*args: Any, **kwargs: Any) -> int:
        query, key = args[backward].shape, args[backward + 1].shape
        shapes = [x.shape for x in args[: 3 + backward]]
        flops: int = sdpa_backward_flop_count(*shapes) if backward else sdpa_flop_count(*shapes)
        if not kwargs.get("is_causal", args[place] if len(args) > place else False):
            return flops
        new, entries = query[-2], key[-2]
        seen = sum(min(row + 1, entries) for row in range(new))
        return flops * seen // max(new * entries, 1)

    return count


def _product(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    """``grouped_mm`` in its four layouts (2-D or 3-D sides), and plain matrix, matrix-vector and dot products."""
    batch = a.shape[0] if a.dim() == 3 and b.dim() == 3 else 1
    rows = a.shape[-2] if a.dim() > 1 else 1
    columns = b.shape[-1] if b.dim() > 1 else 1
    return 2 * batch * rows * a.shape[-1] * columns


def _added_product(target: Tensor, a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return _product(a, b)


def _transposed_product(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * a.numel() * b.shape[0]


def _attention_layer(query: Tensor, key: Tensor, value: Tensor, width: int, *args: Any, **kwargs: Any) -> int:
    """All of ``nn.MultiheadAttention``: three projections in, attention, one out."""
    batch, new, entries = query.shape[0], query.shape[1], key.shape[1]
    return 2 * batch * width * ((2 * new + 2 * entries) * width + 2 * new * entries)


def _encoder_layer(x: Tensor, width: int, heads: int, *args: Any, **kwargs: Any) -> int:
    """All of ``nn.TransformerEncoderLayer``."""
    first, second = args[11], args[13]
    return _attention_layer(x, x, x, width) + 2 * x.shape[0] * x.shape[1] * (first.numel() + second.numel())


def _triangular(a: Tensor, b: Tensor, *, left: bool = True, **kwargs: Any) -> int:
    # Each right-hand side costs n(n-1)/2 multiply-adds and n divisions: n^2.
    n = a.shape[-1]
    return max(a[..., 0, 0].numel(), b[..., 0, 0].numel()) * n * n * b.shape[-1 if left else -2]


def _lstm(x: Tensor, w_input: Tensor, w_hidden: Tensor, *args: Any, **kwargs: Any) -> int:
    steps = x.shape[0] * x.shape[1]
    return 2 * steps * (w_input.numel() + w_hidden.numel())


def _lstm_backward(x: Tensor, w_input: Tensor, w_hidden: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * _lstm(x, w_input, w_hidden)


KINDS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention", "fused_attention_overrideable")
FUSED_ATTENTION = [getattr(aten, f"_scaled_dot_product_{kind}{end}") for kind in KINDS for end in ("", "_backward")]

#: FLOP formulas by operation for what torch's own table lacks, and for fused attention; each takes the operation's
#: arguments. They stay in gatework: torch's global table is left alone.
FORMULAS: dict[Any, Callable[..., int]] = {
    **{op: _attention(op) for op in FUSED_ATTENTION},
    aten._grouped_mm: _product,
    aten._int_mm: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.vdot: _product,
    aten.addmv: _added_product,
    aten.addmv_: _added_product,
    aten.addmm_: _added_product,
    aten.baddbmm_: _added_product,
    aten.addbmm: _added_product,
    aten.addbmm_: _added_product,
    aten._addmm_activation: _added_product,
    aten.linalg_solve_triangular: _triangular,
    aten._native_multi_head_attention: _attention_layer,
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten.mkldnn_rnn_layer: _lstm,
    aten.mkldnn_rnn_layer_backward: _lstm_backward,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _transposed_product


def _formulas() -> dict[Any, Callable[..., int]]:
    # Torch's formulas take `out_val`; ours look at the arguments only.
    ours = {op: (lambda *args, out_val, _f=f, **kwargs: _f(*args, **kwargs)) for op, f in FORMULAS.items()}
    return dict(flop_registry) | ours


class FlopCount(TorchDispatchMode):
    """What :func:`count_flops` hands out: ``total`` FLOPs so far, and ``by_op`` the same by operation."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()
        self._formulas = _formulas()
        self._plans: dict[Any, Callable[..., int] | bool] = {}

    @property
    def total(self) -> int:
        """FLOPs counted so far."""
        return sum(self.by_op.values())

    def _plan(self, op: Any) -> Callable[..., int] | bool:
        """How an operation is counted: its formula, True to look at what it is made of, False for nothing."""
        packet = getattr(op, "_overloadpacket", op)
        if packet in self._formulas:
            return self._formulas[packet]
        # Under inference_mode composite operations (linear, matmul) arrive whole.
        return isinstance(op, torch._ops.OpOverload) and torch._C._dispatch_has_kernel_for_dispatch_key(
            op.name(), "CompositeImplicitAutograd"
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plan = self._plans.get(func)
        if plan is None:
            plan = self._plans[func] = self._plan(func)
        if plan is True:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        out = func(*args, **kwargs)
        if callable(plan):
            name = getattr(func, "_overloadpacket", func).__name__
            self.by_op[name] += int(plan(*args, **kwargs, out_val=out))
        return out


@contextlib.contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the FLOPs of everything that runs inside the block, forward or backward.

    Example:
        >>> with count_flops() as count:
        ...     y = torch.ones(2, 3) @ torch.ones(3, 5)
        >>> count.total
        60
    """
    count = FlopCount()
    with count:
        yield count


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation inside the block makes, until it dies."""

    supports_higher_order_operators = True

    def __init__(self, known: Iterator[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[Any]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if key not in self._references:
            self._references[key] = weakref.ref(storage, partial(self._forget, key))
        self.live += size - self._sizes.get(key, 0)  # A storage may have been resized.
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, _: Any) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._references.pop(key, None)


@dataclass
class Bytes:
    """What a byte meter hands out: ``total``, right when the block has ended."""

    total: int = 0


@contextlib.contextmanager
def peak_bytes(*known: nn.Module | Tensor) -> Iterator[Bytes]:
    """Peak memory of the block beyond what existed before it, in bytes.

    On a CPU every storage is followed from the operation that makes it to its death: exact and repeatable; what a
    kernel allocates and frees inside itself is not seen. Tensors of ``known`` (modules, tensors) are not counted, even
    where an operation returns them. Where ``known`` is on a GPU the figure is the rise of
    ``torch.cuda.max_memory_allocated`` instead (and resets that peak).
    """
    result = Bytes()
    if _on_cuda(known):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield result
        finally:
            torch.cuda.synchronize()
            result.total = torch.cuda.max_memory_allocated() - before
        return
    live = _LiveBytes(_tensors(known))
    try:
        with live:
            yield result
    finally:
        result.total = live.peak


@contextlib.contextmanager
def saved_bytes(*known: nn.Module | Tensor) -> Iterator[Bytes]:
    """Bytes that the forward passes inside the block keep for their backward passes.

    Every storage that autograd saves counts once and whole (a view keeps all of its storage alive). Storages of
    ``known`` (the model, whose parameters and buffers exist anyway; inputs, if they are somebody else's) do not
    count. Tensors that a custom function hides in attributes of its ``ctx`` are not seen.
    """
    result = Bytes()
    excluded = {tensor.untyped_storage()._cdata for tensor in _tensors(known)}
    seen: dict[int, weakref.ref[Any]] = {}

    def forget(key: int, _: Any) -> None:
        seen.pop(key, None)

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in excluded and key not in seen:
            # A storage that dies gives its address free: the next one there is another.
            seen[key] = weakref.ref(storage, partial(forget, key))
            result.total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield result


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
        elif isinstance(value, State):
            yield from _tensors(vars(value).values())
        elif isinstance(value, Mapping):
            yield from _tensors(value.values())
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value


def _on_cuda(values: Any) -> bool:
    return torch.cuda.is_initialized() and any(tensor.is_cuda for tensor in _tensors(values))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters; one that several modules share counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def active_parameters(module: nn.Module) -> int:
    """Number of parameters that one token uses; a shared one counts once.

    A module with a method ``active_parameters()`` answers for itself and all inside it (a mixture of experts: the
    gate, the shared experts and k of the experts); in all others every parameter is used.
    """
    return _active(module, set())


def _active(module: nn.Module, seen: set[int]) -> int:
    answer = getattr(module, "active_parameters", None)
    if callable(answer):
        new = any(id(parameter) not in seen for parameter in module.parameters())
        seen |= {id(parameter) for parameter in module.parameters()}
        return int(answer()) if new else 0
    total = 0
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            total += parameter.numel()
    return total + sum(_active(child, seen) for child in module.children())


@dataclass
class Cost:
    """What one call of a module costs, as measured; ``str`` prints it.

    Attributes:
        flops: FLOPs that ran, forward, or forward and backward.
        seconds: median wall-clock time of a call.
        peak_bytes: peak memory beyond what existed before the call (parameters, inputs); gradients count.
        saved_bytes: kept from the forward for the backward pass, parameters excluded; 0 for a forward alone.
        parameters: number of parameters.
        active_parameters: number of parameters that one token uses.
        backward: whether the backward pass was measured too.
        flops_by_op: the FLOPs by operation.
        flops_by_module: the FLOPs of the forward pass by submodule path, each with all that is inside it ("" is the
            whole).
        repeats: how many timed calls the median is over.
    """

    flops: int
    seconds: float
    peak_bytes: int
    saved_bytes: int
    parameters: int
    active_parameters: int
    backward: bool
    flops_by_op: dict[str, int] = field(default_factory=dict)
    flops_by_module: dict[str, int] = field(default_factory=dict)
    repeats: int = 1

    def __str__(self) -> str:
        by_op = sorted(self.flops_by_op.items(), key=lambda item: -item[1])[:4]
        shares = ", ".join(f"{name.strip('_')} {100 * flops / self.flops:.0f}%" for name, flops in by_op if flops)
        rows = {
            "FLOPs": f"{_scaled(self.flops).strip()}{f'  ({shares})' if shares else ''}",
            "time": f"{self.seconds * 1e3:.3f} ms  (median of {self.repeats})",
            "peak memory": f"{_scaled(self.peak_bytes)}B",
            "saved": f"{_scaled(self.saved_bytes)}B for the backward pass" if self.backward else "",
            "parameters": f"{_scaled(self.parameters).strip()}  ({_scaled(self.active_parameters).strip()} active per token)",
        }
        head = "forward and backward" if self.backward else "forward"
        return "\n".join([head, *(f"  {name:<12} {value}" for name, value in rows.items() if value)])


def _scaled(number: int) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f} "


def profile(
    module: nn.Module,
    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    backward: bool = False,
    repeats: int = 5,
) -> Cost:
    """Measure what ``module(*inputs)`` costs.

    One call is counted (FLOPs, memory, saved bytes) and serves as the warm-up, then ``repeats`` calls are timed.
    Every call gets its own copy of the inputs, so that a decoding state is not advanced. The module is left as it was
    found: buffers, gradients and the random state are put back, side outputs are taken out.

    Args:
        module: any module, in the mode (training or eval) that is to be measured.
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments.
        backward: also run the backward pass, of the sum of the outputs and of the parts' own losses. Gradients are
            computed for the parameters, and for those inputs that require them: a part inside a model has to pass
            them on, so give it inputs with ``requires_grad``.
        repeats: timed calls; the median is reported.

    Raises:
        ValueError: if ``repeats`` is below 1, or there is nothing to differentiate.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    cuda = _on_cuda([module, inputs])
    devices = list({tensor.device for tensor in _tensors([module, inputs]) if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=devices):
            count, by_module, peak, saved = _counted_call(module, inputs, backward)
            seconds = [_timed_call(module, inputs, backward, cuda) for _ in range(repeats)]
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        losses(module)
        metrics(module)
    return Cost(
        flops=count.total,
        seconds=statistics.median(seconds),
        peak_bytes=peak,
        saved_bytes=saved,
        parameters=count_parameters(module),
        active_parameters=active_parameters(module),
        backward=backward,
        flops_by_op=dict(count.by_op),
        flops_by_module=by_module,
        repeats=repeats,
    )


def _counted_call(module: nn.Module, inputs: Any, backward: bool) -> tuple[FlopCount, dict[str, int], int, int]:
    args, kwargs = _fresh(module, inputs)
    by_module: Counter[str] = Counter()
    starts: list[int] = []
    handles = []
    known: tuple[nn.Module | Tensor, ...] = (module, *_tensors([args, kwargs]))
    with contextlib.ExitStack() as stack:
        peak = stack.enter_context(peak_bytes(*known))
        count = stack.enter_context(count_flops())
        saved = stack.enter_context(saved_bytes(module)) if backward else Bytes()

        def leave(path: str) -> Callable[..., None]:
            def add(*_: Any) -> None:
                by_module[path] += count.total - starts.pop()

            return add

        try:
            for path, part in module.named_modules():
                handles.append(part.register_forward_pre_hook(lambda *_: starts.append(count.total)))
                handles.append(part.register_forward_hook(leave(path)))
            outputs = _forward(module, args, kwargs, backward)
        finally:
            for handle in handles:
                handle.remove()
        if backward:
            _backward(module, outputs)
        del outputs
    return count, dict(by_module), peak.total, saved.total


def _timed_call(module: nn.Module, inputs: Any, backward: bool, cuda: bool) -> float:
    args, kwargs = _fresh(module, inputs)
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = _forward(module, args, kwargs, backward)
    if backward:
        _backward(module, outputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _fresh(module: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call's own copy of the inputs; gradients empty, side outputs taken out."""
    for parameter in module.parameters():
        parameter.grad = None
    losses(module)
    metrics(module)
    if isinstance(inputs, Mapping):
        return (), {name: _copy(value) for name, value in inputs.items()}
    return tuple(_copy(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))), {}


def _copy(value: Any) -> Any:
    if isinstance(value, State):
        copied = object.__new__(type(value))
        copied.__dict__.update({name: _copy(item) for name, item in vars(value).items()})
        return copied
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), value)


def _forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> Any:
    with torch.set_grad_enabled(backward):
        return module(*args, **kwargs)


def _backward(module: nn.Module, outputs: Any) -> None:
    roots = [t for t in tree_iter((outputs, losses(module))) if isinstance(t, Tensor) and t.requires_grad]
    if not roots:
        raise ValueError("nothing to differentiate: no output requires a gradient")
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


__all__ = [
    "FORMULAS", "Bytes", "Cost", "FlopCount", "active_parameters", "count_flops", "count_parameters", "peak_bytes",
    "profile", "saved_bytes",
]
