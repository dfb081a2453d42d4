"""The task ``graph_algorithms``."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.bench.tasks import make_task
from gatework.core import GateworkError
from gatework.models import GraphProcessor, compile_algorithm
from gatework.models.graph_processor import HINTS, run_algorithm

from .made import take


def small(algorithm, **options):
    return make_task("graph_algorithms", **({"algorithm": algorithm, "nodes_from": 4, "nodes": 7, "test_nodes": 10} | options))


@pytest.mark.parametrize("algorithm", list(HINTS))
def test_graphs_go_both_ways_and_carry_the_algorithms_trace(algorithm):
    made = small(algorithm)
    sizes, degree = set(), []
    for x, y in take(made, 0, 8, 60):
        nodes = x.shape[1]
        sizes.add(nodes)
        weights = x[..., :-1]
        assert torch.equal(weights, weights.mT)
        assert not weights.diagonal(dim1=1, dim2=2).any()
        assert torch.equal(x[..., -1].sum(1), torch.ones(8))
        assert torch.equal(y, run_algorithm(algorithm, x))
        degree.append((weights != 0).sum() / (8 * nodes * (nodes - 1)))
        if algorithm == "bellman_ford":
            assert torch.equal(weights * 16, (weights * 16).round())
            assert weights.max() <= 1
        else:
            assert set(weights.unique().tolist()) <= {0.0, 1.0}
    assert sizes == {4, 5, 6, 7}
    assert torch.stack(degree).mean().item() == pytest.approx(0.4, abs=0.03)


def perfect(made, x):
    """Logits of the true trace."""
    y = run_algorithm(made.algorithm, x)
    channels = []
    for channel, hint in enumerate(made.hints):
        value = y[..., channel]
        if hint == "pointer":
            channels.append(40 * torch.nn.functional.one_hot(value.long(), x.shape[1]).float())
        else:
            channels.append((value if hint == "distance" else 40 * (2 * value - 1))[..., None])
    return torch.cat(channels, -1)


@pytest.mark.parametrize("algorithm", list(HINTS))
def test_scores_of_the_trace_itself_and_of_one_wrong_step(algorithm):
    made = small(algorithm)
    right = made.evaluate(lambda x: perfect(made, x), "test")
    assert right["loss"] < 1e-12
    for name, value in right.items():
        if name.endswith("error") or "error_at" in name:
            assert value == 0
    assert right["accuracy"] == 1
    assert {"trace_error_at_7", "step_error_at_7", "error_at_7"} <= set(right)

    def spoilt(x, step):
        output = perfect(made, x)
        output[:, step, 3, 0] *= -1
        return output

    number = 18 if algorithm == "dfs" else 9
    early = made.evaluate(lambda x: spoilt(x, 1), "test")
    assert early["trace_error"] == pytest.approx(1 / 10)
    assert early["step_error"] == pytest.approx(1 / (10 * number))
    assert early["error"] == 0
    assert early["trace_error_at_7"] == pytest.approx(1 / 7)
    assert made.evaluate(lambda x: spoilt(x, -1), "validation")["error"] == pytest.approx(1 / 10)


@pytest.mark.parametrize("algorithm", ["bellman_ford", "dfs"])
def test_the_loss_is_the_sum_of_the_hints(algorithm):
    made = small(algorithm)
    ((x, y),) = take(made, 0, 5, 1)
    nodes = x.shape[1]
    torch.manual_seed(0)
    output = torch.randn(*y.shape[:3], 2 + nodes)
    wanted, reached = 0.0, 0
    total = {"reached": 0.0, "distance": 0.0, "current": 0.0, "pointer": 0.0}
    for said, true in zip(output.flatten(0, 1), y.flatten(0, 1), strict=True):
        for v in range(nodes):
            total["reached"] += math.log1p(math.exp(-said[v, 0] if true[v, 0] else said[v, 0]))
            total["pointer"] -= said[v, 2:].log_softmax(0)[int(true[v, 2])].item()
            if algorithm == "bellman_ford" and true[v, 0]:
                total["distance"] += (said[v, 1] - true[v, 1]).item() ** 2
                reached += 1
        if algorithm == "dfs":
            total["current"] -= said[:, 1].log_softmax(0)[int(true[:, 1].argmax())].item()
    rows = output.shape[:2].numel()
    wanted = (total["reached"] + total["pointer"]) / (rows * nodes)
    wanted += total["distance"] / reached if algorithm == "bellman_ford" else total["current"] / rows
    assert made.loss(output, y).item() == pytest.approx(wanted, rel=1e-5)


def test_pointers_and_the_current_node_count():
    made = small("dfs")
    x, y = made.fixed["test", 10]
    output = perfect(made, x)
    assert not made.wrong(output, y).any()
    moved = output.clone()
    moved[0, 2, :, 1] = output[0, 2, :, 1].roll(1)
    assert made.wrong(moved, y).sum() == 2  # Where the search stands, and where it was said to stand.
    moved = output.clone()
    moved[0, 2, 4, 2:] = output[0, 2, 4, 2:].roll(1)
    assert made.wrong(moved, y).nonzero().tolist() == [[0, 2, 4]]


def test_compiled_weights_score_0_and_distances_are_measured():
    made = small("bellman_ford")
    model = compile_algorithm(GraphProcessor("bellman_ford", d_model=8))
    with torch.no_grad():
        scores = made.evaluate(model, "test")
    assert scores["trace_error"] == scores["distance_error"] == scores["distance_error_at_7"] == 0

    def far(x):
        output = perfect(made, x)
        output[..., 1] += 0.25
        return output

    assert made.evaluate(far, "test")["distance_error"] == pytest.approx(0.25)
    assert "distance_error" not in small("bfs").evaluate(lambda x: perfect(small("bfs"), x), "test")


def test_wrong_sizes_are_refused():
    with pytest.raises(GateworkError, match="nodes_from is at least 2 and at most nodes, test_nodes at least 2, got 9, 8 and 32"):
        make_task("graph_algorithms", nodes_from=9, nodes=8)
    with pytest.raises(GateworkError, match="algorithm must be"):
        make_task("graph_algorithms", algorithm="prim")


def test_equal_sizes_are_evaluated_once():
    made = small("bfs", test_nodes=7)
    assert len(made.fixed) == 2
    assert not any("_at_" in name for name in made.evaluate(lambda x: perfect(made, x), "test"))
