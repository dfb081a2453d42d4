"""``max_message_passing`` against loops over nodes and edges."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from gatework.core import PartError
from gatework.mixers.max_message_passing import MaxMessagePassing


def graphs(seed=0, batch=2, nodes=5, inputs=3, edge_inputs=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, nodes, inputs, dtype=torch.float64, generator=generator)
    edges = torch.randn(batch, nodes, nodes, edge_inputs, dtype=torch.float64, generator=generator)
    linked = torch.rand(batch, nodes, nodes, generator=generator) < 0.5
    linked[:, 1] = False  # Nobody writes to node 1.
    return x.requires_grad_(), edges.requires_grad_(), linked


def layer(seed=0):
    torch.manual_seed(seed)
    return MaxMessagePassing(inputs=3, edge_inputs=2, d_model=4, d_ff=6).double()


def reference(part, x, edges, linked):
    outputs, messages = [], []
    for features, pairs, links in zip(x, edges, linked, strict=True):
        for v in range(len(features)):
            row = []
            for u in range(len(features)):
                both = torch.cat([features[u], features[v], pairs[v, u]])
                row.append(part.message.weight @ (part.pair.weight @ both + part.pair.bias).clamp(min=0) + part.message.bias)
            messages.append(torch.stack(row))
            heard = [row[u] for u in range(len(row)) if links[v, u]]
            largest = torch.stack(heard).max(0).values if heard else torch.zeros(4, dtype=torch.float64)
            hidden = (part.node.weight @ torch.cat([features[v], largest]) + part.node.bias).clamp(min=0)
            outputs.append(part.out.weight @ hidden + part.out.bias)
    return torch.stack(outputs).view(*x.shape[:2], 4), torch.stack(messages).view(*linked.shape, 4)


def test_outputs_and_gradients_are_those_of_the_equations():
    part = layer()
    results = []
    for run in (part, lambda *given: reference(part, *given)):
        x, edges, linked = graphs()
        part.zero_grad()
        y, messages = run(x, edges, linked)
        (y.sin().sum() + messages.cos().sum()).backward()
        results.append([y, messages, x.grad, edges.grad, *(p.grad.clone() for p in part.parameters())])
    for found, wanted in zip(*results, strict=True):
        assert_close(found, wanted, rtol=0, atol=1e-12)


def test_nodes_in_another_order_come_out_in_that_order():
    part, (x, edges, linked) = layer(), graphs(1)
    order = torch.tensor([3, 0, 4, 1, 2])
    y, messages = part(x, edges, linked)
    moved, moved_messages = part(x[:, order], edges[:, order][:, :, order], linked[:, order][:, :, order])
    assert_close(moved, y[:, order], rtol=0, atol=1e-12)
    assert_close(moved_messages, messages[:, order][:, :, order], rtol=0, atol=1e-12)


def test_what_is_not_linked_is_not_heard_and_weights_serve_as_adjacency():
    part, (x, edges, linked) = layer(), graphs(2)
    y, _ = part(x, edges, linked)
    loud = torch.where(linked[..., None], edges, 1e6)
    assert torch.equal(part(x, loud, linked)[0], y)
    assert torch.equal(part(x, edges, -0.3 * linked.double())[0], y)


def test_empty_graphs_and_batches():
    part = layer()
    for batch, nodes in ((0, 4), (2, 0)):
        shape = (batch, nodes, nodes)
        linked = torch.zeros(shape, dtype=torch.bool)
        y, messages = part(torch.zeros(batch, nodes, 3).double(), torch.zeros(*shape, 2).double(), linked)
        assert y.shape == (batch, nodes, 4)
        assert messages.shape == (*shape, 4)


def test_wrong_sizes_and_inputs_are_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 3, 0, 4 and 4"):
        MaxMessagePassing(3, 0, 4)
    x, edges, linked = graphs()
    with pytest.raises(PartError, match=r"have the shapes \(B, n, 3\), \(B, n, n, 2\) and \(B, n, n\), not \(2, 5, 3\)"):
        layer()(x, edges[..., :1], linked)
