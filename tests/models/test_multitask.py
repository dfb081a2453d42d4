"""The multi-gate mixture against a loop over examples and tasks."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError, losses, metrics
from gatework.core.cost import active_parameters, count_flops
from gatework.models import MultiTask

INPUTS, WIDTH, HIDDEN, EXPERTS = 6, 5, 7, 8


def model(gate: str, outputs=(1, 3, 2), spread: float = 0.5, **settings) -> MultiTask:
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "experts": EXPERTS, "d_ff": HIDDEN} | settings
    made = MultiTask(INPUTS, outputs, gate=gate, **sizes).double()
    for p in made.gates.parameters():
        torch.nn.init.normal_(p, std=spread)
    return made


def examples(n: int = 20) -> torch.Tensor:
    return torch.randn(n, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference(m: MultiTask, x: torch.Tensor) -> torch.Tensor:
    rows = []
    dense = [gate(x).dense() for gate in m.gates]
    for n, example in enumerate(x):
        outputs = []
        for head, weights in zip(m.heads, dense, strict=True):
            mixed = sum(weights[n, e] * expert(example) for e, expert in enumerate(m.experts))
            outputs.append(head.weight @ mixed + head.bias)
        rows.append(torch.cat(outputs))
    return torch.stack(rows)


GATES = ["topk(k=1)", "dselect_k", "dselect_k(static=true)", "comet", "dense_to_sparse", "topk(k=2), comet, dselect_k"]


@pytest.mark.parametrize("gate", GATES)
def test_equals_the_loop_with_all_gradients(gate):
    m, x = model(gate).eval(), examples().requires_grad_()
    got, wanted = m(x), reference(m, x)
    assert got.shape == (20, 6)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)
    leaves = [x, *m.parameters()]
    weights = torch.randn(20, 6, dtype=torch.float64)
    mine = torch.autograd.grad((got * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad((wanted * weights).sum(), leaves, allow_unused=True, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gate", ["topk(k=1)", "topk(k=2)", "dselect_k(static=true)", "comet"])
def test_an_expert_runs_once_for_all_tasks_that_chose_it_and_no_other_runs(gate):
    m, x = model(gate, spread=3.0), examples()
    with torch.no_grad():
        chosen = torch.stack([g(x).dense() != 0 for g in m.gates])
        with count_flops() as gates:
            for g in m.gates:
                g(x)
        with count_flops() as whole:
            m(x)
    pairs, slots = int(chosen.any(0).sum()), int(chosen.any(0).sum(1).max())
    assert pairs < chosen.sum()  # Some are shared.
    assert pairs < 20 * EXPERTS
    experts = pairs * 2 * HIDDEN * (INPUTS + WIDTH)
    mixing, heads = 2 * 3 * 20 * slots * WIDTH, 2 * 20 * WIDTH * 6
    assert whole.total == gates.total + experts + mixing + heads


def test_an_expert_that_nobody_chose_gets_no_gradient():
    m = model("dselect_k(static=true, k=1)", spread=3.0)
    m(examples()).sum().backward()
    used = {e for g in m.gates for e in g(examples(1)).dense()[0].nonzero().flatten().tolist()}
    assert {e for e, expert in enumerate(m.experts) if expert[0].weight.grad is not None} == used
    assert 0 < len(used) < 6


def test_no_examples_and_nobody_chosen():
    m = model("dselect_k(static=true, k=1)", experts=5)
    assert m(examples(0)).shape == (0, 6)
    with torch.no_grad():
        for g in m.gates:
            g.code_bias.fill_(1.0)  # 111, which is no expert.
    y = m(examples())
    assert torch.equal(y, torch.cat([head.bias for head in m.heads]).expand(20, -1))


def test_every_task_has_its_own_gate_head_and_side_outputs():
    m = model("comet(entropy=0.1)").train()
    m(examples())
    assert sorted(losses(m)) == [f"gates.{t}.entropy" for t in range(3)]
    assert {f"gates.{t}.load" for t in range(3)} <= set(metrics(m))
    assert len({id(g) for g in m.gates}) == 3
    assert [head.out_features for head in m.heads] == [1, 3, 2]


def test_active_parameters():
    m = model("topk(k=1)")
    per_expert = HIDDEN * (INPUTS + 1) + WIDTH * (HIDDEN + 1)
    rest = 3 * EXPERTS * INPUTS + (WIDTH + 1) * 6
    assert sum(p.numel() for p in m.parameters()) == EXPERTS * per_expert + rest
    assert active_parameters(m) == 3 * per_expert + rest
    assert active_parameters(model("topk(k=4)")) == EXPERTS * per_expert + rest


def test_bfloat16_autocast():
    m, x = model("dselect_k").float(), examples().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outputs": ()}, "outputs name a task"),
        ({"outputs": (1, 0)}, "must be at least 1"),
        ({"experts": 0}, "must be at least 1"),
        ({"gate": "topk(k=9)"}, "between 1 and the number of experts 8, got 9"),
        ({"gate": "glu"}, "'glu' is a feedforward, not a gate"),
        ({"gate": "attention_weighted"}, "AttentionWeighted chooses by history.* too, which these tasks do not have"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    with pytest.raises(PartError, match=message):
        model(**({"gate": "topk"} | settings))


def test_another_width_is_refused():
    with pytest.raises(PartError, match="built for 6 inputs, not 4"):
        model("topk")(torch.zeros(2, 4, dtype=torch.float64))
