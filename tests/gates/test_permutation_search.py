"""The permutation search: soft permutations, the assignment, and what stays of the gate behind it."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gatework.core import Gate, GateworkError, Routing, advance, build, losses
from gatework.core.cost import count_flops
from gatework.experts import MoE
from gatework.gates import PermutationSearch
from gatework.gates.permutation_search import assignment, sinkhorn

D, E = 6, 4


def tokens(n: int = 20) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def search(spread: float = 1e-3, **settings) -> PermutationSearch:
    """``spread``: of A; the temperature starts at 1e-3."""
    torch.manual_seed(0)
    made = PermutationSearch(D, E, **settings).double()
    for p in made.gate.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.nn.init.normal_(made.logits, std=spread)
    return made


def end(part: PermutationSearch) -> PermutationSearch:
    advance(part, 11, 10)
    assert not part.searching
    return part


def soft(a, tau, steps):
    """One matrix, entry by entry."""
    p = (a / tau).exp()
    for _ in range(steps):
        p = torch.stack([row / row.sum() for row in p])
        p = torch.stack([column / column.sum() for column in p.T]).T
    return p


def parts(part, x):
    """The weights that are permuted, one matrix for each permutation."""
    if part.each and hasattr(part.gate, "select"):
        return part.gate.select(x)[0].unbind(1)
    return [part.gate(x).dense()]


GATES = [{"gate": "comet"}, {"gate": "dselect_k", "each": False}, {"gate": "topk(k=2)"}, {"gate": "topk(k=1)"}]


@pytest.mark.parametrize("settings", GATES, ids=str)
def test_the_search_equals_the_equations_with_all_gradients(settings):
    part, x = search(noise=0.0, entropy=0.2, phase=0.5, **settings), tokens().requires_grad_()
    advance(part, 1, 40)  # 0.05 of the search.
    tau, steps = 1e-3 * 1e-4**0.05, 26
    got, said = part(x).dense(), losses(part)
    permutations = [soft(a, tau, steps) for a in part.logits]
    weights = parts(part, x)
    assert len(permutations) == len(weights) == (2 if settings == GATES[0] else 1)
    q = sum(g @ p for g, p in zip(weights, permutations, strict=True))
    wanted = q / q.sum(1, keepdim=True) * sum(g.sum(1) for g in weights)[:, None]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    reg = 0
    for p in permutations:
        r = p / p.sum(1, keepdim=True)
        reg = reg - (p * (p + 1e-6).log()).sum() - (r * (r + 1e-6).log()).sum()
    torch.testing.assert_close(said["permutation"], 0.2 * reg / len(permutations), rtol=0, atol=1e-12)
    loss = got.square().sum() + said["permutation"]
    reference = wanted.square().sum() + 0.2 * reg / len(permutations)
    leaves = [x, *part.parameters()]
    mine = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(reference, leaves, allow_unused=True, materialize_grads=True)
    assert mine[1].any()  # Of A: it comes first.
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_sinkhorn_sums_columns_to_one_and_rows_nearly():
    logits = torch.randn(3, 6, 6, dtype=torch.float64) * 4
    rough, fine = sinkhorn(logits, 2), sinkhorn(logits, 2000)
    ones = torch.ones(3, 6, dtype=torch.float64)
    for p in (rough, fine):
        torch.testing.assert_close(p.sum(1), ones, rtol=0, atol=1e-13)
    assert (rough.sum(2) - 1).abs().max() > 1e-2
    torch.testing.assert_close(fine.sum(2), ones, rtol=0, atol=1e-3)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    sharp = sinkhorn((0.02 * logits + torch.eye(6)[order]) / 1e-2, 150)
    assert torch.equal(assignment(sharp), order.expand(3, -1))
    torch.testing.assert_close(sharp, torch.eye(6, dtype=torch.float64)[order].expand(3, -1, -1), rtol=0, atol=1e-6)


def test_the_assignment_is_the_best_permutation():
    scores = torch.rand(2, 5, 5, dtype=torch.float64)
    for matrix, found in zip(scores, assignment(scores), strict=True):
        best = max(itertools.permutations(range(5)), key=lambda order: sum(matrix[i, e] for i, e in enumerate(order)))
        assert tuple(found.tolist()) == best


@pytest.mark.parametrize("settings", GATES, ids=str)
def test_a_hard_permutation_relabels_the_experts_of_each_selector(settings):
    part, x = search(**settings), tokens()
    with torch.no_grad():
        part.logits[0] += torch.eye(E)[[2, 0, 3, 1]]
    orders = assignment(sinkhorn(part.logits.detach() / 1e-7, 150))
    assert torch.equal(end(part).order, orders)
    assert orders[0].tolist() == [2, 0, 3, 1]
    for mode in (True, False):
        dense = part.train(mode)(x).dense()
        wanted = torch.zeros_like(dense)
        for weights, order in zip(parts(part, x), orders, strict=True):
            for expert in range(E):
                wanted[:, order[expert]] += weights[:, expert]
        torch.testing.assert_close(dense, wanted, rtol=0, atol=1e-15)
    if settings["gate"].startswith("topk"):
        assert part(x).weights.shape == part.gate(x).weights.shape
        assert part.k == part.gate.k


def test_experts_in_the_permuted_places_make_the_same_layer():
    torch.manual_seed(0)
    plain = MoE(D, d_ff=5, experts=E, gate="topk(k=2)").double().eval()
    layer = MoE(D, d_ff=5, experts=E, gate="permutation_search(gate=topk(k=2))").double().eval()
    layer.gate.gate.load_state_dict(plain.gate.state_dict())
    order = end(layer.gate).order[0]
    with torch.no_grad():
        layer.w_in[order], layer.w_out[order] = plain.w_in.clone(), plain.w_out.clone()
    x = tokens()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-14)
    with count_flops() as permuted:
        layer(x)
    with count_flops() as alone:
        plain(x)
    assert permuted.total == alone.total


def test_the_search_ends_with_its_phase_and_stays_as_it_was():
    part, x = search(phase=0.25, gate="dselect_k"), tokens()
    progress = []
    for step in range(1, 11):
        advance(part, step, 40)
        progress.append(part.progress.item())
        assert part.searching
    assert progress == pytest.approx([step / 10 for step in range(1, 11)])
    before = part.eval()(x).dense()  # Hard while the search goes on.
    assert set(losses(part)) == set()
    advance(part.train(), 11, 40)
    assert not part.searching
    torch.testing.assert_close(part(x).dense(), before, rtol=0, atol=1e-15)
    assert "permutation" not in losses(part)
    part(x).dense().square().sum().backward()
    assert part.logits.grad is not None
    assert not part.logits.grad.any()
    order = part.order.clone()
    with torch.no_grad():
        part.logits.neg_()
    advance(part, 12, 40)
    advance(part, 1, 40)
    assert torch.equal(part.order, order)
    other = search(phase=0.25, gate="dselect_k", spread=1.0)
    other.load_state_dict(part.state_dict())
    assert torch.equal(other(x).dense(), part(x).dense())


def test_noise_is_drawn_in_training_only_and_once_under_checkpointing():
    part, x = search(gate="topk(k=2)"), tokens().requires_grad_()
    assert not torch.equal(part(x).dense(), part(x).dense())
    torch.manual_seed(5)
    direct = torch.autograd.grad(part(x).dense().square().sum(), part.logits)
    torch.manual_seed(5)
    again = torch.autograd.grad(checkpoint(lambda y: part(y).dense(), x, use_reentrant=False).square().sum(), part.logits)
    assert torch.equal(direct[0], again[0])
    part.eval()
    assert torch.equal(part(x).dense(), part(x).dense())


def test_a_training_that_diverged_breaks_nothing_here():
    part = search()
    with torch.no_grad():
        part.logits.fill_(torch.nan)
    end(part)
    assert sorted(part.order[0].tolist()) == list(range(E))


def test_scipy_is_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(GateworkError, match=r'needs scipy: pip install "gatework\[bench\]"'):
        build("permutation_search", "gate", d_model=D, n_experts=E)


def test_wrong_arguments():
    for settings, message in (({"phase": 0.0}, "share of the"), ({"noise": -1.0}, "at least 0"), ({"entropy": -1.0}, "at least 0")):
        with pytest.raises(ValueError, match=message):
            PermutationSearch(D, E, **settings)
    with pytest.raises(GateworkError, match="no gate 'comett'; did you mean 'comet'"):
        PermutationSearch(D, E, gate="comett")


class ByPlace(Gate):
    """Routes each token to the expert that its condition names."""

    conditions = ("place",)

    def forward(self, x, mask=None, *, place):
        return Routing(x.new_ones(len(x), 1), place[:, None], E)


def test_conditions_reach_the_gate_behind():
    layer = MoE(D, d_ff=5, experts=E, gate=end(PermutationSearch(D, E, gate=ByPlace()))).double()
    x, place = tokens(), torch.arange(20) % E
    plain = MoE(D, d_ff=5, experts=E, gate=ByPlace()).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    torch.testing.assert_close(layer(x, place=place), plain(x, place=layer.gate.order[0][place]), rtol=0, atol=1e-14)
    with pytest.raises(GateworkError, match="chooses by place too"):
        layer(x)
