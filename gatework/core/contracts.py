"""What every part is: one contract per kind of part.

Shapes: B batch, T time, D model width, N tokens (B*T), E experts, k slots per token.

A part is an ``nn.Module`` that fills a *slot* of a model (``gate``, ``mixer``, ...). Its class says, as data, what it
can do (``capabilities``), and its ``forward`` may leave **side outputs**: ``self.losses["name"]`` (already weighted,
to be added to the objective) and ``self.metrics["name"]`` (detached). Assign whole dictionaries (``self.losses =
{"z": loss}``): a fresh dictionary per call neither goes stale nor makes ``torch.compile`` guard on the last one.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.routing import Routing


@dataclass(frozen=True)
class No:
    """The answer "no" to a capability, with its reason; false in a condition."""

    reason: str

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"no: {self.reason}"


#: What a part may say of itself, by name, with its meaning.
CAPABILITIES: dict[str, str] = {
    "causal": "position t never sees a later position",
    "decodes": "with a state, fed whole, in pieces or token by token, it gives the same outputs",
    "packs": "`segments` keeps packed documents apart: packed equals separate",
    "batch_invariant": "a row's output does not depend on the other rows of the batch",
    "keeps": "`keep` computes outputs for the kept tokens only, and the clock shows it",
    "compiles": "`torch.compile(fullgraph=True)` equals eager, and a second call of the same shape does not recompile",
    "float64": "runs in float64",
    "any_length": "runs at any sequence length, not one fixed when built",
    "separable": "each parameter steps by its own gradients alone, as if it had an optimizer to itself",
}


class Part(nn.Module, ABC):
    """The base of every part that is a module: slot, capabilities and side outputs.

    ``slot`` is the place in a model that the part fills; ``family`` the folder that holds it (the slot's name, unless
    the class says otherwise). ``slots`` names constructor parameters that take a part expression and are not called
    after their slot. ``example`` holds constructor arguments for the smallest sensible instance, where the defaults
    are too large for a test. ``exact`` names floating buffers that a half-precision model keeps in float32 (their steps
    would vanish there). ``fades`` names parameters that a schedule freezes: their gradient becomes exactly 0.
    """

    slot: ClassVar[str] = ""
    family: ClassVar[str] = ""
    capabilities: dict[str, bool | No] = {"compiles": True, "float64": True, "batch_invariant": True}
    slots: ClassVar[Mapping[str, str]] = {}
    example: ClassVar[Mapping[str, Any]] = {}
    exact: ClassVar[tuple[str, ...]] = ()
    fades: ClassVar[tuple[str, ...]] = ()
    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.losses = {}
        self.metrics = {}

    def __getstate__(self) -> dict[str, Any]:
        # Side outputs belong to one forward pass: a copy of the part starts without them (they may hold a graph).
        return self.__dict__ | {"losses": {}, "metrics": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        before = {name: getattr(self, name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype.itemsize < min(buffer.dtype.itemsize, 4):
                setattr(self, name, buffer.to(device=after.device, dtype=torch.float32))
        return self


class Activation(Part):
    """An elementwise function: ``forward(x) -> y`` for any shape and any floating dtype, y of x's shape and dtype."""

    slot = family = "activation"

    @abstractmethod
    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the function to every element."""

    def gated(self, halves: Float[Tensor, "*B H2"]) -> Float[Tensor, "*B H"]:
        """Of the two halves of the last axis, the second times the activation of the first (a gated linear unit)."""
        gate, value = halves.chunk(2, -1)
        return self(gate) * value


class Gate(Part):
    """Who is chosen: maps tokens to a :class:`Routing`.

    A gate is built with ``d_model`` and ``n_experts``. Routing is computed in float32 (float64 stays float64)
    whatever the autocast dtype is. A token whose ``mask`` is False gets weights of exactly 0 and enters no statistic
    and no loss.

    A gate that chooses by more than the token names it in ``conditions``: keyword arguments of ``forward`` after
    ``mask``, tensors with one row per token, which an experts layer hands on from its own ``forward``. It raises
    ``PartError`` where one is missing. A gate that does not look at its tokens has ``static`` set.
    """

    slot = family = "gate"
    conditions: ClassVar[tuple[str, ...]] = ()
    static: bool = False

    @abstractmethod
    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""


class Balance(Part):
    """What keeps the experts of a gate evenly used: a loss, or a shift of the scores that the choice is made by.

    The gate that owns a term adds its loss to its own ``losses``, under the term's registered name. It calls
    ``forward`` in training only, also where activation checkpointing recomputes (``in_backward``). A term that needs
    more than the routing names it in ``conditions``: keyword arguments of ``forward``, which the gate must offer.
    """

    slot = "balance"
    family = "gate"
    conditions: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def forward(self, routing: Routing, mask: Bool[Tensor, "N"] | None = None) -> Float[Tensor, ""] | None:
        """The weighted loss of a routing; None where the term has none. Tokens whose ``mask`` is False do not count."""

    def shift(self, scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """The scores that the choice is made by; the weights are made of the scores as they were."""
        return scores


class ChannelGate(Part):
    """One gate per channel, the same for all tokens: ``forward(x) -> x * gate``, along the last axis of length ``d_model``."""

    slot = "channel_gate"
    family = "gate"

    @abstractmethod
    def values(self) -> Float[Tensor, "D"]:
        """The gates that evaluation multiplies with."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Scale every channel."""


class Component(Part):
    """A part that fills no slot of the backbones: what ``forward`` takes is its own, and its docstring says it.

    Subclasses say their ``family``.
    """

    slot = "component"


class FeedForward(Part):
    """A token-wise (channel) mixer: acts on each token alone, whatever the leading dimensions are.

    ``mask`` marks real tokens; only parts that keep statistics or route need it. A part that holds its own norm and
    residual sets
    ``owns_residual``: it then takes the residual stream and returns the new one, and the block adds nothing around it.
    """

    slot = family = "feedforward"
    owns_residual: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Transform every token."""


class Experts(FeedForward):
    """A feed-forward made of experts of which a gate chooses; it fills the ``feedforward`` slot."""

    family = "experts"


@dataclass
class State:
    """What a sequence mixer carries from one call to the next while decoding; every tensor's first axis is the batch.

    ``forward`` updates it in place (it assigns or writes into the fields). Subclasses are dataclasses of tensors,
    nested states, lists of them, or ``None``.
    """

    def reorder(self, index: Int[Tensor, "B2"]) -> None:
        """Keep the sequences ``index`` of the batch, in that order (beam search, or dropping finished rows)."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, _select(getattr(self, field.name), index))

    @property
    def batch_size(self) -> int:
        """How many sequences it holds."""
        sizes = (_rows(getattr(self, field.name)) for field in dataclasses.fields(self))
        return next((size for size in sizes if size is not None), 0)

    @property
    def keeps(self) -> bool:
        """Whether a call leaves something in it, so that it cannot be made a second time with the same state."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes held by all tensors."""
        return sum(_nbytes(getattr(self, field.name)) for field in dataclasses.fields(self))


def _select(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    if isinstance(value, State):
        value.reorder(index)
    elif isinstance(value, list):
        return [_select(item, index) for item in value]
    return value


def _rows(value: Any) -> int | None:
    if isinstance(value, Tensor):
        return value.shape[0]
    if isinstance(value, State):
        return value.batch_size
    if isinstance(value, list):
        return next((size for size in map(_rows, value) if size is not None), None)
    return None


def _nbytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, State):
        return value.nbytes
    if isinstance(value, list):
        return sum(map(_nbytes, value))
    return 0


class SequenceMixer(Part):
    """Mixes along time: ``forward(x_BTD) -> y_BTD``, causal unless its capabilities say otherwise.

    Without ``state`` it is the parallel (training) form. With a ``state`` from :meth:`init_state`, feeding a sequence
    whole, in pieces or token by token gives the same outputs, and ``forward`` updates the state in place.

    - ``mask`` (True = real token): padding on either side never changes a real token's output; outputs at padding are
      finite and otherwise unspecified.
    - ``segments`` (one id per token, equal ids contiguous): packed documents stay apart; training form only (no
      ``state``).
    - ``keep`` (True = compute): the state and the keys see every token, but outputs are computed for the kept tokens
      only and are exactly 0 elsewhere. A mixer with the ``keeps`` capability really skips the rest (query and output
      projections, scores).
    """

    slot = family = "mixer"
    capabilities = Part.capabilities | {
        "causal": True, "decodes": True, "packs": True, "keeps": True, "any_length": True,
    }

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence."""

    @abstractmethod
    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """An empty state; dtype and device default to the parameters'."""

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps per sequence after ``length`` tokens, in the parameters' dtype."""


@dataclass
class DepthState(State):
    """The states of the blocks of a stack, in order."""

    layers: list[State]


class DepthPolicy(Part):
    """How a stack of blocks is executed; it owns the blocks: ``policy = Policy(blocks, ...)``, ``policy(x) -> x``.

    What a policy skips is not computed. Its docstring says how decoding state stays valid for the tokens that skipped
    a layer: token by token equals the parallel form under the same decisions.
    """

    slot = family = "depth"
    capabilities = Part.capabilities | {"decodes": True, "packs": True}

    @abstractmethod
    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the residual stream through the blocks."""

    @abstractmethod
    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """An empty decoding state for all blocks."""

    @abstractmethod
    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps per sequence after ``length`` tokens, all blocks together."""


class Weight(Part):
    """Where weights come from: a ``torch.nn.utils.parametrize`` module that makes the weight a model uses from what it stores.

    An instance is a recipe. ``gatework.weights.apply`` asks :meth:`bind` for one parametrization per weight; each is then
    called with what its weight is made from whenever the model reads the weight.

    A weight of more than two axes is either one matrix whose rows lie along the first axis (a convolution) or a stack of
    matrices (experts); ``stacked`` is the number of leading axes that stack.
    """

    slot = family = "weight"
    stacked: int = 0

    def bind(self, weights: Sequence[Tensor], stacked: Sequence[int]) -> list[tuple[Weight, Tensor]]:
        """For each of these weights its parametrization and what is stored from now on: here a copy of this part and the
        weight itself."""
        bound = []
        for weight, axes in zip(weights, stacked, strict=True):
            part = copy.deepcopy(self)
            part.stacked = axes
            bound.append((part, weight))
        return bound

    @abstractmethod
    def forward(self, stored: Tensor) -> Tensor:
        """The weight that the model uses, of the stored tensor's dtype; differentiable."""

    def pack(self, stored: Tensor) -> tuple[nn.Module, Tensor]:
        """The small form: a parametrization that gives the same weight, and what it is called with.

        Raises:
            PartError: the method has no packed form.
        """
        raise PartError(f"{type(self).__name__} has no packed form; weights.fold makes its weights permanent")


def capability(part: type | object, name: str) -> bool | No:
    """Whether ``part`` has the capability, with the reason where it has not.

    A class answers for its usual settings. An instance whose settings take a capability away has ``capabilities`` of its own.
    """
    if name not in CAPABILITIES:
        raise KeyError(f"no capability {name!r}; there are {', '.join(CAPABILITIES)}")
    cls = part if inspect.isclass(part) else type(part)
    answers: Mapping[str, bool | No] = getattr(part, "capabilities", {})
    return answers.get(name, No(f"{cls.__name__} has no such notion"))


def losses(model: nn.Module) -> dict[str, Tensor]:
    """Hand out the losses that the last forward pass left in a model, by path; each value is handed out once.

    Add their sum to the objective. Taking them out keeps a part that the next pass skips from offering a stale loss.
    """
    return _take(model, "losses")


def metrics(model: nn.Module) -> dict[str, Tensor]:
    """Hand out the (detached) metrics that the last forward pass left in a model, by path; each value is handed out
    once."""
    return _take(model, "metrics")


def _take(model: nn.Module, attribute: str) -> dict[str, Tensor]:
    taken: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        values = getattr(module, attribute, None)
        if isinstance(module, Part) and values:
            taken |= {f"{path}.{name}".lstrip("."): value for name, value in values.items()}
            setattr(module, attribute, {})
    return taken


def advance(model: nn.Module, step: int, total_steps: int) -> None:
    """Move every schedule inside the parts (temperatures, balance biases, phases); call it once after each optimizer
    step.

    ``step`` counts finished optimizer steps from 1; each part that has a schedule implements ``advance(step,
    total_steps)``. In distributed training every rank calls it: parts may add up what the ranks have counted.
    """
    for module in model.modules():
        move = getattr(module, "advance", None)
        if callable(move):
            move(step, total_steps)


def decay_groups(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters to use with and without weight decay, in the model's order: decay is for matrices (and tensors of
    more axes) that no module names in a tuple ``no_weight_decay``."""
    spared = set()
    for module in model.modules():
        names = getattr(module, "no_weight_decay", ())
        spared |= {id(getattr(module, name)) for name in names} if isinstance(names, tuple) else set()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for p in model.parameters():
        if p.requires_grad:
            (decayed if p.ndim >= 2 and id(p) not in spared else others).append(p)
    return decayed, others


def in_backward() -> bool:
    """Whether this code runs inside a backward pass, that is, as the recomputation of activation checkpointing.

    Statistics that accumulate over calls ask this, so that they count each token once.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


__all__ = [
    "CAPABILITIES", "Activation", "Balance", "ChannelGate", "Component", "DepthPolicy", "DepthState", "Experts", "FeedForward",
    "Gate", "No", "Part", "SequenceMixer", "State", "Weight", "advance", "capability", "decay_groups", "in_backward", "losses",
    "metrics",
]
