"""W ranks against one: simulated in this process, and two gloo processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gatework.core import PartError
from gatework.experts import MoE
from gatework.experts.expert_parallel import ExpertParallel, simulate
from gatework.experts.expert_placement import ExpertPlacement

from . import launched_parallel as launched

SCRIPT = Path(launched.__file__)


def alone(moe: MoE, xs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The outputs of the whole layer, and the gradients of all tokens and parameters."""
    ys = [moe(x) for x in xs]
    total = sum(y.square().sum() for y in ys)
    return ys, list(torch.autograd.grad(total, [*xs, *moe.parameters()], materialize_grads=True))


@pytest.mark.parametrize("counts", [[7], [5, 5], [9, 0], [3, 0, 4, 1], [0, 0]], ids=str)
def test_simulated_ranks_equal_one_for_every_placement(counts):
    world = len(counts)
    settings = {"capacity": 1.0} if world == 4 else {}
    torch.manual_seed(0)
    moe = MoE(launched.D, d_ff=6, experts=4, shared=1, **settings).double()
    torch.nn.init.normal_(moe.gate.weight)
    xs = [launched.tokens(count, rank).requires_grad_() for rank, count in enumerate(counts)]
    expected, gradients = alone(moe, xs)
    for ranks in sorted(set(itertools.permutations(rank for rank in range(world) for _ in range(4 // world)))):
        ys = simulate(moe, xs, ExpertPlacement(ranks, world))
        total = sum(y.square().sum() for y in ys)
        found = torch.autograd.grad(total, [*xs, *moe.parameters()], materialize_grads=True)
        for a, b in zip([*ys, *found], [*expected, *gradients], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_exactly_the_used_rows_are_computed():
    moe = launched.layer()
    rows = []
    run = moe.run_stacked
    moe.run_stacked = lambda x, *rest: (rows.append(len(x)), run(x, *rest))[1]
    simulate(moe, [launched.tokens(count, count) for count in (7, 2)])
    assert sum(rows) == 9 * 2


def test_two_processes_equal_one(tmp_path):
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(tmp_path / "store"), str(file)],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank, file in enumerate(files)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    results = [torch.load(file) for file in files]
    assert len(results[0]) == 2 * len(launched.TOKENS) * len(launched.PLACEMENTS)
    for case, first in results[0].items():
        counts, placed, needs_gradient = json.loads(case)
        ranks_of = (first, results[1][case])
        moe = launched.layer()
        xs = [launched.tokens(count, rank).requires_grad_() for rank, count in enumerate(counts)]
        expected, gradients = alone(moe, xs)
        names = [name for name, _ in moe.named_parameters()]
        d_xs, d_parameters = gradients[:2], dict(zip(names, gradients[2:], strict=True))
        for rank, (y, d_x, found) in enumerate(ranks_of):
            torch.testing.assert_close(y, expected[rank], rtol=0, atol=1e-12)
            if needs_gradient:
                torch.testing.assert_close(d_x, d_xs[rank], rtol=0, atol=1e-12)
            own = [expert for expert, place in enumerate(placed) if place == rank]
            for name in ("w_in", "w_out"):
                mine = found[f"moe.{name}"]
                mine = torch.zeros_like(d_parameters[name][own]) if mine is None else mine
                torch.testing.assert_close(mine, d_parameters[name][own], rtol=0, atol=1e-12)
        for name in ("gate.weight", "shared_in", "shared_out"):
            both = sum(found[f"moe.{name}"] for _, _, found in ranks_of)
            torch.testing.assert_close(both, d_parameters[name], rtol=0, atol=1e-12)


def test_one_process_runs_the_layer_itself():
    x = launched.tokens(6, 0).view(2, 3, launched.D)
    expected = launched.layer()(x)
    part = ExpertParallel(launched.layer())
    torch.testing.assert_close(part(x), expected, rtol=0, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(part(x[0, 0]), expected[0, 0], rtol=0, atol=1e-13)
    mask = torch.tensor([[True, False, True]] * 2)
    torch.testing.assert_close(part(x, mask), launched.layer()(x, mask), rtol=0, atol=1e-13)
    assert part.expert_parameters() == [part.moe.w_in, part.moe.w_out]
    with torch.autocast("cpu", torch.bfloat16):
        low = ExpertParallel(launched.layer().float())(x.float())
    assert low.dtype == torch.bfloat16


def test_wrong_input_meets_one_sentence():
    moe, x = launched.layer(), launched.tokens(2, 0)
    with pytest.raises(PartError, match="4 experts cannot be shared out evenly among 3 ranks: take a number that they divide"):
        simulate(moe, [x, x, x])
    with pytest.raises(PartError, match="the placement is for 4 experts on 2 ranks, and there are 4 experts and 1 ranks"):
        ExpertParallel(moe, placement=ExpertPlacement.contiguous(4, 2))
    with pytest.raises(PartError, match="the experts of this one are modules"):
        ExpertParallel(MoE(8, experts=["glu", "mlp"], gate="topk(k=1)"))
