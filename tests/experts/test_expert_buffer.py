"""The buffer's exact behaviour on scans, against slow references, and outputs of a layer that runs from it."""

from __future__ import annotations

import functools
import random

import pytest
import torch

from gatework.core import PartError
from gatework.experts import MoE
from gatework.experts.expert_buffer import POLICIES, ExpertBuffer, hold, replay
from gatework.experts.expert_trace import record

SCAN = {"lifo": 12, "mru": 15, "belady": 15, "lru": 0, "fifo": 0}


def played(trace, size, policy, n_experts=6):
    """One expert per batch."""
    counts = torch.zeros(len(trace), n_experts, dtype=torch.long)
    counts[range(len(trace)), trace] = 1
    return replay(counts, size, policy, expert_bytes=10)


@pytest.mark.parametrize("policy", POLICIES)
def test_hits_of_a_cyclic_scan(policy):
    one_by_one = played(list(range(6)) * 5, 4, policy)
    at_once = replay(torch.ones(5, 6, dtype=torch.long), 4, policy)
    for buffer in (one_by_one, at_once):
        assert (buffer.hits, buffer.misses) == (SCAN[policy], 30 - SCAN[policy])
    assert one_by_one.bytes_moved == 10 * one_by_one.misses
    assert one_by_one.hit_rate == SCAN[policy] / 30


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_lifo_hits_size_minus_one_in_each_later_cycle(size):
    assert replay(torch.ones(9, 6, dtype=torch.long), size, "lifo").hits == 8 * (size - 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_buffer_for_all_misses_each_expert_once(policy):
    trace = random.Random(0).choices(range(6), k=50)
    assert played(trace, 6, policy).misses == len(set(trace))


def best(trace, size):
    """The fewest misses of any policy, by trying all."""

    @functools.cache
    def misses(at, resident):
        if at == len(trace):
            return 0
        if trace[at] in resident:
            return misses(at + 1, resident)
        keep = [resident] if len(resident) < size else [resident - {e} for e in resident]
        return 1 + min(misses(at + 1, kept | {trace[at]}) for kept in keep)

    return misses(0, frozenset())


@pytest.mark.parametrize("seed", range(4))
def test_belady_is_optimal_and_the_others_are_textbook(seed):
    trace = random.Random(seed).choices(range(5), weights=[5, 3, 2, 1, 1], k=24)
    found = {policy: played(trace, 3, policy, 5).misses for policy in POLICIES}
    assert found["belady"] == best(trace, 3) == min(found.values())
    for policy, victim in {
        "lru": lambda order: order["used"][0],
        "mru": lambda order: order["used"][-1],
        "fifo": lambda order: order["loaded"][0],
        "lifo": lambda order: order["loaded"][-1],
    }.items():
        order: dict[str, list[int]] = {"used": [], "loaded": []}
        misses = 0
        for e in trace:
            if e not in order["loaded"]:
                misses += 1
                if len(order["loaded"]) == 3:
                    out = victim(order)
                    order["loaded"].remove(out)
                    order["used"].remove(out)
                order["loaded"].append(e)
            order["used"] = [other for other in order["used"] if other != e] + [e]
        assert found[policy] == misses, policy


def test_lifo_spares_the_experts_of_the_batch():
    buffer = ExpertBuffer(4, 2)
    for batch in ([0], [1], [1, 2]):  # 1 was loaded last, and the third batch uses it: 0 goes.
        buffer.begin(batch)
        for expert in batch:
            buffer.access(expert)
    assert sorted(buffer.resident) == [1, 2]
    assert (buffer.hits, buffer.misses) == (1, 3)


def made(**settings) -> tuple[MoE, torch.Tensor]:
    torch.manual_seed(0)
    m = MoE(8, d_ff=6, experts=6, shared=1, engine="segments", **settings).double().eval()
    torch.nn.init.normal_(m.gate.weight)
    return m, torch.randn(4, 5, 8, dtype=torch.float64)


@pytest.mark.parametrize("where", ["memory", "file"])
@pytest.mark.parametrize("policy", ["lifo", "lru"])
@torch.no_grad()
def test_a_layer_that_runs_from_a_buffer_gives_the_same_outputs(policy, where, tmp_path):
    m, x = made()
    calls = [x, x[0, :1], x[1:2], x]
    expected = [m(call) for call in calls]
    with record(m) as trace:
        for call in calls:
            m(call)
    file = tmp_path / "experts.safetensors" if where == "file" else None
    before = sum(p.numel() for p in m.parameters())
    buffer = hold(m, 3, policy, file)
    assert before - sum(p.numel() for p in m.parameters()) == 6 * 3 * 6 * 8
    most = 0
    for call, y in zip(calls, expected, strict=True):
        assert torch.equal(m(call), y)
        most = max(most, len(buffer.resident))
    assert most == 3
    simulated = replay(trace["gate"], 3, policy, expert_bytes=3 * 6 * 8 * 8)
    assert (buffer.hits, buffer.misses, buffer.bytes_moved) == (simulated.hits, simulated.misses, simulated.bytes_moved)
    assert buffer.hits > 0
    assert repr(buffer) == f"ExpertBuffer(3 of 6 experts, {policy}, hits={buffer.hits}, misses={buffer.misses})"


def test_wrong_input_meets_one_sentence():
    with pytest.raises(PartError, match="a buffer holds at least 1 expert, not 0"):
        ExpertBuffer(4, 0)
    with pytest.raises(PartError, match="no policy 'random'; there are lifo, mru, lru, fifo, belady"):
        ExpertBuffer(4, 2, "random")
    with pytest.raises(PartError, match="belady is the policy that needs the future"):
        hold(made()[0], 2, "belady")
    with pytest.raises(PartError, match="there are the experts 0 to 3, and 4 is among the future accesses"):
        ExpertBuffer(4, 2, "belady", future=[3, 4, 0])
    with pytest.raises(PartError, match="there are the experts 0 to 3, not 4"):
        ExpertBuffer(4, 2).access(4)
    m, _ = made()
    hold(m, 2)
    with pytest.raises(PartError, match="the experts of this one are modules"):
        hold(m, 2)
