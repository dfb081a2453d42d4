"""The loss-free bias: its rule, its counts over recomputation, micro-batches, ranks and checkpoints."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gatework.core import Routing, advance, losses, metrics
from gatework.gates import LossFree, TopK

D, E = 6, 5
SCRIPT = Path(__file__).with_name("ranks.py")


def gate(rate: float = 0.05, **settings) -> TopK:
    torch.manual_seed(0)
    made = TopK(D, E, balance=f"loss_free({rate})", **settings).double()
    torch.nn.init.normal_(made.weight)
    return made


def tokens(n: int = 12) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_the_bias_moves_by_its_rate_against_the_load_and_only_selects():
    g, x = gate(k=1, normalize="none"), tokens(64)
    term = g.balance.loss_free
    plain = g(x)
    g(x)  # A second micro-batch before the step.
    counts = 2 * torch.bincount(plain.experts.flatten(), minlength=E)
    assert torch.equal(term.counts, counts)
    advance(g, 1, 10)
    mean = counts.double().mean().item()
    torch.testing.assert_close(term.bias.tolist(), [0.05 * ((mean > c) - (mean < c)) for c in counts.tolist()], rtol=0, atol=0)
    assert not term.counts.any()
    again = g(x)
    same = (again.experts == plain.experts)[:, 0]
    assert same.any()
    assert not same.all()
    assert torch.equal(again.weights[same], plain.weights[same])
    assert torch.equal(again.logits, plain.logits)
    assert not losses(g)
    assert {name for name, _ in g.named_parameters()} == {"weight"}
    assert "balance.loss_free.bias" in g.state_dict()


def test_equal_counts_leave_the_bias():
    term = LossFree(3)
    term(Routing(torch.ones(6, 1), torch.arange(6)[:, None] % 3, 3))
    advance(term, 1, 1)
    assert not term.bias.any()
    advance(term, 2, 2)  # Nothing counted.
    assert not term.bias.any()


def test_empty_slots_padding_and_evaluation_are_not_counted():
    g, x = gate(), tokens()
    mask = torch.arange(len(x)) % 3 == 0
    g(x, mask)
    counted = g.balance.loss_free.counts.clone()
    assert counted.sum() == 2 * mask.sum()
    g.eval()(x)
    assert torch.equal(g.balance.loss_free.counts, counted)
    term = LossFree(3)
    term(Routing(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0, 1], [1, 2]]), 3))
    assert term.counts.tolist() == [1, 1, 1]


def test_the_bias_balances_a_fixed_router():
    g, x = gate(0.02, k=1), tokens(256)
    g(x)
    start = metrics(g)["max_violation"]
    for step in range(200):
        g(x)
        advance(g, step + 1, 200)
    g(x)
    assert metrics(g)["max_violation"] < start / 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_counts_once(reentrant):
    g, x = gate(), tokens().requires_grad_()
    expected = g(x).counts()
    assert torch.equal(g.balance.loss_free.counts, expected)
    for _ in range(2):
        checkpoint(lambda y: g(y).weights, x, use_reentrant=reentrant).sum().backward()
    assert torch.equal(g.balance.loss_free.counts, 3 * expected)


def test_counts_between_micro_batches_survive_a_checkpoint():
    whole, first = gate(), gate()
    x, y = tokens(30)[:20], tokens(30)[20:]
    for g in (whole, first):
        g(x)
    state = first.state_dict()
    assert torch.equal(state["balance.loss_free.saved_counts"], whole.balance.loss_free.counts)
    resumed = gate()
    resumed(tokens())  # Forgotten by loading.
    resumed.load_state_dict(state)
    resumed.load_state_dict({"weight": state["weight"]}, strict=False)  # What holds no counts changes none.
    for g in (whole, resumed):
        g(y)
        advance(g, 1, 1)
    assert whole.balance.loss_free.bias.any()
    assert torch.equal(whole.balance.loss_free.bias, resumed.balance.loss_free.bias)
    assert not whole.state_dict()["balance.loss_free.saved_counts"].any()


def test_the_bias_keeps_its_precision():
    g = gate(1e-3).float()
    term = g.balance.loss_free
    g(tokens().float())
    for _ in range(3):
        advance(g, 1, 1)
        term.counts += torch.arange(E)
    before = term.bias.clone()
    assert before.dtype == torch.float32
    assert len(set(before.tolist())) > 2
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        g.to(dtype)
        assert term.bias.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.equal(term.bias, before.to(term.bias.dtype))
        assert term.counts.dtype == term.saved_counts.dtype == torch.long
    g.bfloat16()(tokens().bfloat16())
    advance(g, 4, 4)
    assert (term.bias - before).abs().max().item() == pytest.approx(1e-3, rel=1e-3)


def test_made_on_the_meta_device():
    with torch.device("meta"):
        g = TopK(D, E, balance=LossFree(E))
        other = TopK(D, E, balance="loss_free")
    assert g.state_dict()["balance.loss_free.saved_counts"].is_meta
    for made in (g, other):
        made.load_state_dict(gate().float().state_dict(), assign=True)
        made(tokens().float())
        advance(made, 1, 1)
        assert made.balance.loss_free.bias.any()


def test_two_ranks_with_half_a_batch_each_are_one_with_the_whole(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, SCRIPT, tmp_path, str(rank), "2"], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    try:
        for process in running:
            assert process.wait(300) == 0, process.stderr.read()
    finally:
        for process in running:
            process.kill()
            process.communicate()
    spec = importlib.util.spec_from_file_location("ranks", SCRIPT)
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)
    expected = ranks.train(0, 1, "alone")
    assert expected["biases"][-1].abs().max() > 0.05  # More than one step up or down.
    for rank in range(2):
        for how, found in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.equal(found["biases"], expected["biases"]), f"rank {rank}, {how}"
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="rate must be at least 0, got -1"):
        LossFree(4, -1.0)
    with pytest.raises(ValueError, match="n_experts must be at least 1, got 0"):
        LossFree(0)
