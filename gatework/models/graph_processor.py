"""``GraphProcessor``: runs an algorithm on graphs step by step, and says the algorithm's state after every step.

Encode, process, decode (Veličković et al., The CLRS Algorithmic Reasoning Benchmark, 2022, arXiv 2205.15659). The state after a
step is called its hints: for each node of a graph

- ``bfs`` (breadth-first search): whether it was reached;
- ``bellman_ford`` (shortest paths): whether it was reached, at which distance, and from which node;
- ``dfs`` (depth-first search): whether it was reached, whether the search stands there, and from which node it was reached.

Step t, from the hints of the last one as the model itself has decoded them (their probabilities, where they are classes):

    z_v = E [source_v, position_v, hints_v]            h' = h_{t-1}, g * h_{t-1}, or nothing (``memory``)
    h_t, m = MaxMessagePassing([z, h'], [weight_vu, u = v, pointer_vu, pointer_uv])    along edges, and from each node to itself
    hints_v = D h_{t,v}    pointer_vu = p . m_vu

The position of node i of n is i / n, which orders a node's neighbours and settles ties. Hints are never replaced by the true ones,
in training neither, so that both are one computation.

``memory`` is that of Bohde et al., On the Markov Property of Neural Algorithmic Reasoning, 2024, arXiv 2403.04929:
:class:`gatework.gates.g_forgetnet.GForgetNet`.

:func:`compile_algorithm` sets the weights by hand (Saldyt and Kambhampati, Mind The Gap: Deep Learning Doesn't Learn Deeply, 2025,
arXiv 2505.18623), so that the model runs breadth-first search or Bellman and Ford's algorithm exactly, in float32, on graphs of any
size. The algorithms' own steps are in :func:`run_algorithm`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.gates.g_forgetnet import GForgetNet
from gatework.mixers.max_message_passing import MaxMessagePassing

Algorithm = Literal["bfs", "bellman_ford", "dfs"]
#: The hints of a node, in the order of the channels; ``pointer`` comes last and has a channel for each node.
HINTS: dict[str, tuple[str, ...]] = {
    "bfs": ("reached",),
    "bellman_ford": ("reached", "distance", "pointer"),
    "dfs": ("reached", "current", "pointer"),
}
#: Weights of edges are multiples of it, from it to 1.
WEIGHT_STEP = 1 / 16
#: What compiled weights take for the distance of a node that was not reached.
INFINITY = 1e4


class GraphProcessor(nn.Module):
    """The steps of an algorithm on graphs, by messages that are aggregated by max.

    ``forward(x (B, n, n + 1)) -> (B, steps, n, C)``. ``x[:, v, u]`` is the weight of the edge from u to v, 0 where there is none;
    the last channel is 1 for the source and 0 elsewhere. The outputs are logits, but for distances; C is 1 for ``bfs`` and 2 + n
    for the others, channel 2 + u being the logit of the pointer to u (minus infinity where there is no edge). ``steps`` is n - 1,
    and 2 (n - 1) for ``dfs``.

    Args:
        algorithm: which hints there are.
        d_model: width of encodings, messages and states.
        d_ff: hidden width of the message-passing round; None is ``d_model``.
        memory: what a step sees of the last one's state h beside the hints: ``full``, ``gated`` or ``none``.
        penalty: weight of the mean gate in the objective, for ``gated``.

    Initialisation: PyTorch's for linear layers; the gate as its part says.

    Raises:
        PartError: no such algorithm or memory, sizes below 1, inputs that are no graphs.

    Example:
        >>> x = torch.zeros(1, 3, 4)
        >>> x[0, 0, 1] = x[0, 1, 0] = x[0, 0, 3] = 1
        >>> GraphProcessor("bfs", d_model=8)(x).shape
        torch.Size([1, 2, 3, 1])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("algorithm",)

    def __init__(
        self,
        algorithm: str,
        d_model: int = 32,
        d_ff: int | None = None,
        memory: Literal["full", "gated", "none"] = "full",
        penalty: float = 0.1,
    ) -> None:
        super().__init__()
        if algorithm not in HINTS:
            raise PartError(f"the algorithms are {', '.join(HINTS)}, not {algorithm!r}")
        if memory not in ("full", "gated", "none"):
            raise PartError(f"memory is full, gated or none, not {memory!r}")
        self.algorithm, self.hints, self.memory, self.d_model = algorithm, HINTS[algorithm], memory, d_model
        self.points = "pointer" in self.hints
        self.scalars = len(self.hints) - self.points
        try:
            self.encode = nn.Linear(2 + self.scalars, d_model)
            width = d_model if memory == "none" else 2 * d_model
            self.process = MaxMessagePassing(width, 2 + 2 * self.points, d_model, d_ff)
            self.gate = GForgetNet(d_model, d_model, penalty) if memory == "gated" else None
        except (ValueError, RuntimeError) as error:
            raise PartError(f"the sizes d_model {d_model} and d_ff {d_ff} or the penalty {penalty} do not fit: {error}") from error
        self.decode = nn.Linear(d_model, self.scalars)
        self.point = nn.Linear(d_model, 1, bias=False) if self.points else None

    def extra_repr(self) -> str:
        """The settings."""
        return f"algorithm={self.algorithm}, memory={self.memory}"

    def forward(self, x: Float[Tensor, "B n N"]) -> Float[Tensor, "B steps n C"]:
        """The hints after every step."""
        return self.run(x)[0]

    def run(self, x: Float[Tensor, "B n N"]) -> tuple[Float[Tensor, "B steps n C"], Float[Tensor, "B steps n D"]]:
        """The hints, and the states h, after every step."""
        if x.dim() != 3 or x.shape[2] != x.shape[1] + 1 or x.shape[1] < 2:
            raise PartError(f"graphs are (batch, n, n + 1) with n of at least 2, not {tuple(x.shape)}")
        weights, source = x[..., :-1], x[..., -1]
        batch, nodes = source.shape
        own = torch.eye(nodes, dtype=x.dtype, device=x.device).expand(batch, -1, -1)
        linked = (weights != 0) | (own != 0)
        position = (torch.arange(nodes, device=x.device, dtype=x.dtype) / nodes).expand_as(source)
        scalars = [source, torch.zeros_like(source) if self.algorithm == "bellman_ford" else source][: self.scalars]
        pointer, h = own, x.new_zeros(batch, nodes, self.d_model)
        said, states, opened = [], [], []
        for _ in range(steps(self.algorithm, nodes)):
            z = self.encode(torch.stack([source, position, *scalars], -1))
            seen = [z]
            if self.gate is not None:
                gates = self.gate.values(z, h)
                opened.append(gates.float().mean() if gates.dtype.itemsize < 4 else gates.mean())
                seen.append(gates * h)
            elif self.memory == "full":
                seen.append(h)
            edges = [weights, own, *([pointer, pointer.mT] if self.points else [])]
            h, messages = self.process(torch.cat([part.to(z.dtype) for part in seen], -1), torch.stack(edges, -1), linked)
            channels = self.decode(h)
            scalars = list(channels.unbind(-1))
            scalars[0] = scalars[0].sigmoid()
            if self.algorithm == "dfs":
                scalars[1] = scalars[1].softmax(-1)
            if self.point is not None:
                logits = self.point(messages)[..., 0].masked_fill(~linked, -torch.inf)
                pointer = logits.softmax(-1).to(x.dtype)
                channels = torch.cat([channels, logits], -1)
            scalars = [value.to(x.dtype) for value in scalars]
            said.append(channels)
            states.append(h)
        if self.gate is not None:
            self.gate.penalise(torch.stack(opened).mean())
        return torch.stack(said, 1), torch.stack(states, 1)


def steps(algorithm: str, nodes: int) -> int:
    """How many steps end the algorithm on any graph of so many nodes."""
    return (2 if algorithm == "dfs" else 1) * (nodes - 1)


def run_algorithm(algorithm: str, x: Float[Tensor, "B n N"]) -> Float[Tensor, "B steps n H"]:
    """The hints of the algorithm itself on graphs ``x`` (as :class:`GraphProcessor` is given them) after every step.

    The channels are those of :data:`HINTS`, of which ``pointer`` is one, the number of a node. ``reached`` and ``current`` are 0 or
    1; a distance is 0 where the node was not reached; the source, and a node that was not reached, point to themselves.

    A step reaches all neighbours of the reached nodes (``bfs``), relaxes all edges at once, where of equally near predecessors the
    first counts (``bellman_ford``), or goes from the current node to its first neighbour that was not reached, or, where it has
    none, back to where it was reached from (``dfs``).
    """
    if algorithm not in HINTS:
        raise PartError(f"the algorithms are {', '.join(HINTS)}, not {algorithm!r}")
    weights, source = x[..., :-1], x[..., -1] != 0
    batch, nodes = source.shape
    linked, own = weights != 0, torch.arange(nodes, device=x.device).expand(batch, -1)
    reached, said = source, []
    distance = torch.zeros_like(x[..., -1]).masked_fill(~source, torch.inf)
    pointer, rows, current = own, torch.arange(batch, device=x.device), source.long().argmax(1)
    for _ in range(steps(algorithm, nodes)):
        if algorithm == "bfs":
            reached = reached | (linked & reached[:, None]).any(2)
            said.append(reached[..., None].to(x.dtype))
        elif algorithm == "bellman_ford":
            through = (distance[:, None] + weights).masked_fill(~linked, torch.inf)
            nearest = through.amin(2)
            first = (through == nearest[..., None]).long().argmax(2)
            pointer = torch.where(source | nearest.isinf(), own, first)
            distance = torch.minimum(distance, nearest)
            reached = distance.isfinite()
            said.append(torch.stack([reached.to(x.dtype), distance.masked_fill(~reached, 0), pointer.to(x.dtype)], -1))
        else:
            free = linked[rows, :, current] & ~reached
            onward, found = free.long().argmax(1), free.any(1)
            pointer = torch.where(found[:, None] & (own == onward[:, None]), current[:, None], pointer)
            current = torch.where(found, onward, pointer[rows, current])
            here = own == current[:, None]
            reached = reached | here
            said.append(torch.stack([reached.to(x.dtype), here.to(x.dtype), pointer.to(x.dtype)], -1))
    return torch.stack(said, 1)


@torch.no_grad()
def compile_algorithm(model: GraphProcessor) -> GraphProcessor:
    """Set the weights so that the model runs its algorithm exactly; returns the model.

    Breadth-first search: m_vu says whether u was reached, of which the maximum is the new hint. Bellman and Ford's algorithm:
    m_vu = -(d_u + weight_vu), with 1e4 for d_u where u was not reached, of which the maximum is minus the new distance; a second
    channel, 1/32 less from a node to itself and at most 1/64 less for a later position, is what the pointer is read off. Channels
    that an algorithm does not need, the memory among them, have weights of 0, and values pass a ReLU in two halves,
    relu(a) - relu(-a).

    Logits are so large that the loss on the trace has a gradient of exactly 0 there. Weights of edges are taken for multiples of
    1/16 up to 1.

    Raises:
        PartError: for ``dfs``, and for a model narrower than 4 (d_model) and 8 (d_ff; 2 and 2 for ``bfs``).
    """
    process = model.process
    d_ff, wanted = process.pair.out_features, {"bfs": (2, 2), "bellman_ford": (4, 8)}
    if model.algorithm not in wanted:
        raise PartError(f"bfs and bellman_ford can be compiled, {model.algorithm} cannot")
    if model.d_model < wanted[model.algorithm][0] or d_ff < wanted[model.algorithm][1]:
        narrow, hidden = wanted[model.algorithm]
        raise PartError(f"{model.algorithm} compiles into d_model >= {narrow} and d_ff >= {hidden}, not {model.d_model} and {d_ff}")
    for name, parameter in model.named_parameters():
        if not name.startswith("gate."):
            parameter.zero_()
    edge = 2 * process.inputs  # The first column of W_e: the weight; then whether u = v.
    to_itself = edge + 1
    if model.algorithm == "bfs":
        model.encode.weight[0, 2] = 1  # z_0: reached.
        process.pair.weight[0, 0] = 1
        process.message.weight[0, 0] = 1
        process.node.weight[0, process.inputs] = 1
        process.out.weight[0, 0] = 1
        model.decode.weight[0, 0], model.decode.bias[0] = 2 * INFINITY, -INFINITY
        return model
    model.encode.weight[0, 3], model.encode.weight[0, 2], model.encode.bias[0] = 1, -INFINITY, INFINITY  # z_0: distance.
    model.encode.weight[1, 1] = 1  # z_1: position.
    for row, sign in ((0, 1), (1, -1), (2, 1), (3, -1)):
        process.pair.weight[row, 0] = process.pair.weight[row, edge] = sign
    for row, sign in ((2, 1), (3, -1)):
        process.pair.weight[row, 1], process.pair.weight[row, to_itself] = sign * WEIGHT_STEP / 4, sign * WEIGHT_STEP / 2
    for channel in (0, 1):
        process.message.weight[channel, 2 * channel], process.message.weight[channel, 2 * channel + 1] = -1, 1
    # min(-a, 1e4) = relu(-a) - relu(-a - 1e4).
    process.node.weight[0, process.inputs] = process.node.weight[1, process.inputs] = -1
    process.node.bias[1] = -INFINITY
    process.out.weight[0, 0], process.out.weight[0, 1] = 1, -1
    model.decode.weight[0, 0], model.decode.bias[0] = -2, INFINITY
    model.decode.weight[1, 0] = 1
    assert model.point is not None
    model.point.weight[0, 1] = 2**22
    return model


@torch.no_grad()
def alignment(hidden: Float[Tensor, "*B D"], reference: Float[Tensor, "*B R"]) -> float:
    """The share of the variance of ``reference`` that a linear map of ``hidden`` (with a constant) explains: 1 where it follows
    from it. Channels of the reference that do not vary are left out.

    Of the states of a trained model and of a compiled one on the same graphs, it says how faithfully the algorithm was learnt. Take
    the nodes that are reached: the distance of the others, 1e4 in the compiled one, drowns what is to be compared.

    Raises:
        PartError: other numbers of rows, or a reference that does not vary.
    """
    x, y = hidden.flatten(0, -2).double(), reference.flatten(0, -2).double()
    if len(x) != len(y):
        raise PartError(f"hidden and reference have the same rows, not {len(x)} and {len(y)}")
    y = y - y.mean(0)
    y = y[:, y.square().sum(0) > 0]
    if not y.numel():
        raise PartError("no channel of the reference varies")
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    left = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return float((1 - left.square().sum(0) / y.square().sum(0)).mean())
