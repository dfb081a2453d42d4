"""``RecurrentProgram``: programs written in a small language and compiled to the weights of a linear recurrent network.

Petrov et al., Universal In-Context Approximation By Prompting Fully Recurrent Models, 2024, arXiv 2406.01424 (their language is
called LSRL); the official code was read. A :class:`Value` is a vector that a program has at every token. Values are made of the
input by linear maps (sums, multiples, parts, :meth:`Value.map`) and by

    relu(x)                                  max(x, 0)
    linear_state(x, A, B)                    s_t = A s_{t-1} + B x_t, from a start of its own
    product(x, y)                            elementwise; a network without gates has none

Of these the rest is made, with a scale s (1024, or less where less is steep enough) and a large constant L (1e10):

    step(x)           relu(s x) - s relu(x - 1/s): 1 from 1/s on, 0 up to 0
    larger(x, y)      step(x - y)
    both(a, b)        relu(a + b - 1), of values that are 0 or 1
    mod_counter(n)    one-hot of t mod n: a rotation by 2 pi / n, compared with its n directions at the threshold cos(pi / n)
    choose(c, x)      c x; without gates relu(x - L (1 - c)) - relu(-x - L (1 - c))

:class:`RecurrentProgram` compiles. Everything linear is multiplied out; what is left falls into layers, since a state can only be
fed by what lies before it:

    h_t = A h_{t-1} + B v_t + b    u = [v_t, h_t]    v'_t = [relu(R u + r), (P u + p) * (Q u + q), K u]

K carries what a later layer still needs. Weights are in float64 and hold the program exactly. Two programs of the paper are given,
each with gates and without: :func:`table_lookup` and :func:`grid_lookup`. They are why a fixed recurrent network can be every
function, said by its prompt.

Differences: numbers are tensors where the code has symbols, linear maps are multiplied out at once where it simplifies a graph,
and one-hot counters and windows over the last matches stand where its programs count and compare. Scales are
powers of two, where the code takes 1000, so that steps of whole numbers and halves are exact; and as small as will do, since noise
on the weights is multiplied by them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.errors import PartError
from gatework.core.registry import register

#: Slope of a step.
SCALE = 1024.0
#: Of one between whole numbers.
WHOLE = 4.0
#: What the ungated choice adds to what it does not choose.
LARGE = 1e10


class _Atom:
    """A vector that is no linear map of others: the input, a state, or the result of a ReLU or a product."""

    def __init__(self, kind: str, width: int, operands: Sequence[Value] = (), **tensors: Tensor) -> None:
        self.kind, self.width, self.operands, self.tensors = kind, width, tuple(operands), tensors

    def reads(self) -> set[_Atom]:
        return {atom for operand in self.operands for atom in operand.terms}


class Value:
    """A vector at every token: ``sum of matrix atom + bias``. Made by :func:`program_input` and the functions of this module."""

    def __init__(self, terms: dict[_Atom, Tensor], bias: Tensor) -> None:
        self.terms, self.bias = terms, bias

    @property
    def width(self) -> int:
        """Number of channels."""
        return len(self.bias)

    def map(self, matrix: Any, bias: Any = 0.0) -> Value:
        """``matrix value + bias``."""
        a = torch.as_tensor(matrix, dtype=torch.float64)
        if a.dim() != 2 or a.shape[1] != self.width:
            raise PartError(f"a map of {self.width} channels is a matrix with as many columns, not {tuple(a.shape)}")
        shift = torch.as_tensor(bias, dtype=torch.float64)
        return Value({atom: a @ part for atom, part in self.terms.items()}, a @ self.bias + shift)

    def __add__(self, other: Value | float) -> Value:
        if not isinstance(other, Value):
            return Value(self.terms, self.bias + other)
        if other.width != self.width:
            raise PartError(f"values that are added have one width, not {self.width} and {other.width}")
        terms = dict(self.terms)
        for atom, part in other.terms.items():
            terms[atom] = terms[atom] + part if atom in terms else part
        return Value(terms, self.bias + other.bias)

    __radd__ = __add__

    def __mul__(self, factor: float) -> Value:
        return Value({atom: part * factor for atom, part in self.terms.items()}, self.bias * factor)

    __rmul__ = __mul__

    def __neg__(self) -> Value:
        return self * -1.0

    def __sub__(self, other: Value | float) -> Value:
        return self + -other

    def __rsub__(self, other: float) -> Value:
        return -self + other

    def __getitem__(self, channels: slice) -> Value:
        return Value({atom: part[channels] for atom, part in self.terms.items()}, self.bias[channels])

    def sum(self) -> Value:
        """The sum of the channels, one channel."""
        return self.map(torch.ones(1, self.width))

    def repeat(self, width: int) -> Value:
        """A single channel, ``width`` times."""
        return self.map(torch.ones(width, 1))


def _value(atom: _Atom) -> Value:
    return Value({atom: torch.eye(atom.width, dtype=torch.float64)}, torch.zeros(atom.width, dtype=torch.float64))


def program_input(width: int) -> Value:
    """The tokens of a program, of so many channels."""
    return _value(_Atom("input", width))


def relu(x: Value) -> Value:
    """The larger of x and 0."""
    return _value(_Atom("relu", x.width, (x,)))


def product(x: Value, y: Value) -> Value:
    """x times y, channel by channel."""
    if x.width != y.width:
        raise PartError(f"values that are multiplied have one width, not {x.width} and {y.width}")
    return _value(_Atom("product", x.width, (x, y)))


def linear_state(x: Value, a: Any, b: Any = None, start: Any = None) -> Value:
    """``s_t = a s_{t-1} + b x_t``; b is the identity where it is not given, the start 0."""
    matrix = torch.as_tensor(a, dtype=torch.float64)
    fed = x if b is None else x.map(b)
    if matrix.shape != (fed.width, fed.width):
        raise PartError(f"a state of {fed.width} channels moves by a square matrix of that size, not {tuple(matrix.shape)}")
    first = torch.zeros(fed.width, dtype=torch.float64) if start is None else torch.as_tensor(start, dtype=torch.float64)
    return _value(_Atom("state", fed.width, (fed,), matrix=matrix, start=first))


def step(x: Value, scale: float = SCALE) -> Value:
    """1 where x is at least 1 / scale, 0 where it is at most 0, linear between."""
    return relu(x * scale) - relu(x - 1 / scale) * scale


def larger(x: Value, y: Value | float, scale: float = SCALE) -> Value:
    """1 where x is larger than y (by 1 / scale), 0 where it is not."""
    return step(x - y, scale)


def both(x: Value, y: Value) -> Value:
    """1 where x and y, which are 0 or 1, are both 1."""
    return relu(x + y - 1.0)


def equal(x: Value, y: Value | float) -> Value:
    """1 where two whole numbers are equal, 0 where they are not."""
    return both(larger(x, y - 0.5, WHOLE), 1.0 - larger(x, y + 0.5, WHOLE))


def choose(condition: Value, x: Value, gated: bool) -> Value:
    """x where the condition, a single channel or as many as x has, is 1; 0 where it is 0."""
    c = condition.repeat(x.width) if condition.width == 1 else condition
    if gated:
        return product(c, x)
    missed = (1.0 - relu(c)) * LARGE  # Of a value of its own: L times the two halves of a step would round.
    return relu(x - missed) - relu(-x - missed)


def counter(token: Value) -> Value:
    """The number of tokens before this one."""
    return linear_state(token.map(torch.zeros(1, token.width), 1.0), [[1.0]], start=[-1.0])


def mod_counter(token: Value, n: int) -> Value:
    """One-hot, n channels, of the number of tokens before this one modulo n.

    Raises:
        PartError: n below 1.
    """
    if n < 1:
        raise PartError(f"a counter modulo n has n of at least 1, not {n}")
    if n == 1:
        return token.map(torch.zeros(1, token.width), 1.0)
    angles = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    cos, sin = directions[1].tolist()
    before = [cos, -sin]  # One turn before the first direction.
    turning = linear_state(token.map(torch.zeros(2, token.width)), [[cos, -sin], [sin, cos]], start=before)
    threshold = math.cos(math.pi / n)
    scale = 2.0 ** math.ceil(math.log2(2 / (1 - threshold)))
    # The second step makes exactly 1 of what rounding has left beside it; of a value of its own it rounds nothing itself.
    return larger(relu(larger(turning.map(directions), threshold, scale)), 0.5, WHOLE)


def since(token: Value, n: int) -> Value:
    """1 from the token on that has ``n`` tokens before it, 0 before: a 1 moves through a register and stays at its end."""
    register = torch.diag(torch.ones(n), -1) if n else torch.zeros(1, 1)
    register[-1, -1] = 1
    # The first token moves it from a place before the register into the first one.
    before = torch.zeros(n + 2, n + 2)
    before[1:, 1:], before[1, 0] = register, 1
    return linear_state(token.map(torch.zeros(n + 2, token.width)), before, start=torch.eye(n + 2)[0])[-1:]


@register("lsrl", paper="lsrl")
class RecurrentProgram(Component):
    """A program, compiled to layers of a linear recurrence, ReLUs and products.

    ``forward(x (B, T, inputs)) -> (B, T, outputs)``: the value of ``output`` at every token.

    Args:
        output: what the program says, a :class:`Value`.

    Weights are parameters that start frozen (``requires_grad_()`` makes them trainable) and in float64; where L of 1e10 is among
    them, a lower precision forgets what it is added to. A layer's recurrence runs token by token. ``state_size`` says how many
    numbers are kept between tokens, ``gated`` whether there are products.

    Raises:
        PartError: a program without input, or with more than one; inputs of another width.
    """

    family = "mixer"

    def __init__(self, output: Value) -> None:
        super().__init__()
        atoms = _order(output)
        inputs = [atom for atom in atoms if atom.kind == "input"]
        if len(inputs) != 1:
            raise PartError(f"a program has one input, not {len(inputs)}")
        self.inputs = inputs[0].width
        at = _schedule(atoms)
        depth = 1 + max([-1, *(at[atom] for atom in atoms if atom.kind != "input")])
        # Behind which layer an atom is read for the last time; the output is read behind all.
        until = {atom: -1 for atom in atoms}
        for atom in atoms:
            for read in atom.reads():
                until[read] = max(until[read], at[atom])
        for atom in output.terms:
            until[atom] = depth
        stream, layers = inputs, []
        for layer in range(depth):
            here = [atom for atom in atoms if atom.kind != "input" and at[atom] == layer]
            states, relus, products = ([atom for atom in here if atom.kind == kind] for kind in ("state", "relu", "product"))
            carried = [atom for atom in (*stream, *states) if until[atom] > layer]
            layers.append(_Layer(stream, states, relus, products, carried))
            stream = [*relus, *products, *carried]
        self.layers = nn.ModuleList(layers)
        self.weight, self.bias = _parameters(output, stream)

    @property
    def state_size(self) -> int:
        """Numbers that are kept between two tokens."""
        return sum(len(layer.start) for layer in self.layers)  # type: ignore[arg-type,misc]

    @property
    def gated(self) -> bool:
        """Whether a layer multiplies."""
        return any(len(layer.p) > 0 for layer in self.layers)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The sizes."""
        return f"inputs={self.inputs}, outputs={len(self.bias)}, state_size={self.state_size}, gated={self.gated}"

    def forward(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """Run the program on tokens."""
        if x.dim() != 3 or x.shape[-1] != self.inputs:
            raise PartError(f"this program reads tokens of shape (batch, time, {self.inputs}), not {tuple(x.shape)}")
        for layer in self.layers:
            x = layer(x)
        return nn.functional.linear(x, self.weight, self.bias)


class _Layer(nn.Module):
    """One layer; see the module's text for what its weights are."""

    def __init__(
        self, stream: list[_Atom], states: list[_Atom], relus: list[_Atom], products: list[_Atom], carried: list[_Atom]
    ) -> None:
        super().__init__()
        self.a = _frozen(torch.block_diag(*(s.tensors["matrix"] for s in states)) if states else torch.zeros(0, 0))
        self.start = _frozen(torch.cat([torch.zeros(0), *(s.tensors["start"] for s in states)]))
        self.b, self.b_bias = _parameters(_stacked([s.operands[0] for s in states]), stream)
        seen = [*stream, *states]
        self.r, self.r_bias = _parameters(_stacked([atom.operands[0] for atom in relus]), seen)
        self.p, self.p_bias = _parameters(_stacked([atom.operands[0] for atom in products]), seen)
        self.q, self.q_bias = _parameters(_stacked([atom.operands[1] for atom in products]), seen)
        self.k, _ = _parameters(_stacked([_value(atom) for atom in carried]), seen)

    def forward(self, v: Tensor) -> Tensor:
        linear = nn.functional.linear
        if len(self.start):
            fed, h, states = linear(v, self.b, self.b_bias), self.start.expand(len(v), -1), []
            for now in fed.unbind(1):
                h = linear(h, self.a) + now
                states.append(h)
            v = torch.cat([v, torch.stack(states, 1) if states else fed], -1)
        gated = linear(v, self.p, self.p_bias) * linear(v, self.q, self.q_bias)
        return torch.cat([linear(v, self.r, self.r_bias).relu(), gated, linear(v, self.k)], -1)


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.double(), requires_grad=False)


def _stacked(values: list[Value]) -> Value:
    """The channels of several values below each other."""
    width, row = sum(value.width for value in values), 0
    terms: dict[_Atom, Tensor] = {}
    for value in values:
        for atom, part in value.terms.items():
            terms.setdefault(atom, torch.zeros(width, atom.width, dtype=torch.float64))[row : row + value.width] = part
        row += value.width
    return Value(terms, torch.cat([torch.zeros(0, dtype=torch.float64), *(value.bias for value in values)]))


def _parameters(value: Value, stream: list[_Atom]) -> tuple[nn.Parameter, nn.Parameter]:
    """A value's matrix and bias over what stands in the stream."""
    empty = torch.zeros(value.width, 0, dtype=torch.float64)
    parts = [value.terms.get(atom, torch.zeros(value.width, atom.width, dtype=torch.float64)) for atom in stream]
    return _frozen(torch.cat([empty, *parts], 1)), _frozen(value.bias.clone())


def _order(output: Value) -> list[_Atom]:
    """All atoms that the output is made of, each behind those that it reads."""
    found: dict[_Atom, None] = {}
    stack: list[tuple[_Atom, bool]] = [(atom, False) for atom in output.terms]
    while stack:
        atom, ready = stack.pop()
        if ready:
            found.setdefault(atom)
        elif atom not in found:
            stack.append((atom, True))
            stack += [(read, False) for operand in atom.operands for read in operand.terms if read not in found]
    return list(found)


def _schedule(atoms: list[_Atom]) -> dict[_Atom, int]:
    """The first layer in which each atom can be computed: a state reads what earlier layers have, ReLUs and products the states of
    their own layer too."""
    at: dict[_Atom, int] = {}
    for atom in atoms:
        if atom.kind == "input":
            at[atom] = -1
            continue
        same = atom.kind != "state"
        at[atom] = max([0, *(at[read] + (0 if same and read.kind == "state" else 1) for read in atom.reads())])
    return at


def table_lookup(length: int, gated: bool = True) -> RecurrentProgram:
    """A dictionary that is told in the prompt: universal over maps between finite sets of words.

    Tokens are whole numbers from 0 on, one channel. The first ``length`` are the query, then follow keys and values in turn, of
    ``length`` tokens each, any number of them. The output, ``length`` channels, is the value of the key that equals the query, as
    far as it was read; 0 before. Keys have to differ, or the values of equal ones are added.

    Raises:
        PartError: a length below 1.
    """
    token = program_input(1)
    place, phase = mod_counter(token, length), mod_counter(token, 2 * length)
    prompt = since(token, length)
    asked = both(place, (1.0 - prompt).repeat(length))
    word = token.repeat(length)
    eye = torch.eye(length)
    query = linear_state(choose(asked, word, gated), eye)
    wanted = choose(place, query, gated).sum()
    # Matches of the last 2 length tokens, this one first.
    shift = torch.diag(torch.ones(2 * length - 1), -1)
    matches = linear_state(equal(token, wanted), shift, [[1.0]] + [[0.0]] * (2 * length - 1))
    # The j-th token of a value stands behind a key that ended j + 1 tokens ago.
    windows = torch.stack([torch.tensor([float(j < k <= j + length) for k in range(2 * length)]) for j in range(length)])
    hit = larger(matches.map(windows), length - 0.5, WHOLE)
    # The first half of the phase, behind the query, is that of values.
    told = both(both(phase[:length], prompt.repeat(length)), hit)
    return RecurrentProgram(linear_state(choose(told, word, gated), eye))


def grid_lookup(inputs: int, outputs: int, cells: int, gated: bool = True) -> RecurrentProgram:
    """A function on [0, 1]^inputs that is told in the prompt by its values on a grid: universal over continuous functions.

    A token has ``inputs + outputs`` channels. The first one holds the query in its first ``inputs``; each other one the lower
    corner of a cell, whose sides are 1 / cells long, and the value there. The output is the value of the query's cell once it was
    read, 0 before: off by at most what the function changes within a cell. Within 1/1024 of a border two cells overlap.

    Raises:
        PartError: sizes below 1, or cells that the borders fill.
    """
    if min(inputs, outputs, cells) < 1 or cells > SCALE / 4:
        given = f"{inputs}, {outputs} and {cells}"
        raise PartError(f"inputs, outputs and cells are at least 1, cells at most {int(SCALE / 4)}, got {given}")
    token = program_input(inputs + outputs)
    prompt = since(token, 1)
    corner, value = token[:inputs], token[inputs:]
    query = linear_state(choose(1.0 - prompt, corner, gated), torch.eye(inputs))
    inside = step(query - corner) - step(query - corner - 1 / cells)
    within = larger(inside.sum(), inputs - 0.5, WHOLE)
    return RecurrentProgram(linear_state(choose(both(within, prompt), value, gated), torch.eye(outputs)))


@torch.no_grad()
def noise_robustness(
    program: RecurrentProgram,
    right: Callable[[Tensor], Tensor],
    x: Float[Tensor, "B T I"],
    sigmas: Sequence[float],
    trials: int = 5,
    seed: int = 0,
) -> list[float]:
    """The share of right rows with noise N(0, sigma^2) on all weights, for each sigma, over several draws of it.

    Args:
        program: left as it is.
        right: from outputs (B, T, O) whether each row is right (B).
        x: tokens to run it on.
        sigmas: standard deviations.
        trials: draws for each.
        seed: of the noise.
    """
    generator, shares = torch.Generator().manual_seed(seed), []
    for sigma in sigmas:
        total = 0.0
        for _ in range(trials):
            noisy = copy.deepcopy(program)
            for weight in noisy.parameters():
                weight.add_(sigma * torch.randn(weight.shape, dtype=weight.dtype, generator=generator))
            total += float(right(noisy(x)).double().mean())
        shares.append(total / trials)
    return shares
