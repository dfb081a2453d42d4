"""Graph algorithms, the model that runs them, and its compiled weights."""

from __future__ import annotations

from collections import deque
from contextlib import contextmanager
from math import inf

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from gatework.bench.tasks import make_task
from gatework.core import PartError, losses, metrics
from gatework.models import BACKBONES, GraphProcessor, compile_algorithm
from gatework.models.graph_processor import HINTS, alignment, run_algorithm, steps

MEMORIES = ("full", "gated", "none")
TASKS = {name: make_task("graph_algorithms", algorithm=name, nodes=4, nodes_from=4, test_nodes=4) for name in HINTS}


def graphs(algorithm, nodes, count=6, seed=0):
    return TASKS[algorithm].rows(count, nodes, torch.Generator().manual_seed(seed))


@contextmanager
def unchecked():
    """Without the annotation check of the test run, which would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def links(x):
    """Of each node its neighbours, in order."""
    return [[int(u) for u in row.nonzero()[:, 0]] for row in x[:, :-1]], int(x[:, -1].argmax())


@pytest.mark.parametrize("nodes", [2, 3, 7, 12])
def test_breadth_first_search_reaches_each_node_at_its_level(nodes):
    x, y = graphs("bfs", nodes)
    for graph, trace in zip(x, y, strict=True):
        neighbours, source = links(graph)
        level, queue = {source: 0}, deque([source])
        while queue:
            u = queue.popleft()
            for v in neighbours[u]:
                if v not in level:
                    level[v] = level[u] + 1
                    queue.append(v)
        wanted = [[float(level.get(v, inf) <= t) for v in range(nodes)] for t in range(1, nodes)]
        assert trace[..., 0].tolist() == wanted


@pytest.mark.parametrize("nodes", [2, 3, 7, 12])
def test_bellman_ford_relaxes_all_edges_at_once(nodes):
    x, y = graphs("bellman_ford", nodes)
    for graph, trace in zip(x, y, strict=True):
        neighbours, source = links(graph)
        distance = [inf] * nodes
        distance[source] = 0.0
        for said in trace:
            new, pointer = list(distance), list(range(nodes))
            for v in range(nodes):
                for u in neighbours[v]:
                    through = distance[u] + graph[v, u].item()
                    if through < new[v] or (through == new[v] and pointer[v] == v != source and through < inf):
                        new[v], pointer[v] = through, u
            distance = new
            reached = [d < inf for d in distance]
            assert said[:, 0].tolist() == reached
            assert said[:, 1].tolist() == [d if d < inf else 0.0 for d in distance]
            assert said[:, 2].tolist() == pointer
        for v in range(nodes):  # The fixed point: no edge can be relaxed any more.
            assert all(distance[v] <= distance[u] + graph[v, u].item() for u in neighbours[v])


@pytest.mark.parametrize("nodes", [2, 3, 7, 12])
def test_depth_first_search_goes_on_and_back(nodes):
    x, y = graphs("dfs", nodes)
    for graph, trace in zip(x, y, strict=True):
        neighbours, source = links(graph)
        parent, walk = {source: source}, []

        def visit(u, neighbours=neighbours, parent=parent, walk=walk):
            for v in neighbours[u]:
                if v not in parent:
                    parent[v] = u
                    walk.append((v, dict(parent)))
                    visit(v)
                    walk.append((u, dict(parent)))

        visit(source)
        walk += [(source, dict(parent))] * (2 * (nodes - 1) - len(walk))
        assert len(trace) == len(walk) == steps("dfs", nodes)
        for said, (current, found) in zip(trace, walk, strict=True):
            assert said[:, 0].tolist() == [float(v in found) for v in range(nodes)]
            assert said[:, 1].tolist() == [float(v == current) for v in range(nodes)]
            assert said[:, 2].tolist() == [found.get(v, v) for v in range(nodes)]


@pytest.mark.parametrize("algorithm", ["bfs", "bellman_ford"])
@pytest.mark.parametrize("memory", MEMORIES)
def test_compiled_weights_run_the_algorithm_exactly_on_graphs_of_any_size(algorithm, memory):
    torch.manual_seed(0)
    model = compile_algorithm(GraphProcessor(algorithm, d_model=9, d_ff=8, memory=memory))
    for dtype in (torch.float32, torch.float64):
        for nodes in (2, 3, 5, 16, 40):
            x, y = graphs(algorithm, nodes, seed=nodes)
            with torch.no_grad():
                output = model.to(dtype)(x.to(dtype))
            assert not TASKS[algorithm].wrong(output, y).any()
            if algorithm == "bellman_ford":
                reached = y[..., 0] == 1
                assert torch.equal(output[..., 1][reached], y[..., 1][reached].to(dtype))
                assert (output[..., 1][~reached] == 1e4).all()
            assert TASKS[algorithm].loss(output, y.to(dtype)).item() == 0


@pytest.mark.parametrize("algorithm", ["bfs", "bellman_ford"])
def test_compiled_weights_are_a_stationary_point_and_noise_leaves_it(algorithm):
    torch.manual_seed(0)
    task = TASKS[algorithm]
    x, y = graphs(algorithm, 7)
    for noise in (0.0, 0.5):
        model = compile_algorithm(GraphProcessor(algorithm, d_model=8, memory="none"))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(noise * torch.randn_like(p))
        loss = task.loss(model(x), y)
        loss.backward()
        moved = any(p.grad.any() for p in model.parameters())
        assert (loss.item() > 0, moved) == ((False, False) if noise == 0 else (True, True))


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(PartError, match="bfs and bellman_ford can be compiled, dfs cannot"):
        compile_algorithm(GraphProcessor("dfs"))
    with pytest.raises(PartError, match="bellman_ford compiles into d_model >= 4 and d_ff >= 8, not 8 and 6"):
        compile_algorithm(GraphProcessor("bellman_ford", d_model=8, d_ff=6))


def copied(algorithm, memory, source):
    """A model of another memory with the weights of ``source``, a ``full`` one."""
    model = GraphProcessor(algorithm, d_model=6, memory=memory).double()
    width = model.process.inputs
    state = source.state_dict()
    if memory == "none":
        d = width
        pair, node = state["process.pair.weight"], state["process.node.weight"]
        state["process.pair.weight"] = torch.cat([pair[:, :d], pair[:, 2 * d : 3 * d], pair[:, 4 * d :]], 1)
        state["process.node.weight"] = torch.cat([node[:, :d], node[:, 2 * d :]], 1)
    missing = model.load_state_dict(state, strict=False).missing_keys
    assert all(name.startswith("gate.") for name in missing)
    return model


@pytest.mark.parametrize("algorithm", list(HINTS))
def test_a_closed_gate_is_forgetnet_and_an_open_one_the_baseline(algorithm):
    torch.manual_seed(1)
    full = GraphProcessor(algorithm, d_model=6).double()
    with torch.no_grad():
        full.process.pair.weight.mul_(2)  # So that what is remembered counts.
    x = graphs(algorithm, 5)[0].double()
    forget, gated = copied(algorithm, "none", full), copied(algorithm, "gated", full)
    assert not torch.allclose(full(x), forget(x), atol=1e-3)
    for bias, same in ((-torch.inf, forget), (torch.inf, full)):
        torch.nn.init.constant_(gated.gate.gate.bias, bias)
        assert_close(gated(x), same(x), rtol=0, atol=1e-12)


def test_without_memory_a_step_depends_on_the_hints_alone():
    """From equal hints the same goes on, whatever was before: here the search has come to a standstill."""
    torch.manual_seed(0)
    x, y = graphs("bfs", 9, count=20)
    still = (y[:, 3] == y[:, 4]).all((1, 2))
    for memory in MEMORIES:
        model = GraphProcessor("bfs", d_model=8, memory=memory).double()
        torch.nn.init.zeros_(model.decode.weight)  # Equal hints from the first step on.
        _, states = model.run(x[still].double())
        assert torch.equal(states[:, 1], states[:, 2]) == (memory == "none")


def test_the_gates_loss_is_the_mean_over_all_steps():
    torch.manual_seed(0)
    model = GraphProcessor("bellman_ford", d_model=6, memory="gated", penalty=0.5)
    seen = []
    original = model.gate.values
    model.gate.values = lambda z, h: seen.append(original(z, h)) or seen[-1]
    model(graphs("bellman_ford", 5)[0])
    mean = torch.stack(seen).mean()
    assert len(seen) == 4
    assert_close(losses(model)["gate.gate"], 0.5 * mean)
    model(graphs("bellman_ford", 5)[0])
    assert 0.2 < metrics(model)["gate.gate"].item() < 0.8


def test_pointers_go_along_edges_or_to_the_node_itself():
    torch.manual_seed(0)
    x, _ = graphs("dfs", 6)
    output = GraphProcessor("dfs", d_model=8)(x)
    assert output.shape == (6, 10, 6, 2 + 6)
    linked = (x[..., :-1] != 0) | torch.eye(6, dtype=torch.bool)
    assert torch.equal(output[..., 2:].isfinite(), linked[:, None].expand(-1, 10, -1, -1))


def test_wrong_settings_and_inputs_are_refused():
    assert BACKBONES["graph_processor"] is GraphProcessor
    for settings, message in (
        ({"algorithm": "prim"}, "the algorithms are bfs, bellman_ford, dfs, not 'prim'"),
        ({"algorithm": "bfs", "d_ff": 0}, "d_model 32 and d_ff 0"),
        ({"algorithm": "bfs", "memory": "gated", "penalty": -1.0}, "the penalty -1.0 do not fit"),
    ):
        with pytest.raises(PartError, match=message):
            GraphProcessor(**settings)
    with unchecked(), pytest.raises(PartError, match="memory is full, gated or none, not 'some'"):
        GraphProcessor("bfs", memory="some")
    with pytest.raises(PartError, match=r"graphs are \(batch, n, n \+ 1\) with n of at least 2, not \(2, 3, 5\)"):
        GraphProcessor("bfs")(torch.zeros(2, 3, 5))
    with pytest.raises(PartError, match="the algorithms are"):
        run_algorithm("prim", torch.zeros(1, 2, 3))
    assert repr(GraphProcessor("bfs")) != repr(GraphProcessor("bfs", memory="none"))


def test_alignment_is_the_share_that_a_linear_map_explains():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 5, dtype=torch.float64, generator=generator)
    noise = torch.randn(400, 2, dtype=torch.float64, generator=generator)
    exact = hidden @ torch.randn(5, 2, dtype=torch.float64, generator=generator) + 3
    assert alignment(hidden.view(20, 20, 5), exact.view(20, 20, 2)) == pytest.approx(1)
    scale = exact.std(0) / noise.std(0)
    assert alignment(hidden, exact + scale * noise) == pytest.approx(0.5, abs=0.1)
    assert alignment(hidden, noise) < 0.1
    constant = torch.cat([exact, torch.ones(400, 1)], 1)
    assert alignment(hidden, constant) == pytest.approx(1)
    with unchecked(), pytest.raises(PartError, match="the same rows, not 400 and 399"):
        alignment(hidden, exact[1:])
    with pytest.raises(PartError, match="no channel of the reference varies"):
        alignment(hidden, torch.ones(400, 1))
