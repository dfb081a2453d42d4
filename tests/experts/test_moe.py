"""The mixture of experts against a loop over tokens."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gatework.core import Gate, PartError, Routing, build, capability, losses, metrics
from gatework.experts import MoE
from gatework.feedforward import GLU, MLP
from gatework.ops.dispatch import ENGINES

from ..contracts import checks
from ..contracts.parts import Case

D, H = 8, 6


def layer(**settings) -> MoE:
    torch.manual_seed(0)
    made = MoE(D, **({"d_ff": H, "experts": 4} | settings)).double()
    if hasattr(made.gate, "weight"):
        torch.nn.init.normal_(made.gate.weight)
    return made


def tokens(n: int = 13) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expert(m: MoE, x, w_in, w_out):
    h = w_in @ x
    return w_out @ (F.silu(h[:H]) * h[H:] if m.glu else F.silu(h))


def reference(m: MoE, x: torch.Tensor, limit: float = math.inf) -> torch.Tensor:
    """Equation 1, token by token; with a limit, slot 0 of all tokens claims first, then slot 1, and so on."""
    routing = m.gate(x)
    served = [0] * m.experts
    rows = [torch.zeros(D, dtype=torch.float64) for _ in x]
    for slot in range(routing.experts.shape[1]):
        for n in range(len(x)):
            e = int(routing.experts[n, slot])
            if routing.weights[n, slot] != 0 and served[e] < limit:
                served[e] += 1
                output = expert(m, x[n], m.w_in[e], m.w_out[e]) if m.listed is None else m.listed[e](x[n])
                rows[n] = rows[n] + routing.weights[n, slot] * output
    for s in range(m.shared):
        rows = [row + expert(m, x[n], m.shared_in[s], m.shared_out[s]) for n, row in enumerate(rows)]
    return torch.stack(rows)


CASES = [
    {},
    {"glu": False},
    {"shared": 2},
    {"experts": 32},
    {"gate": "topk(k=1)"},
    {"gate": "topk(k=4)"},
    {"gate": "topk(score=sigmoid)"},
    {"capacity": 1.0},
    {"capacity": 1.25, "shared": 1},
    {"capacity": 1.0, "experts": 16, "min_capacity": 3},
    {"experts": ["glu(d_ff=12)", "mlp", MLP, "glu(activation=gelu, bias=true)"]},
    {"experts": ["glu", "mlp", "moe(experts=3)"], "shared": 1, "capacity": 1.0, "gate": "topk(k=1)"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_equals_the_loop_with_all_gradients(settings):
    m, x = layer(**settings).eval(), tokens().requires_grad_()
    k = m.gate.k
    limit = math.inf if m.capacity is None else max(m.min_capacity, math.ceil(m.capacity * len(x) * k / m.experts))
    got, expected = m(x), reference(m, x, limit)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    leaves = [x, *m.parameters()]
    mine = torch.autograd.grad(got.sum(), leaves, materialize_grads=True)
    theirs = torch.autograd.grad(expected.sum(), leaves, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "settings", [{}, {"experts": 32, "shared": 1}, {"experts": 1, "gate": "topk(k=1)"}, {"gate": "topk(k=4)"}], ids=str
)
def test_every_engine_equals_the_loop_under_checkpointing_too(settings, engine):
    results = []
    for name in ("loop", engine, engine):
        m, x = layer(**settings, engine=name), tokens().requires_grad_()
        y = m(x) if not results else checkpoint(m, x, use_reentrant=False)
        total = y.sum() + sum(losses(m).values())  # sum: the incoming gradient has stride 0.
        results.append([y, *torch.autograd.grad(total, [x, *m.parameters()])])
        with torch.no_grad():  # Without a graph, and for a single token, there are shorter ways.
            torch.testing.assert_close(m.eval()(x), y, rtol=0, atol=1e-12)
            torch.testing.assert_close(m(x[3:4]), y[3:4], rtol=0, atol=1e-12)
            assert m(x[:0]).shape == (0, D)
            order = torch.randperm(len(x))
            torch.testing.assert_close(m(x[order]), y[order], rtol=0, atol=1e-12)
    for expected, first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, expected, rtol=0, atol=1e-11)
        assert torch.equal(first, second)


def static(m: MoE, x: torch.Tensor, capacity: int) -> torch.Tensor:
    """One-hot dispatch: every expert computes ``capacity`` rows, used or not."""
    routing = m.gate(x)
    chosen = F.one_hot(routing.experts, m.experts).transpose(0, 1)  # (k, N, E): slot 0 of all tokens claims first.
    place = (chosen.flatten(0, 1).cumsum(0).view_as(chosen) - 1)[..., None] == torch.arange(capacity)
    mask = place * chosen[..., None].to(x.dtype)
    buffer = torch.einsum("knec,nd->ecd", mask, x)
    g, u = torch.einsum("ecd,ehd->ech", buffer, m.w_in).chunk(2, -1)
    y = torch.einsum("ech,edh->ecd", F.silu(g) * u, m.w_out)
    return torch.einsum("knec,nk,ecd->nd", mask, routing.weights, y)


@pytest.mark.parametrize("settings", [{}, {"experts": 16}, {"gate": "topk(k=4)"}, {"capacity": 1.0}], ids=str)
def test_dynamic_equals_static_dispatch_with_all_gradients(settings):
    m, x = layer(**settings), tokens().requires_grad_()
    k = m.gate.k
    capacity = math.ceil(len(x) * k / m.experts) if m.capacity else len(x)
    results = [
        [y, *torch.autograd.grad(y.square().sum(), [x, *m.parameters()], materialize_grads=True)]
        for y in (m(x), static(m, x, capacity))
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", ["segments", "bmm"])
def test_executed_rows_are_the_used_slots_or_the_buffer(engine):
    m, x = layer(experts=16, engine=engine), tokens(40)
    with FlopCounterMode(display=False) as counter:
        m(x)
    per_row, router = 2 * D * 3 * H, 2 * D * 16
    rows = 40 * 2 if engine == "segments" else 16 * int(m.gate(x).counts().max())
    assert counter.get_total_flops() == rows * per_row + 40 * router


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("experts", [8, 64])
def test_few_tokens_of_decoding_in_float32(n, experts):
    torch.manual_seed(0)
    m = MoE(256, d_ff=512, experts=experts).eval()
    x = torch.randn(n, 256)
    with torch.no_grad():
        got = m(x)
    torch.testing.assert_close(got.double(), copy.deepcopy(m).double()(x.double()), rtol=0, atol=1e-5)


def test_one_expert_is_a_plain_feed_forward():
    m, x = layer(experts=1, gate="topk(k=1, normalize=renorm)"), tokens()
    g, u = (x @ m.w_in[0].T).chunk(2, -1)
    torch.testing.assert_close(m(x), (F.silu(g) * u) @ m.w_out[0].T, rtol=0, atol=1e-12)


def test_identical_experts_are_one_feed_forward():
    m, x = layer(), tokens()
    with torch.no_grad():
        m.w_in.copy_(m.w_in[:1].expand_as(m.w_in))
        m.w_out.copy_(m.w_out[:1].expand_as(m.w_out))
    g, u = (x @ m.w_in[0].T).chunk(2, -1)
    torch.testing.assert_close(m(x), (F.silu(g) * u) @ m.w_out[0].T, rtol=0, atol=1e-12)


def test_enough_capacity_is_dropless():
    m, x = layer(capacity=4.0), tokens()
    torch.testing.assert_close(m(x), layer()(x), rtol=0, atol=0)
    assert metrics(m)["dropped"] == 0


def test_short_capacity_keeps_the_largest_weights_when_asked():
    m, x = layer(capacity=1.0, priority="weight", experts=8).eval(), tokens(20)
    routing = m.gate(x)
    kept = m._within_capacity(routing, 20).weights != 0
    limit = math.ceil(20 * 2 / 8)
    assert not kept.all()
    for e in range(8):
        mine = routing.experts == e
        weights, survived = routing.weights[mine], kept[mine]
        assert survived.sum() == min(limit, len(weights))
        if (~survived).any():
            assert weights[survived].min() >= weights[~survived].max()


@pytest.mark.parametrize("settings", [{}, {"capacity": 1.0}, {"experts": ["glu", "mlp", "glu(d_ff=5)"]}], ids=str)
def test_padding_gets_nothing_and_changes_nothing(settings):
    m, x = layer(**settings), tokens(40).view(4, 10, D)
    mask = torch.rand(4, 10, generator=torch.Generator().manual_seed(3)) < 0.5
    y = m(x, mask)
    dropped = metrics(m).get("dropped")
    assert not y[~mask].any()
    torch.testing.assert_close(y[mask], m(x[mask]), rtol=0, atol=0)
    # Places are shared out among real tokens: half of these are padding, and would double the room.
    assert dropped is None or 0 < dropped == metrics(m)["dropped"]


def test_permuting_tokens_permutes_outputs():
    m, x = layer(), tokens()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(m(x[order]), m(x)[order], rtol=0, atol=1e-14)


def test_only_the_chosen_experts_are_computed():
    m, x = layer(experts=16), tokens(40)
    with FlopCounterMode(display=False) as counter:
        m(x)
    per_row, router = 2 * D * 3 * H, 2 * D * 16
    assert counter.get_total_flops() == 40 * (2 * per_row + router)


def test_float32_flops_are_counted_too():
    from gatework.core.cost import count_flops

    m, x = layer(experts=4).float(), tokens(64).float()
    with count_flops() as counted:
        m(x)
    assert counted.total == 64 * (2 * 2 * D * 3 * H + 2 * D * 4)


def test_listed_experts_run_once_on_their_own_tokens():
    m, x = layer(experts=["glu", "mlp(d_ff=10)", "glu(d_ff=7)"], gate="topk(k=1)", d_ff=None), tokens(30)
    seen = {}
    for e, module in enumerate(m.listed):
        module.register_forward_hook(lambda module, given, y, e=e: seen.setdefault(e, []).append(given[0]))
    m(x)
    chosen = m.gate(x).experts[:, 0]
    assert {e: len(calls) for e, calls in seen.items()} == dict.fromkeys(range(3), 1)
    for e, (rows,) in seen.items():
        assert torch.equal(rows, x[chosen == e])
    assert [type(e).__name__ for e in m.listed] == ["GLU", "MLP", "GLU"]
    assert m.listed[1].up.weight.shape[0] == 10
    with torch.no_grad():
        m.gate.weight.copy_(torch.tensor([1.0, 0, 0])[:, None] * x[0])  # Row 0 prefers expert 0; alone it is all that runs.
    seen.clear()
    m(x[:1])
    assert list(seen) == [0]


def test_listed_experts_take_the_width_that_is_given_and_say_what_they_cannot():
    m = layer(experts=["glu", "glu(d_ff=4)", GLU(D, d_ff=9), torch.nn.Linear(D, D)], d_ff=12)
    assert [e.up.weight.shape[0] for e in m.listed[:3]] == [12, 4, 9]
    assert "activation" not in dict(m.named_children())
    per_expert = (3 * D * (12 + 4 + 9) + D * D + D) // 4
    assert m.active_parameters() == 2 * per_expert + 4 * D
    assert capability(m, "batch_invariant")
    inner = layer(experts=["glu", "moe(capacity=1.0)"])
    assert "compete" in str(capability(inner, "batch_invariant"))
    made = build("moe(experts=[glu(d_ff=8), mlp], gate=topk(k=1))", "feedforward", d_model=D)
    assert [type(e).__name__ for e in made.listed] == ["GLU", "MLP"]


def test_equal_modules_are_one_feed_forward():
    shared = GLU(D, d_ff=5)
    m, x = layer(experts=[shared, shared, shared]), tokens()
    torch.testing.assert_close(m(x), shared(x), rtol=0, atol=1e-12)


class ByHistory(Gate):
    """Chooses the expert that the history names."""

    conditions = ("history", "strength")

    def forward(self, x, mask=None, history=None, strength=None):
        return Routing(strength[:, None], history[:, 0, None], 4)


def test_conditions_reach_the_gate_token_by_token():
    m, x = layer(gate=ByHistory()), tokens(12).view(3, 4, D)
    history, strength = torch.arange(24).view(3, 4, 2) % 4, torch.linspace(1, 2, 12, dtype=x.dtype).view(3, 4)
    y = m(x, history=history, strength=strength)
    expected = [
        [strength[b, t] * expert(m, x[b, t], m.w_in[e := history[b, t, 0]], m.w_out[e]) for t in range(4)] for b in range(3)
    ]
    torch.testing.assert_close(y, torch.stack([torch.stack(row) for row in expected]), rtol=0, atol=1e-12)
    for given, message in [
        ({"history": history}, "the gate ByHistory chooses by strength too: give it by keyword"),
        ({"history": history, "strength": strength, "user": history}, "the gate ByHistory takes no user"),
        ({"history": history, "strength": strength[:, :3]}, r"strength has one row per token, shape \(3, 4, '...'\), not \(3, 3\)"),
    ]:
        with pytest.raises(PartError, match=message):
            m(x, **given)
    with pytest.raises(PartError, match=r"the gate TopK takes no history: its conditions are \[\]"):
        layer()(x, history=history)


@pytest.mark.parametrize("settings", [{"experts": ["glu(d_ff=8)", "mlp", "moe"]}, {"capacity": 1.0, "shared": 1}], ids=str)
def test_contracts_of_settings_that_the_contract_tests_do_not_reach(settings):
    for check in checks.MODULE_CHECKS:
        check(Case(MoE, settings))


def test_wrong_input_meets_one_sentence():
    m, x = layer(), tokens(6).view(2, 3, D)
    with pytest.raises(PartError, match=r"x is \(..., 8\), not \(2, 3, 7\)"):
        m(x[..., 1:])
    for mask, given in [(torch.ones(3, 2).bool(), r"\(3, 2\) of torch.bool"), (torch.ones(2, 3), r"\(2, 3\) of torch.float32")]:
        with pytest.raises(PartError, match=rf"mask has one boolean per token, shape \(2, 3\), not {given}"):
            m.route(x, mask, {})


def test_padding_alone_may_hold_anything():
    x = torch.full((2, 3, D), float("nan"), dtype=torch.float64)
    assert torch.equal(layer()(x, torch.zeros(2, 3, dtype=torch.bool)), torch.zeros_like(x))


def test_no_tokens():
    y = layer()(torch.zeros(0, D, dtype=torch.float64))
    assert y.shape == (0, D)


def test_parameters_and_active_parameters():
    m = layer(experts=6, shared=1)
    per_expert = 3 * D * H
    assert sum(p.numel() for p in m.parameters()) == 7 * per_expert + 6 * D
    assert m.active_parameters() == 3 * per_expert + 6 * D


def test_default_width_makes_two_experts_cost_one_dense_unit():
    assert MoE(96).d_ff == 128
    assert MoE(100).d_ff == 136


def test_checkpointing_gives_the_same_gradients():
    m, x = layer(), tokens().requires_grad_()
    direct = torch.autograd.grad(m(x).square().sum() + sum(losses(m).values()), [x, *m.parameters()])
    y = checkpoint(m, x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum() + sum(losses(m).values()), [x, *m.parameters()])
    for a, b in zip(direct, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_bfloat16_autocast_runs_experts_in_bfloat16_and_routes_in_float32():
    m = layer().float()
    x = tokens().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), m(x), rtol=0.05, atol=0.02)
    y.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in m.parameters())
    assert m.w_in.grad.dtype == torch.float32


def test_a_parametrised_activation_learns():
    m = layer(activation="xsilu")
    m(tokens()).sum().backward()
    (scalar,) = [p for name, p in m.named_parameters() if name.startswith("activation")]
    assert scalar.grad.abs() > 0


def test_initialisation_is_each_expert_alone():
    torch.manual_seed(0)
    m = MoE(64, d_ff=48, experts=3)
    assert m.w_in.abs().max() <= 1 / 8
    assert m.w_in.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.03)
    assert m.w_out.std().item() == pytest.approx(48**-0.5 / 3**0.5, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, "must be at least 1"),
        ({"capacity": 0.0}, "capacity is at least 1, so that evenly spread tokens find a place, got 0.0"),
        ({"capacity": 0.99}, "capacity is at least 1"),
        ({"capacity": math.nan}, "capacity is at least 1"),
        ({"capacity": 1.0, "min_capacity": 0}, "min_capacity is at least 1"),
        ({"min_capacity": 4}, "goes with a capacity, got 4 with capacity None"),
        ({"experts": []}, "must be at least 1"),
        ({"experts": ["glu", "versatile_ffn(d_ff=8)"]}, "and VersatileFFN owns its norm and residual"),
        ({"experts": ["glu"], "gate": "topk(k=1)", "engine": "bmm"}, "the engine .bmm. needs experts of stacked weights"),
        ({"gate": "topk(k=9)"}, "between 1 and the number of experts 4, got 9"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)
