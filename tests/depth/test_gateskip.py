"""GateSkip against a slow reference that computes every branch for every token and masks."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import gatework
from gatework.core import advance, losses, metrics
from gatework.core.cost import count_flops
from gatework.depth import GateSkip, Stack, gateskip
from gatework.depth.base import Block
from gatework.experts import MoE
from gatework.feedforward import GLU, VersatileFFN
from gatework.mixers import Attention, GatedLinearAttention

D, HEADS, D_FF, LAYERS = 16, 2, 24, 3
FORMS = ["vector", "scalar", "mlp"]


def plain_blocks(layers: int = LAYERS) -> list[Block]:
    return [Block(Attention(D, heads=HEADS), GLU(D, D_FF), D) for _ in range(layers)]


def mixed_blocks() -> list[Block]:
    return [
        Block(Attention(D, heads=4, kv_heads=2, window=4), MoE(D, d_ff=8, experts=4), D),
        Block(GatedLinearAttention(D, heads=2), VersatileFFN(D, 32, experts=4), D),
        Block(Attention(D, heads=HEADS, qk_norm=True), GLU(D, D_FF), D),
    ]


def policy(blocks=plain_blocks, **settings) -> GateSkip:
    """Skips from the first step; gates that differ between tokens and branches."""
    torch.manual_seed(0)
    m = GateSkip(blocks(), D, **({"warmup": 0.0, "budget": 0.5} | settings)).double()
    for name, p in m.named_parameters():
        nn.init.uniform_(p, 0.5, 1.5) if p.dim() == 1 and "norm" in name else nn.init.normal_(p, std=0.3)
    return m


def inputs(length: int = 12, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mask(length: int = 12) -> torch.Tensor:
    """Row 0 padded left, row 1 right; 8 of 12 tokens each are real."""
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :4] = real[1, -4:] = False
    return real


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = min(int(place), len(values) - 2) if len(values) > 1 else 0
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


class Reference:
    """One pass: ``y``, and per layer and branch ``keeps`` (B, T), ``importances`` (B, T), ``gates`` (N real tokens, D or 1)."""

    def __init__(self, m: GateSkip, x, real=None, skip=None, taus=None, **given):
        """``skip``: the share to skip by each batch's own quantile, per layer and branch; ``taus``: thresholds instead."""
        self.keeps, self.importances, self.gates = [], [], []
        self.m, self.real = m, torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        given = given if real is None else given | {"mask": real}
        for layer, block in enumerate(m.blocks):
            u = self.norm(x, block.mixer_norm.weight)
            g, keep = self.gate(layer, "mixer", u, skip and skip[layer][0], taus and taus[layer][0])
            x = torch.where(keep[..., None], x + g * block.mixer(u, **given), x)
            if block.feedforward.owns_residual:
                g, keep = self.gate(layer, "feedforward", self.norm(x, 1.0), skip and skip[layer][1], taus and taus[layer][1])
                y = block.feedforward(x, mask=keep) - x
            else:
                u = self.norm(x, block.feedforward_norm.weight)
                g, keep = self.gate(layer, "feedforward", u, skip and skip[layer][1], taus and taus[layer][1])
                y = block.feedforward(u, mask=keep)
            x = torch.where(keep[..., None], x + g * y, x)
        self.y = x

    @staticmethod
    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    def gate(self, layer, branch, u, skip, tau):
        gate = self.m.gates[layer % len(self.m.gates)][branch]
        u = u.detach()
        if gate.hidden is not None:
            u = (u @ gate.hidden.weight.T + gate.hidden.bias).clamp(min=0)
        g = 1 / (1 + (-(u @ gate.out.weight.T + gate.out.bias)).exp())
        importance = g.detach().mean(-1)
        if skip is not None:
            tau = quantile(importance[self.real].tolist(), skip) if skip > 0 else -math.inf
        keep = self.real if tau == -math.inf else (importance >= tau) & self.real
        self.keeps.append(keep)
        self.importances.append(importance)
        self.gates.append(g[self.real])
        return g, keep

    def mean(self, what):
        return torch.stack([what(g).mean() for g in self.gates]).mean()


def entropy(g):
    return -(g * g.log() + (1 - g) * (1 - g).log())


def everywhere(value, layers: int = LAYERS):
    return [(value, value)] * layers


def assert_same_gradients(m, leaves, mine, theirs, atol=1e-10):
    upstream = torch.randn(mine.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    a = torch.autograd.grad(mine, leaves, upstream, materialize_grads=True, retain_graph=True)
    b = torch.autograd.grad(theirs, leaves, upstream, materialize_grads=True, retain_graph=True)
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=atol)


# Training: each branch skips by the quantile of the batch.


@pytest.mark.parametrize("dense_above", [0.0, 0.9], ids=["masked", "gathered"])
@pytest.mark.parametrize("budget", [1.0, 0.75, 0.5, 0.125])
@pytest.mark.parametrize("padded", [False, True])
def test_training_equals_the_reference_with_all_gradients(budget, padded, dense_above, monkeypatch):
    monkeypatch.setattr(gateskip, "DENSE_ABOVE", dense_above)
    m, x = policy(budget=budget), inputs().requires_grad_()
    real = mask() if padded else None
    got = m(x, mask=real)
    said = losses(m)
    expected = Reference(m, x, real, skip=everywhere(1 - budget))
    where = expected.real
    torch.testing.assert_close(got[where], expected.y[where], rtol=0, atol=1e-12)
    leaves = [x, *m.parameters()]
    assert_same_gradients(m, leaves, got[where], expected.y[where])
    for name, value in (("sparsity", expected.mean(torch.square)), ("entropy", expected.mean(entropy))):
        torch.testing.assert_close(said[name], 0.01 * value, rtol=0, atol=1e-14)
        assert_same_gradients(m, leaves, said[name], 0.01 * value, atol=1e-14)
    kept = torch.stack([keep.sum() / where.sum() for keep in expected.keeps])
    if budget < 1:
        n = int(where.sum())
        assert kept.tolist() == [pytest.approx((n - math.ceil((1 - budget) * (n - 1))) / n)] * (2 * LAYERS)


@pytest.mark.parametrize("dense_above", [0.0, 0.9], ids=["masked", "gathered"])
@pytest.mark.parametrize("gate_form", FORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_every_gate_form_over_every_kind_of_branch(gate_form, shared, dense_above, monkeypatch):
    monkeypatch.setattr(gateskip, "DENSE_ABOVE", dense_above)
    m, x = policy(mixed_blocks, gate_form=gate_form, shared=shared), inputs().requires_grad_()
    # Branches in eval mode are free of noise; the policy itself trains.
    for block in m.blocks:
        block.eval()
    got, expected = m(x, mask=mask()), Reference(m, x, mask(), skip=everywhere(0.5))
    torch.testing.assert_close(got[mask()], expected.y[mask()], rtol=0, atol=1e-12)
    assert_same_gradients(m, [x, *m.parameters()], got[mask()], expected.y[mask()])
    segments = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    expected = Reference(m, x, skip=everywhere(0.5), segments=segments)
    torch.testing.assert_close(m(x, segments=segments), expected.y, rtol=0, atol=1e-12)


def test_gates_start_at_0993_and_the_quantile_still_tells_tokens_apart():
    torch.manual_seed(0)
    m = GateSkip(plain_blocks(), D, budget=0.5, warmup=0.0)
    for gates in m.gates:
        for gate in gates.values():
            assert torch.equal(gate.out.bias, torch.full((D,), 5.0))
            assert gate.out.weight.std().item() == pytest.approx(0.01, rel=0.2)
    m(inputs(128, 4).float())
    found = metrics(m)
    for branch in ("mixer", "feedforward"):
        assert found[f"gate_{branch}"].tolist() == pytest.approx([1 / (1 + math.exp(-5))] * LAYERS, abs=2e-4)
        assert found[f"kept_{branch}"].tolist() == pytest.approx([0.5] * LAYERS, abs=0.02)


def test_metrics_are_those_of_the_reference():
    m, x = policy(mixed_blocks, budget=0.75), inputs()
    for block in m.blocks:
        block.eval()
    m.set_budget(0.25, layer=1)
    skip = [(0.25, 0.25), (0.75, 0.75), (0.25, 0.25)]
    m(x, mask=mask())
    found, expected = metrics(m), Reference(m, x, mask(), skip=skip)
    kept = torch.stack([keep.sum() / 16 for keep in expected.keeps]).view(LAYERS, 2)
    mean = torch.stack([a[mask()].mean() for a in expected.importances]).view(LAYERS, 2)
    for i, branch in enumerate(("mixer", "feedforward")):
        torch.testing.assert_close(found[f"kept_{branch}"].double(), kept[:, i].double(), rtol=0, atol=1e-7)
        torch.testing.assert_close(found[f"gate_{branch}"], mean[:, i], rtol=0, atol=1e-13)
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("form", ["l2", "l1", "kl"])
def test_losses_by_form_and_weight(form):
    budget = 0.75
    m, x = policy(sparsity=form, budget=budget, lam_s=0.3, lam_e=0.7), inputs()
    m(x)
    said, expected = losses(m), Reference(m, x, skip=everywhere(1 - budget))
    what = {
        "l2": torch.square,
        "l1": lambda g: g,
        "kl": lambda g: g * (g / budget).log() + (1 - g) * ((1 - g) / (1 - budget)).log(),
    }[form]
    leaves = list(m.gates.parameters())
    for name, value in (("sparsity", 0.3 * expected.mean(what)), ("entropy", 0.7 * expected.mean(entropy))):
        torch.testing.assert_close(said[name], value, rtol=0, atol=1e-13)
        assert_same_gradients(m, leaves, said[name], value, atol=1e-12)


def test_losses_are_training_only_and_vanish_with_their_weights():
    m, x = policy(lam_s=0.0), inputs()
    m(x)
    assert set(losses(m)) == {"entropy"}
    m.eval()(x)
    assert losses(m) == {}


def test_the_losses_reach_the_gates_alone():
    m, x = policy(), inputs().requires_grad_()
    m(x)
    sum(losses(m).values()).backward()
    assert x.grad is None
    assert all(p.grad is None for p in m.blocks.parameters())
    assert all(p.grad.abs().max() > 0 for p in m.gates.parameters())


def test_saturated_gates_have_finite_losses_and_gradients():
    m, x = policy(gate_form="scalar"), inputs()
    for sign in (200.0, -200.0):
        for gates in m.gates:
            for gate in gates.values():
                nn.init.constant_(gate.out.bias, sign)
        m.zero_grad()
        y = m(x)
        (y.sum() + sum(losses(m).values())).backward()
        assert torch.isfinite(y).all()
        assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)


# The base model, and what skipping leaves alone.


@pytest.mark.parametrize("training", [True, False])
def test_open_gates_without_skipping_are_the_plain_stack(training):
    m, x = policy(budget=1.0, gate_form="vector").train(training), inputs()
    with torch.no_grad():
        for gates in m.gates:
            for gate in gates.values():
                gate.out.weight.zero_()
                gate.out.bias.fill_(1000.0)
    stack = Stack(m.blocks).train(training)
    torch.testing.assert_close(m(x), stack(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(m(x, mask=mask())[mask()], stack(x, mask=mask())[mask()], rtol=0, atol=1e-13)


def test_equal_gates_skip_nothing_and_not_everything():
    m, x = policy(), inputs()
    with torch.no_grad():
        for gates in m.gates:
            for gate in gates.values():
                gate.out.weight.zero_()
    m(x)
    found = metrics(m)
    assert found["kept_mixer"].tolist() == found["kept_feedforward"].tolist() == [1.0] * LAYERS


@pytest.mark.parametrize("dense_above", [0.0, 0.9], ids=["masked", "gathered"])
def test_skipped_rows_of_the_stream_are_the_same_bits(dense_above, monkeypatch):
    monkeypatch.setattr(gateskip, "DENSE_ABOVE", dense_above)
    torch.manual_seed(3)
    for name in ("mixer", "feedforward"):
        m, x = policy(lambda: plain_blocks(1)), inputs(64)
        # The other branch keeps all, and adds exactly nothing.
        other = "feedforward" if name == "mixer" else "mixer"
        m.set_budget(1.0, branch=other)
        last = m.blocks[0].feedforward.down if other == "feedforward" else m.blocks[0].mixer.o_proj
        nn.init.zeros_(last.weight)
        y, keep = m(x), Reference(m, x, skip=[(0.5, 0.0) if name == "mixer" else (0.0, 0.5)]).keeps[name != "mixer"]
        assert torch.equal(y[~keep], x[~keep])
        assert keep.sum() == 64
        assert (y[keep] != x[keep]).any(-1).all()


def test_the_gate_is_read_from_a_detached_stream():
    m, x = policy(lambda: plain_blocks(1), budget=1.0), inputs().requires_grad_()
    # Branches that return constants: the stream's gradient is that of the residual path alone.
    m.blocks[0].mixer.forward = lambda u, **_: torch.ones_like(u)
    m.blocks[0].feedforward.forward = lambda u, **_: torch.ones_like(u)
    m(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert m.gates[0]["mixer"].out.weight.grad.abs().max() > 0


# What is not kept is not computed.


def branch_flops(m: GateSkip, keeps: list[torch.Tensor]) -> tuple[int, int, int]:
    """Linear maps of the branches, scores, and gates, for a batch of one row with fewer kept tokens than a chunk of queries.

    With every token kept the fused causal kernel computes the pairs that see each other, else a mask hides them from the result.
    """
    linear = scores = gates = 0
    for mixer, feedforward in zip(keeps[::2], keeps[1::2], strict=True):
        n, kept, reach = mixer.numel(), int(mixer.sum()), int(mixer[0].nonzero().max()) + 1
        linear += 2 * D * D * (2 * n + 2 * kept) + 2 * 3 * D * D_FF * int(feedforward.sum())
        scores += 2 * 2 * D * (n * (n + 1) // 2 if kept == n else kept * reach)
        gates += 2 * n * 2 * D * D
    return linear, scores, gates


def test_flops_at_half_the_budget():
    m, x = policy(), inputs(64, 1)
    keeps = Reference(m, x, skip=everywhere(0.5)).keeps
    assert [int(keep.sum()) for keep in keeps] == [32] * (2 * LAYERS)
    with torch.no_grad():
        assert gatework.profile(m, x, repeats=1).flops == sum(branch_flops(m, keeps))
        m.set_budget(1.0)
        everyone = [torch.ones(1, 64, dtype=torch.bool)] * (2 * LAYERS)
        assert gatework.profile(m, x, repeats=1).flops == sum(branch_flops(m, everyone))


def test_flops_of_the_backward_pass_at_half_the_budget():
    m, x = policy(), inputs(64, 1).requires_grad_()
    keeps = Reference(m, x, skip=everywhere(0.5)).keeps
    by_op = gatework.profile(m, x, backward=True, repeats=1).flops_by_op
    linear, _, gates = branch_flops(m, keeps)
    # Forward, and twice that backward; the gates' inputs are detached and cost one product less.
    assert by_op["mm"] + by_op["addmm"] == 3 * linear + 2 * gates


def test_flops_of_other_branches_and_outside_training():
    m, x = policy(mixed_blocks), inputs(64, 1)
    with torch.no_grad(), m.calibrating():
        m(x)
    m.eval()
    half = gatework.profile(m, x, repeats=1).flops_by_module
    m.set_budget(1.0)
    whole = gatework.profile(m, x, repeats=1).flops_by_module
    for name in ("0.feedforward", "2.feedforward"):
        assert half[f"blocks.{name}"] * 64 == whole[f"blocks.{name}"] * round(half[f"blocks.{name}"] / whole[f"blocks.{name}"] * 64)
        assert 0.35 < half[f"blocks.{name}"] / whole[f"blocks.{name}"] < 0.65
    for name in ("0.mixer", "1.mixer", "2.mixer", "1.feedforward"):
        assert half[f"blocks.{name}"] < 0.9 * whole[f"blocks.{name}"]


def test_almost_everything_kept_runs_for_all_and_masks():
    m, x = policy(budget=0.95), inputs(64, 1)
    with torch.no_grad(), count_flops() as count:
        m(x)
    everyone = [torch.ones(1, 64, dtype=torch.bool)] * (2 * LAYERS)
    assert count.total == sum(branch_flops(m, everyone))
    assert metrics(m)["kept_mixer"].tolist() == pytest.approx([60 / 64] * LAYERS)


# Budgets and their schedule.


def test_the_kept_share_falls_linearly_over_the_warmup():
    # All numbers are exact in binary: step / 32 of 97 tokens skip, and the quantile's place 3 step is a whole number.
    m, x, total = policy(budget=0.5, warmup=0.5), inputs(97, 1), 32
    for step in range(total + 1):
        if step:
            advance(m, step, total)
        m(x)
        found = metrics(m)
        kept = (97 - 3 * min(step, 16)) / 97
        assert found["kept_mixer"].tolist() == found["kept_feedforward"].tolist() == [pytest.approx(kept, abs=1e-6)] * LAYERS
    assert m.progress == 1


@pytest.mark.parametrize(("warmup", "before", "after"), [(0.0, 1.0, 1.0), (0.5, 0.0, 0.2), (1.0, 0.0, 0.1)])
def test_progress_by_hand(warmup, before, after):
    m = policy(warmup=warmup)
    assert m.progress == before
    m.advance(1, 10)
    assert m.progress.item() == pytest.approx(after, abs=1e-7)
    m.advance(10, 10)
    assert m.progress == 1


def test_without_advance_nothing_is_skipped_in_training_while_it_warms_up():
    m, x = policy(warmup=0.5), inputs()
    torch.testing.assert_close(m(x), Reference(m, x, skip=everywhere(0.0)).y, rtol=0, atol=1e-12)


def test_budgets_of_single_layers_and_branches():
    m, x = policy(budget=0.75), inputs()
    m.set_budget(0.5, layer=1)
    m.set_budget(0.25, branch="mixer")
    m.set_budget(1.0, layer=2, branch="feedforward")
    assert m.budgets.tolist() == [[0.25, 0.75], [0.25, 0.5], [0.25, 1.0]]
    expected = Reference(m, x, skip=[(0.75, 0.25), (0.75, 0.5), (0.75, 0.0)])
    torch.testing.assert_close(m(x), expected.y, rtol=0, atol=1e-12)


def test_resuming_goes_on_where_it_was():
    def some_steps(m, start, stop):
        for step in range(start, stop + 1):
            m(inputs(seed=step))
            advance(m, step, 10)

    whole, first = policy(warmup=1.0), policy(warmup=1.0)
    some_steps(whole, 1, 7)
    some_steps(first, 1, 4)
    first.set_budget(0.5)
    resumed = policy(warmup=1.0, budget=0.9)
    resumed.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    some_steps(resumed, 5, 7)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    x = inputs(seed=50)
    assert torch.equal(resumed(x), whole(x))
    assert torch.equal(resumed.eval()(x), whole.eval()(x))
    twin = copy.deepcopy(whole)
    assert torch.equal(twin(x), whole(x))


# Outside training: thresholds.


def halfway(values: list[float], tau: float) -> float:
    """Between the least kept and the largest skipped value."""
    kept, skipped = [v for v in values if v >= tau], [v for v in values if v < tau]
    return (min(kept) + max(skipped)) / 2 if skipped else min(kept)


def quantile_tables(m, x, real=None, skip=0.5):
    importances = Reference(m, x, real, skip=everywhere(skip)).importances
    real = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
    rows = [[halfway(a[real].tolist(), quantile(a[real].tolist(), i / 100)) for i in range(101)] for a in importances]
    return torch.tensor(rows, dtype=torch.float64).view(LAYERS, 2, 101)


def test_the_tables_are_running_quantiles_of_the_real_tokens(monkeypatch):
    monkeypatch.setattr(gateskip, "TOKENS", 256)
    m, expected = policy(), None
    assert (m.quantiles == -math.inf).all()
    for step in range(30):
        x, real = inputs(seed=step), mask() if step % 2 else None
        table = quantile_tables(m, x, real)
        rate = max(1 / (step + 1), (24 if real is None else int(real.sum())) / 256)
        expected = table if expected is None else (1 - rate) * expected + rate * table
        m(x, mask=real)
        torch.testing.assert_close(m.quantiles, expected, rtol=0, atol=1e-6 if step else 1e-13)
    assert m.passes == 30


def test_a_batch_of_many_tokens_replaces_the_table(monkeypatch):
    monkeypatch.setattr(gateskip, "TOKENS", 24)
    m = policy()
    for step in range(3):
        expected = quantile_tables(m, inputs(seed=step))
        m(inputs(seed=step))
        torch.testing.assert_close(m.quantiles, expected, rtol=0, atol=1e-13)


def test_thresholds_keep_away_from_importances_that_many_tokens_share():
    importance = torch.tensor([0.9, 0.1, 0.5, 0.5, 0.1, 0.5, 0.5, 0.9, 0.1, 0.5], dtype=torch.float64)
    tau = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.9], dtype=torch.float64)
    expected = torch.tensor([0.1, 0.3, 0.3, 0.7, 0.7], dtype=torch.float64)
    torch.testing.assert_close(gateskip._between(importance, tau), expected, rtol=0, atol=1e-15)
    last = math.nextafter(1.0, 0.0)
    neighbours = torch.tensor([last, 1.0], dtype=torch.float64)
    assert gateskip._between(neighbours, neighbours).tolist() == [last, 1.0]


def test_calibrating_counts_alike_and_starts_anew():
    m = policy()
    m(100 * inputs(seed=99))
    m.eval()
    with torch.no_grad(), m.calibrating():
        for step in range(30):
            m(inputs(seed=step))
    expected = torch.stack([quantile_tables(m, inputs(seed=step)) for step in range(30)]).mean(0)
    torch.testing.assert_close(m.quantiles, expected, rtol=0, atol=1e-6)
    before = m.quantiles.clone()
    m(inputs(seed=100))
    assert torch.equal(m.quantiles, before)


def test_calibrating_skips_at_the_full_budgets_whatever_the_warmup():
    m, x = policy(warmup=0.5).eval(), inputs()
    with m.calibrating():
        torch.testing.assert_close(m(x), Reference(m, x, skip=everywhere(0.5)).y, rtol=0, atol=1e-12)


def test_calibrating_ends_after_an_error():
    m = policy().eval()
    with pytest.raises(RuntimeError, match="stop"), m.calibrating():
        raise RuntimeError("stop")
    m(inputs())
    assert m.passes == 0


def test_thresholds_are_read_between_the_tables_quantiles():
    m = policy()
    with torch.no_grad():
        m.quantiles.copy_(torch.linspace(0, 1, 101).double().square().expand_as(m.quantiles))
    m.set_budget(0.75)
    m.set_budget(0.495, layer=1)
    m.set_budget(1.0, layer=2)
    m.set_budget(1e-9, layer=2, branch="mixer")
    thresholds = m.thresholds().tolist()
    assert thresholds[0] == [pytest.approx(0.25**2, abs=1e-7)] * 2
    assert thresholds[1] == [pytest.approx((0.5**2 + 0.51**2) / 2, abs=1e-6)] * 2
    assert thresholds[2] == [pytest.approx(1.0, abs=1e-7), -math.inf]


def learned(blocks=plain_blocks, **settings) -> GateSkip:
    m = policy(blocks, **settings).eval()
    with torch.no_grad(), m.calibrating():
        for step in range(8):
            m(inputs(40, 4, seed=step))
    return m


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.25])
def test_outside_training_the_stored_thresholds_decide(budget):
    m, x = learned(), inputs(60, 4, seed=77).requires_grad_()
    m.set_budget(budget)
    expected = Reference(m, x, taus=m.thresholds().tolist())
    got = m(x)
    torch.testing.assert_close(got, expected.y, rtol=0, atol=1e-12)
    assert_same_gradients(m, [x, *m.parameters()], got, expected.y, atol=1e-9)
    # New data of the same kind are skipped to about the budget; the first branch has seen just this kind.
    found = metrics(m)
    assert found["kept_mixer"][0].item() == pytest.approx(budget, abs=0.1)


def test_untrained_nothing_is_skipped_outside_training():
    m, x = policy(budget=0.25).eval(), inputs()
    assert (m.thresholds() == -math.inf).all()
    torch.testing.assert_close(m(x), Reference(m, x, skip=everywhere(0.0)).y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 7], [1, 3, 8]])
@pytest.mark.parametrize("budget", [0.75, 0.5, 0.1])
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_whole_under_the_same_decisions(pieces, budget, padded):
    m, x = learned(mixed_blocks, budget=budget), inputs(seed=31)
    real = mask() if padded else torch.ones(2, 12, dtype=torch.bool)
    state, got, kept = m.init_state(2), [], 0.0
    with torch.no_grad():
        for piece, part in zip(x.split(pieces, 1), real.split(pieces, 1), strict=True):
            got.append(m(piece, state=state, mask=part if padded else None))
            kept += metrics(m)["kept_mixer"].double() * part.sum()
        whole = m(x, mask=real if padded else None)
    torch.testing.assert_close(torch.cat(got, 1)[real], whole[real], rtol=0, atol=1e-11)
    share = metrics(m)["kept_mixer"].double()
    torch.testing.assert_close(kept / real.sum(), share, rtol=0, atol=1e-6)
    assert 0 < share.mean() < 1
    if not padded:
        assert state.nbytes == 2 * m.state_bytes(12)


def test_outside_training_tokens_see_neither_the_future_nor_other_rows():
    m, x = learned(mixed_blocks), inputs(seed=31)
    with torch.no_grad():
        whole = m(x)
        torch.testing.assert_close(m(x[1:]), whole[1:], rtol=0, atol=1e-12)
        changed = x.clone()
        changed[:, 8:] = 10 * torch.randn(2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
        torch.testing.assert_close(m(changed)[:, :8], whole[:, :8], rtol=0, atol=1e-12)


def test_keys_and_values_of_skipped_tokens_are_of_their_own_stream():
    m, x = learned(), inputs(seed=31)
    state = m.init_state(2)
    with torch.no_grad():
        m(x, state=state)
        whole = Reference(m, x, taus=m.thresholds().tolist())
        assert not whole.keeps[0].all()
        block = m.blocks[0]
        v = Reference.norm(x, block.mixer_norm.weight) @ block.mixer.v_proj.weight.T
        torch.testing.assert_close(state.layers[0].used()[1], v.view(2, 12, HEADS, -1).transpose(1, 2), rtol=0, atol=1e-12)
    assert all(layer.length == 12 for layer in state.layers)


def test_masked_tokens_enter_no_routing_loss_either(monkeypatch):
    said = []
    for dense_above in (0.0, 0.9):
        monkeypatch.setattr(gateskip, "DENSE_ABOVE", dense_above)
        m = policy(lambda: [Block(Attention(D, heads=HEADS), MoE(D, d_ff=8, experts=4), D)])
        m(inputs(), mask=mask())
        said.append({path: value for path, value in losses(m).items() if path.startswith("blocks")})
    assert said[0]
    for path, value in said[0].items():
        torch.testing.assert_close(value, said[1][path], rtol=0, atol=1e-13)


# Around it.


def test_padding_does_not_touch_decisions_losses_or_tables():
    alone, padded = policy(), policy()
    x = inputs()
    wide = torch.cat([100 * inputs(5, seed=8), x, 100 * inputs(3, seed=9)], 1)
    real = torch.zeros(2, 20, dtype=torch.bool)
    real[:, 5:17] = True
    torch.testing.assert_close(padded(wide, mask=real)[:, 5:17], alone(x), rtol=0, atol=1e-12)
    for (name, a), b in zip(losses(alone).items(), losses(padded).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14, msg=name)
    torch.testing.assert_close(padded.quantiles, alone.quantiles, rtol=0, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_padding_alone(training):
    m, x = learned().train(training), inputs()
    before = m.quantiles.clone()
    y = m(x, mask=torch.zeros(2, 12, dtype=torch.bool))
    assert torch.isfinite(y).all()
    assert torch.equal(m.quantiles, before)
    assert all(float(value.detach()) == 0 for value in losses(m).values())


def test_checkpointing_gives_the_same_gradients_and_counts_a_pass_once():
    direct, again = policy(), policy()
    x = inputs().requires_grad_()
    expected = torch.autograd.grad(direct(x).square().sum(), [x, *direct.blocks.parameters()])
    # Without early stopping the recomputation runs to the end of the pass, as a block inside a larger checkpoint does.
    with set_checkpoint_early_stop(False):
        y = checkpoint(again, x, use_reentrant=False)
    said = losses(again)
    got = torch.autograd.grad(y.square().sum(), [x, *again.blocks.parameters()])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert set(said) == {"sparsity", "entropy"}
    assert losses(again) == {}
    assert again.passes == 1
    assert torch.equal(again.quantiles, direct.quantiles)


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_bfloat16_model_keeps_float32_tables(budget):
    m = learned(budget=budget).float()
    x = inputs(40).float()
    exact = m(x)
    m.bfloat16()
    assert {name: getattr(m, name).dtype for name in ("quantiles", "budgets", "progress")} == dict.fromkeys(
        ("quantiles", "budgets", "progress"), torch.float32
    )
    y = m(x.bfloat16())
    assert y.dtype == torch.bfloat16
    # Decisions near a threshold may differ; most tokens agree to bf16's resolution.
    error = (y.float() - exact).abs().amax(-1) / exact.abs().amax(-1)
    assert error.median() < 0.05


def test_bfloat16_autocast_trains():
    m, x = policy().float(), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.float32
    (y.square().mean() + sum(losses(m).values())).backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters() if p.grad is not None)
    assert m.quantiles.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "gate_parameters"),
    [
        ({}, LAYERS * 2 * (D * D + D)),
        ({"gate_form": "scalar"}, LAYERS * 2 * (D + 1)),
        ({"gate_form": "mlp"}, LAYERS * 2 * 2 * (D * D + D)),
        ({"shared": True}, 2 * (D * D + D)),
    ],
    ids=str,
)
def test_parameters_of_the_gates(settings, gate_parameters):
    m = policy(**settings)
    assert sum(p.numel() for p in m.gates.parameters()) == gate_parameters
    base = sum(p.numel() for p in Stack(plain_blocks()).parameters())
    assert sum(p.numel() for p in m.parameters()) == base + gate_parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0.0}, r"budget must be in \(0, 1\], got 0.0"),
        ({"budget": 1.5}, r"budget must be in \(0, 1\], got 1.5"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\], got -0.1"),
        ({"warmup": 1.1}, r"warmup must be in \[0, 1\], got 1.1"),
        ({"lam_s": -1.0}, "loss weights must be at least 0, got lam_s -1.0 and lam_e 0.01"),
        ({"lam_e": -1.0}, "loss weights must be at least 0, got lam_s 0.01 and lam_e -1.0"),
    ],
)
def test_what_is_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        policy(**settings)


def test_set_budget_refuses():
    m = policy()
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\], got 0"):
        m.set_budget(0.0)
    with pytest.raises(ValueError, match=r"layer must be in 0 \.\. 2, got 3"):
        m.set_budget(0.5, layer=3)
