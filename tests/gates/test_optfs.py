from __future__ import annotations

import inspect
import math

import pytest
import torch

from gatework.core import PartError, advance, losses, metrics
from gatework.gates import OptFS


def gate_of(c, beta=1.0, **options):
    gate = OptFS(len(c), **options).double()
    with torch.no_grad():
        gate.start.fill_(gate.initial)  # Made in float32.
        gate.c.copy_(torch.tensor(c, dtype=torch.float64))
        gate.beta.fill_(beta)
    return gate


def s(z):
    return 1 / (1 + math.exp(-z))


C = [0.5, -0.3, 0.02, -0.01, 1.7, 0.0, -2.0]
IDS = torch.tensor([[0, 1, 4], [2, 2, 6], [3, 5, 0], [1, 6, 2]])


def rows(seed=0, dtype=torch.float64):
    return torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("beta", "initial"), [(1.0, 0.5), (3.7, 0.5), (40.0, 1.2)])
def test_gates_outputs_penalty_and_gradients_against_the_equations(beta, initial):
    gate = gate_of(C, beta, initial=initial, penalty=0.3)
    e = rows().requires_grad_()
    y = gate(e, IDS)
    weights = rows(1)
    said = losses(gate)
    ((y * weights).sum() + sum(said.values())).backward()
    grad_c = [0.3 * beta * s(beta * c) * (1 - s(beta * c)) for c in C]
    for b in range(4):
        for k in range(3):
            f = IDS[b, k].item()
            q = s(beta * C[f]) / s(initial)
            for d in range(2):
                assert y[b, k, d].item() == pytest.approx(q * e[b, k, d].item(), rel=1e-13)
                assert e.grad[b, k, d].item() == pytest.approx(q * weights[b, k, d].item(), rel=1e-13)
            # d q / d c = beta s (1 - s) / sigmoid(c_0)
            slope = beta * s(beta * C[f]) * (1 - s(beta * C[f])) / s(initial)
            grad_c[f] += slope * (weights[b, k] * e[b, k]).sum().item()
    assert gate.c.grad.tolist() == pytest.approx(grad_c, rel=1e-12, abs=1e-14)
    assert list(said) == ["features"]
    assert said["features"].item() == pytest.approx(0.3 * sum(s(beta * c) for c in C), rel=1e-13)
    assert metrics(gate)["kept"].item() == pytest.approx(3 / 7)
    assert gate.values().tolist() == pytest.approx([s(beta * c) / s(initial) for c in C], rel=1e-13)
    assert torch.equal(gate.values(IDS), gate.values()[IDS])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("initial", [0.5, 0.1, 2.3])
def test_the_first_epoch_starts_from_the_plain_model_to_the_last_bit(dtype, initial):
    gate = OptFS(1003, initial=initial).to(dtype)
    assert (gate.values() == 1).all()
    e, ids = torch.randn(17, 5, 9, dtype=dtype), torch.randint(1003, (17, 5))
    assert torch.equal(gate(e, ids), e)


def test_beta_sharpens_by_the_same_factor_at_the_start_of_each_epoch():
    gate = OptFS(3, epochs=20, final_beta=200.0)
    seen = {0: float(gate.beta)}
    for step in range(1, 101):
        advance(gate, step, 100)
        seen[step] = float(gate.beta)
    for step, beta in seen.items():
        # Step n of 100 is over: the next one is in epoch n // 5, and after the last nothing moves any more.
        assert beta == pytest.approx(200 ** (min(step // 5, 19) / 19), rel=1e-6)
    assert (seen[4], seen[5]) == (1.0, pytest.approx(200 ** (1 / 19), rel=1e-6))
    assert seen[95] == pytest.approx(200, rel=1e-6)
    assert not gate.hard, "search=1 leaves hardening to the user"
    assert [gate.epoch(step, 7) for step in range(9)] == [0, 2, 5, 8, 11, 14, 17, 20, 20]


def test_the_search_ends_in_hard_gates_that_stay():
    gate = OptFS(7, epochs=4, search=0.5, penalty=0.1).double()
    with torch.no_grad():
        gate.c.copy_(torch.tensor(C, dtype=torch.float64))
    for step in range(1, 10):
        advance(gate, step, 20)
        assert not gate.hard
        gate(rows(), IDS)
        assert losses(gate)
    advance(gate, 10, 20)
    hard = torch.tensor([1.0, 0, 1, 0, 1, 0, 0], dtype=torch.float64) * (1 + math.exp(-0.5))
    assert torch.equal(gate.values(), hard)
    assert not gate.c.requires_grad
    e = rows().requires_grad_()
    y = gate(e, IDS)
    assert losses(gate) == {}
    torch.testing.assert_close(y, e * hard[IDS][..., None], rtol=0, atol=0)
    y.sum().backward()
    assert torch.equal(e.grad, hard[IDS][..., None].expand_as(e))
    # What is loaded into another gate is as hard there.
    other = OptFS(7, epochs=4, search=0.5).double()
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.values(), hard)
    assert not other.c.requires_grad
    other.load_state_dict(OptFS(7).double().state_dict())
    assert other.c.requires_grad


def test_sharp_gates_come_to_hard_ones():
    soft = gate_of(C, beta=1e5)
    hard = gate_of(C)
    hard.harden()
    apart = torch.tensor([c != 0 for c in C])  # At 0 a soft gate stays half open; hard, c > 0 it is not.
    assert torch.equal(soft.values()[apart] > 0.5, hard.values()[apart] > 0)
    torch.testing.assert_close(soft.values()[apart], hard.values()[apart], rtol=0, atol=1e-14)
    assert hard.values()[~apart].item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_exported_table_gives_the_gated_rows_bit_for_bit(dtype):
    torch.manual_seed(0)
    gate = OptFS(50).to(dtype)
    with torch.no_grad():
        gate.c.copy_(torch.randn(50))
    gate.harden()
    table, ids = torch.randn(50, 6, dtype=dtype), torch.randint(50, (40, 3))
    remap, small = gate.export(table)
    kept = int((gate.c > 0).sum())
    assert small.shape == (kept + 1, 6)
    assert 10 < kept < 40
    assert torch.equal(small[remap[ids]], gate(table[ids], ids))
    assert (small[0] == 0).all()
    assert sorted(remap[gate.c > 0].tolist()) == list(range(1, kept + 1))
    assert (remap[gate.c <= 0] == 0).all()
    for c in (-1.0, 1.0):
        with torch.no_grad():
            gate.c.fill_(c)
        remap, small = gate.export(table)
        assert len(small) == (1 if c < 0 else 51)
        assert torch.equal(small[remap[ids]], gate(table[ids], ids))


def test_the_penalty_alone_moves_gates_that_no_batch_touches():
    gate = gate_of([0.5] * 7, penalty=0.01)
    unseen = torch.zeros(4, 3, dtype=torch.long)
    (gate(rows(), unseen).sum() + sum(losses(gate).values())).backward()
    slope = s(0.5) * (1 - s(0.5))
    assert gate.c.grad[1:].tolist() == pytest.approx([0.01 * slope] * 6, rel=1e-12)
    gate.eval()(rows(), unseen)
    assert losses(gate) == {}
    gate_of(C, penalty=0.0)(rows(), IDS)
    assert losses(gate_of(C, penalty=0.0)) == {}


def test_wrong_use_meets_one_sentence():
    for wrong, sentence in [
        ({"features": 0}, "features must be at least 1 and epochs at least 2, got 0 and 20"),
        ({"epochs": 1}, "got 7 and 1"),
        ({"penalty": -1.0}, "penalty must be at least 0"),
        ({"final_beta": 0.5}, "final_beta at least 1"),
        ({"initial": 0.0}, "initial positive"),
        ({"search": 0.0}, r"search is a share of the run in \(0, 1\], got 0.0"),
        ({"search": 1.5}, "search is a share"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            OptFS(**{"features": 7, **wrong})
    with pytest.raises(ValueError, match="the table has 5 rows, the gate 7 features"):
        OptFS(7).export(torch.zeros(5, 2))
    for some in (IDS[:, 0], IDS[:, :1], IDS[None]):
        with pytest.raises(PartError, match=r"rows of shape \(4, 3, 2\) have ids of shape \(4, 3\), not \("):
            inspect.unwrap(OptFS.forward)(OptFS(7), rows(), some)  # The annotation check of the test run would come first.
    with pytest.raises(IndexError):
        OptFS(7)(rows(), IDS + 5)


@pytest.mark.compile
def test_it_compiles_as_one_graph_in_search_and_hard():
    gate = OptFS(7, penalty=0.1)
    with torch.no_grad():
        gate.c.copy_(torch.tensor(C))
    compiled = torch.compile(gate, fullgraph=True)
    for _ in range(2):
        for step in (0, 7):
            advance(gate, step, 10)
            torch.testing.assert_close(compiled(rows(dtype=torch.float32), IDS), gate(rows(dtype=torch.float32), IDS))
        gate.harden()
