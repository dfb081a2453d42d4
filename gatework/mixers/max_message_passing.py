"""``MaxMessagePassing``: one round of messages along the edges of a graph, of which every node keeps the largest, by channel.

The processor of neural algorithmic reasoning (Veličković et al., Neural Execution of Graph Algorithms, 2019, arXiv 1910.10593),
into which Saldyt and Kambhampati, Mind The Gap: Deep Learning Doesn't Learn Deeply, 2025, arXiv 2505.18623, compile algorithms.
From node features x_v, features e_vu of the edge from u to v, and the set N(v) of the nodes with an edge to v:

    m_vu = W_2 relu(W_s x_u + W_t x_v + W_e e_vu + b_1) + b_2
    a_v  = max over u in N(v) of m_vu, channel by channel; 0 where N(v) is empty
    y_v  = U_2 relu(U_x x_v + U_a a_v + c_1) + c_2

The messages are handed out beside y: a pointer from v to one of N(v) is read off them. :func:`gatework.models.compile_algorithm`
sets the weights so that a round is one step of breadth-first search or of Bellman and Ford's algorithm.

Differences: 2505.18623 compiles into a graph attention network, with a softmax where the largest message is meant; here the maximum
is taken, which is exact.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.errors import PartError
from gatework.core.registry import register


@register("max_message_passing", paper="compiled_gnn")
class MaxMessagePassing(Component):
    """One round of messages between the nodes of graphs, aggregated by max.

    ``forward(x (B, n, inputs), edges (B, n, n, edge_inputs), adjacency (B, n, n)) -> (y (B, n, d_model), messages (B, n, n,
    d_model))``. Entry (v, u) of the last two inputs and of the messages is that of the edge from u to v; adjacency is not 0 where
    there is one. Time and memory are those of all n^2 pairs.

    Args:
        inputs: width of a node's features.
        edge_inputs: width of an edge's features.
        d_model: width of messages and outputs.
        d_ff: hidden width of both MLPs; None is ``d_model``.

    Initialisation: PyTorch's for linear layers, where W_s, W_t and W_e, and U_x and U_a, count as one matrix each.

    Raises:
        ValueError: sizes below 1.
        PartError: inputs that are no graphs of these widths.
    """

    family = "mixer"

    def __init__(self, inputs: int, edge_inputs: int, d_model: int, d_ff: int | None = None) -> None:
        super().__init__()
        d_ff = d_model if d_ff is None else d_ff
        if min(inputs, edge_inputs, d_model, d_ff) < 1:
            given = f"{inputs}, {edge_inputs}, {d_model} and {d_ff}"
            raise ValueError(f"inputs, edge_inputs, d_model and d_ff must be at least 1, got {given}")
        self.inputs, self.edge_inputs = inputs, edge_inputs
        #: W_s, W_t, W_e in this order, and b_1.
        self.pair = nn.Linear(2 * inputs + edge_inputs, d_ff)
        self.message = nn.Linear(d_ff, d_model)
        #: U_x, U_a in this order, and c_1.
        self.node = nn.Linear(inputs + d_model, d_ff)
        self.out = nn.Linear(d_ff, d_model)

    def forward(
        self, x: Float[Tensor, "B n I"], edges: Float[Tensor, "B n n E"], adjacency: Bool[Tensor, "B n n"] | Float[Tensor, "B n n"]
    ) -> tuple[Float[Tensor, "B n D"], Float[Tensor, "B n n D"]]:
        """The nodes' new features, and the messages."""
        batch, nodes = x.shape[:2]
        shapes = [(batch, nodes, self.inputs), (batch, nodes, nodes, self.edge_inputs), (batch, nodes, nodes)]
        given = [tuple(x.shape), tuple(edges.shape), tuple(adjacency.shape)]
        if given != shapes:
            wanted = f"(B, n, {self.inputs}), (B, n, n, {self.edge_inputs}) and (B, n, n)"
            raise PartError(f"x, edges and adjacency have the shapes {wanted}, not {given[0]}, {given[1]} and {given[2]}")
        from_u, to_v, of_edge = self.pair.weight.split([self.inputs, self.inputs, self.edge_inputs], 1)
        sums = nn.functional.linear(x, from_u)[:, None] + nn.functional.linear(x, to_v, self.pair.bias)[:, :, None]
        messages = self.message((sums + nn.functional.linear(edges, of_edge)).relu())
        if not nodes:
            return self.out(self.node(torch.cat([x, messages.sum(2)], -1)).relu()), messages
        linked = adjacency != 0
        largest = messages.masked_fill(~linked[..., None], -torch.inf).amax(2).masked_fill(~linked.any(2)[..., None], 0)
        return self.out(self.node(torch.cat([x.to(largest.dtype), largest], -1)).relu()), messages
