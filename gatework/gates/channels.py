"""Channel gates in any model: put behind (or before) modules by pattern, folded into their weights, closed channels cut out.

    gates.attach(model, "feedforward.down", "trainable_gate", side="input")    # gates on the hidden units
    ...                                                                        # train
    gates.compact(model)                                                       # closed units are gone, open ones are plain

A gate belongs to one linear layer, convolution or batch norm: it multiplies the module's output channels, or its input channels
before the module sees them. It is a child of that module (``channel_gate``, ``input_gate``) that a hook calls, so that the model's
code, ``copy.deepcopy``, ``pickle`` and ``state_dict`` need nothing special. The module has to be called: whoever reads its weight
instead (``nn.MultiheadAttention`` that of its ``out_proj``) passes the gate by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch.nn.utils import parametrize

from gatework.core.contracts import Activation, ChannelGate
from gatework.core.errors import PartError
from gatework.core.patterns import matches, near
from gatework.core.registry import build

#: Elementwise modules: a channel of zeros stays a channel of one constant.
_ELEMENTWISE = (
    Activation, nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.Mish, nn.ReLU,
    nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh,
)  # fmt: skip
_POOLS = (_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd)
#: The gate of each side, a child of the module under this name.
_CHILD = {"output": "channel_gate", "input": "input_gate"}


def attach(
    model: nn.Module, pattern: str | Sequence[str], gate: Any, side: str = "output"
) -> dict[str, ChannelGate]:
    """Put a channel gate on each module that a pattern names, in place.

    Patterns are those of :func:`gatework.weights.apply`: ``fnmatch`` on the dotted names of the modules and of what is around them,
    from the beginning or any dot on. They take linear layers and convolutions (not transposed), and, for the output, batch norms.
    Where a residual branch is to be gated, name its last layer (``"mixer.o_proj"``, ``"feedforward.down"``). Call it before the
    optimizer is made. Gates of one call that share a target (``trainable_gate``) share it over all their channels.

    Args:
        model: any module.
        pattern: one pattern or several; a module is taken if one of them matches.
        gate: expression or class of the slot ``channel_gate``; each module gets its own, as wide as it has channels.
        side: ``output`` multiplies what the module returns, ``input`` what it is given.

    Returns:
        The gates by the name of their module.

    Raises:
        PartError: no such gate, an instance (modules would share it), a pattern that matches nothing, a module that has a gate on
            that side. The model is then as it was.

    Example:
        >>> from torch import nn
        >>> attach(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), "0", "feature_selection")
        {'0': FeatureSelection(d_model=4, scale=1.0, threshold=0.0)}
    """
    if side not in _CHILD:
        raise PartError(f"side is output or input, not {side!r}")
    if isinstance(gate, nn.Module):
        raise PartError("give the gate as an expression or a class: an instance would be shared by all modules")
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns:
        raise PartError("no pattern is given; '*' takes every module that can have a gate")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if _channels(module, side):
            names.setdefault(module, []).append(name)
    if not names:
        raise PartError(f"this {type(model).__name__} has no linear layer, convolution or batch norm to put a gate on")
    every = [name for some in names.values() for name in some]
    for some in patterns:
        if not any(matches(name, some) for name in every):
            raise PartError(f"{some!r} matches no module of this {type(model).__name__} that can have a gate; {near(some, every)}")
    chosen = {module: known[0] for module, known in names.items() if any(matches(n, p) for n in known for p in patterns)}
    for module, name in chosen.items():
        if _gate(module, side) is not None:
            raise PartError(f"{name} has a gate on its {side} already; gates.fold(model) first makes that permanent")
    made = {name: build(gate, "channel_gate", d_model=_channels(module, side)) for module, name in chosen.items()}
    for module, name in chosen.items():
        weight: Any = module.weight
        module.add_module(_CHILD[side], made[name].to(weight.device, weight.dtype))
        if side == "output":
            module.register_forward_hook(_gate_output)
        else:
            module.register_forward_pre_hook(_gate_input)
        if len(made) > 1 and hasattr(made[name], "group"):
            made[name].group = list(made.values())
    return made


def fold(model: nn.Module) -> list[str]:
    """Multiply the gates of :func:`attach` into the rows (and biases) or columns of their modules and take them away, in place.

    What evaluation computes stays the same up to rounding. The parameters are the same tensors: an optimizer keeps them.

    Returns:
        The names of the modules.

    Raises:
        PartError: there is no gate; a gated weight is parametrized or tied to another module. The model is then as it was.
    """
    gated = _gated(model)
    _check_plain(model, gated.values())
    with torch.no_grad():
        for module in gated.values():
            _fold(module)
    return list(gated)


def compact(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Cut the channels whose gate is 0 out of the model and fold all other gates, in place.

    The output channels of the module before the gate go, with what batch norms hold for them, and the matching inputs of the
    module behind it; where what lies between makes a constant of the zeros (a sigmoid, a batch norm), the bias of the module
    behind takes it over. Evaluation gives what it gave with the gates, and executes less. Of a layer whose gates are all closed
    one channel stays.

    It can cut the hidden units of ``glu``, ``mlp`` and the gated feed-forwards of Llama's kind, and channels between two
    neighbouring linear layers or convolutions of an ``nn.Sequential`` or of a model that says in ``layer_chain`` which modules run
    one after the other (``Classifier`` as ``mlp`` and ``convnet``), with activations, pooling, dropout, batch norm or flattening
    between them. The parameters are new ones: make a new optimizer.

    Returns:
        The channels before and after, by the name of the module that lost them.

    Raises:
        PartError: there is no gate; a closed channel that cannot be cut (:func:`fold` keeps it as zeros); as in :func:`fold`. The
            model is then as it was.
    """
    gated = _gated(model)
    names = {module: name for name, module in model.named_modules()}
    report: dict[str, tuple[int, int]] = {}
    with torch.no_grad():
        links = list(_links(model))
        _check_cuttable(gated, links)
        links = [link for link in links if link.closed.any()]
        _check_plain(model, {*gated.values(), *(module for link in links for module in link.modules)})
        for module in gated.values():
            _fold(module)
        for link in links:
            before = len(link.closed)
            link.cut()
            report |= {names[producer]: (before, before - int(link.closed.sum())) for producer in link.producers}
    return report


# Gates of a module


def _channels(module: nn.Module, side: str) -> int:
    """How many channels a gate on that side has; 0 where there can be none."""
    if isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear):
        return module.out_features if side == "output" else module.in_features
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
        return module.out_channels if side == "output" else module.in_channels
    return module.num_features if isinstance(module, _BatchNorm) and module.affine and side == "output" else 0


def _gate(module: nn.Module, side: str) -> ChannelGate | None:
    found = module._modules.get(_CHILD[side])
    return found if isinstance(found, ChannelGate) else None


def _values(module: nn.Module, side: str) -> Tensor | None:
    gate = _gate(module, side)
    return None if gate is None else gate.values().detach()


def _through(module: nn.Module, side: str, x: Tensor) -> Tensor:
    axis = -1 - len(module.kernel_size) if isinstance(module, _ConvNd) else 1 if isinstance(module, _BatchNorm) else -1
    gate: Any = module._modules[_CHILD[side]]
    out: Tensor = gate(x.movedim(axis, -1)).movedim(-1, axis)
    return out


def _gate_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return _through(module, "output", output)


def _gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return _through(module, "input", args[0]), *args[1:]


def _gated(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have a gate."""
    found = {name: module for name, module in model.named_modules() if any(_gate(module, side) for side in _CHILD)}
    if not found:
        raise PartError(f"there is no channel gate in this {type(model).__name__}; gates.attach puts them in")
    return found


def _check_plain(model: nn.Module, concerned: Iterable[nn.Module]) -> None:
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    names = {module: name for name, module in model.named_modules()}
    found = set(concerned)
    for module in (module for module in model.modules() if module in found):
        if parametrize.is_parametrized(module):
            raise PartError(f"{names[module]} is parametrized, and gates fold into plain weights only; weights.fold comes first")
        if any(owners[id(p)] > 1 for p in module._parameters.values() if p is not None):
            raise PartError(f"{names[module]} shares its weight with another module, which has no such gate; untie them first")


def _fold(module: Any) -> None:
    out, into = _values(module, "output"), _values(module, "input")
    if into is not None:
        if getattr(module, "groups", 1) > 1:  # Each group of rows sees its own group of inputs.
            into = into.view(module.groups, -1).repeat_interleave(module.out_channels // module.groups, 0)
        module.weight.mul_(into.reshape(*into.shape, *[1] * (module.weight.dim() - 2)))
    if out is not None:
        module.weight.mul_(out.view(-1, *[1] * (module.weight.dim() - 1)))
        if module.bias is not None:
            module.bias.mul_(out)
    for hooks, function, side in (
        (module._forward_hooks, _gate_output, "output"), (module._forward_pre_hooks, _gate_input, "input"),
    ):  # fmt: skip
        for key in [key for key, hook in hooks.items() if hook is function]:
            del hooks[key]
        module._modules.pop(_CHILD[side], None)


# What can be cut


@dataclass
class _Link:
    """Channels that run from producers (whose outputs meet channel by channel) to one consumer.

    ``closed``: those that carry ``constants``, whatever the input is. A linear consumer behind a flattened convolution has several
    ``positions`` for each.
    """

    producers: list[Any]
    consumer: Any
    closed: Tensor
    constants: Tensor
    norms: list[Any] = field(default_factory=list)
    positions: int = 1

    @property
    def modules(self) -> list[Any]:
        return [*self.producers, *self.norms, self.consumer]

    def cut(self) -> None:
        if self.closed.all():  # A convolution without a channel is none.
            self.closed[0] = False
        keep = ~self.closed
        columns = keep.repeat_interleave(self.positions)
        weight, constants = self.consumer.weight, self.constants.repeat_interleave(self.positions)
        if constants[~columns].any():
            bias = weight.flatten(2).sum(-1) if weight.dim() > 2 else weight
            bias = bias[:, ~columns] @ constants[~columns]
            if self.consumer.bias is None:
                self.consumer.bias = nn.Parameter(torch.zeros_like(bias), requires_grad=weight.requires_grad)
            self.consumer.bias += bias
        _keep(self.consumer, ["weight"], columns, axis=1)
        for producer in self.producers:
            _keep(producer, ["weight", "bias"], keep)
        for norm in self.norms:
            _keep(norm, ["weight", "bias", "running_mean", "running_var"], keep)
            norm.num_features = len(norm.weight)
        for module in (*self.producers, self.consumer):
            rows, inputs = module.weight.shape[:2]
            if isinstance(module, nn.Linear):
                module.out_features, module.in_features = rows, inputs
            else:
                module.out_channels, module.in_channels = rows, inputs


def _keep(module: Any, names: Sequence[str], keep: Tensor, axis: int = 0) -> None:
    index = keep.nonzero()[:, 0]
    for name in names:
        old = getattr(module, name)
        if isinstance(old, nn.Parameter):
            setattr(module, name, nn.Parameter(old.index_select(axis, index), requires_grad=old.requires_grad))
        elif old is not None:
            setattr(module, name, old.index_select(axis, index))


def _links(model: nn.Module) -> Iterator[_Link]:
    """All pairs between which channels could be cut, with what is closed; a module lies in one chain at most."""
    seen: set[nn.Module] = set()
    for module in model.modules():
        part: Any = module
        name = getattr(part, "part_name", None)
        if name == "glu":
            function = part.activation.gate if part.order == 1 else part.activation
            yield _gated_unit(part.gate, part.up, part.down, function)
        elif set(part._modules) == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
            yield _gated_unit(part.gate_proj, part.up_proj, part.down_proj, part.act_fn)
        elif name == "mlp":
            yield from _chain([part.up, part.activation, part.down])
        elif hasattr(part, "layer_chain"):
            yield from _chain(list(_flat(part.layer_chain, seen)))
        elif type(part) is nn.Sequential and part not in seen:
            yield from _chain(list(_flat(part, seen)))


def _flat(modules: Iterable[nn.Module], seen: set[nn.Module]) -> Iterator[nn.Module]:
    for module in modules:
        if type(module) is nn.Sequential:
            seen.add(module)
            yield from _flat(module, seen)
        else:
            yield module


def _gated_unit(gate: Any, up: Any, down: Any, function: Any) -> _Link:
    """Hidden units ``f(gate(x)) * up(x)``: 0 where one of the two factors is."""
    zeros = down.weight.new_zeros(down.in_features)
    closed = zeros.bool()
    for values in (_values(up, "output"), _values(down, "input")):
        closed = closed if values is None else closed | (values == 0)
    values = _values(gate, "output")
    if values is not None:
        closed = closed | ((values == 0) & (function(zeros) == 0))
    return _Link([gate, up], down, closed, zeros)


def _chain(steps: list[Any]) -> Iterator[_Link]:
    for i, step in enumerate(steps):
        if isinstance(step, nn.Linear | _ConvNd) and steps.count(step) == 1:
            end = next((j for j in range(i + 1, len(steps)) if isinstance(steps[j], nn.Linear | _ConvNd)), None)
            if end is not None and steps.count(steps[end]) == 1:
                link = _between(step, steps[i + 1 : end], steps[end])
                if link is not None:
                    yield link


def _between(producer: Any, steps: list[Any], consumer: Any) -> _Link | None:
    """The link from one module to the next, None where the channels do not survive what is between."""
    if not (_channels(producer, "output") and _channels(consumer, "input")):
        return None
    channels = len(producer.weight)
    convolution = isinstance(producer, _ConvNd)
    constants = producer.weight.new_zeros(channels)
    closed, norms, flat, bordered = constants.bool(), [], not convolution, False

    def close(gates: Tensor | None) -> None:
        if gates is not None:
            constants[(gates == 0) & ~closed] = 0
            closed.logical_or_(gates == 0)

    close(_values(producer, "output"))
    for step in steps:
        if isinstance(step, _BatchNorm) and step.num_features == channels and step.running_mean is not None:
            gates = _values(step, "output")
            args = step.running_mean, step.running_var, step.weight, step.bias
            constants = F.batch_norm(constants[None], *args, False, 0.0, step.eps)[0]
            constants = constants if gates is None else constants * gates
            close(gates)
            norms.append(step)
        elif isinstance(step, nn.Flatten) and (step.start_dim, step.end_dim) == (1, -1):
            flat = True
        elif isinstance(step, _ELEMENTWISE):
            training = step.training
            constants = step.eval()(constants)
            step.train(training)
        elif isinstance(step, _POOLS) and flat:
            return None  # Pools what is no position any more.
        elif isinstance(step, _AvgPoolNd):
            # Zeros beyond the border enter the mean.
            padding = step.padding if isinstance(step.padding, tuple) else (step.padding,)
            bordered |= any(padding) and bool(constants[closed].any())
        elif not isinstance(step, (_DropoutNd, *_POOLS)):
            return None
    positions = 1
    if isinstance(consumer, nn.Linear):
        positions, rest = divmod(consumer.in_features, channels)
        if not flat or rest or (positions > 1 and not convolution):
            return None
    elif not convolution or producer.groups > 1 or consumer.groups > 1 or consumer.in_channels != channels:
        return None
    elif consumer.padding_mode == "zeros" and any(consumer._reversed_padding_repeated_twice):
        bordered |= bool(constants[closed].any())
    if convolution and producer.groups > 1:
        return None
    if bordered:
        return None
    gates = _values(consumer, "input")
    close(None if gates is None else gates.view(channels, positions).abs().amax(1))
    return _Link([producer], consumer, closed, constants, norms, positions)


def _check_cuttable(gated: dict[str, nn.Module], links: list[_Link]) -> None:
    for name, module in gated.items():
        for side in _CHILD:
            values = _values(module, side)
            if values is None or values.all():
                continue
            closed = torch.zeros_like(values, dtype=torch.bool)
            for link in links:
                if (module in link.producers or module in link.norms) if side == "output" else module is link.consumer:
                    closed |= link.closed.repeat_interleave(link.positions if side == "input" else 1)
            whole = (values == 0) & ~closed
            if whole.any() and not (side == "input" and any(link.consumer is module and link.positions > 1 for link in links)):
                raise PartError(
                    f"compact cannot cut {name}: its {side} channels do not run between two neighbouring linear layers or "
                    "convolutions through elementwise and pooling modules alone (nor turn from zeros to other constants before a "
                    "padded one); gates.fold keeps them as zeros"
                )


__all__ = ["attach", "compact", "fold"]
