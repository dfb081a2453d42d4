"""Dispatch against a loop over tokens and slots."""

from __future__ import annotations

import logging

import pytest
import torch

from gatework.core import Routing
from gatework.core.cost import count_flops
from gatework.ops import dispatch as module
from gatework.ops.dispatch import ENGINES, choose_engine, dispatch, grouped_works, run_experts, unstack
from gatework.ops.linear import linear

D, E = 5, 4


def experts(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(D, D, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(E)]
    return weights, [lambda x, w=w: torch.tanh(x @ w) for w in weights]


def loop(x, weights, chosen, functions):
    rows = []
    for n in range(len(x)):
        y = torch.zeros_like(x[n])
        for slot in range(chosen.shape[1]):
            if weights[n, slot] != 0:
                y = y + weights[n, slot] * functions[chosen[n, slot]](x[n][None])[0]
        rows.append(y)
    return torch.stack(rows)


def stack(dtype=torch.float64, width=D):
    """The same kind of experts over one stacked weight."""
    w = torch.randn(E, width, width, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    return w, [lambda x, e=e: torch.tanh(x @ w[e].T) for e in range(E)], lambda rows, product: torch.tanh(product(rows, w))


@pytest.fixture(params=["few", "many"])
def sorting(request, monkeypatch):
    """Both ways to sort, at the size of these tests."""
    monkeypatch.setattr(module, "_FEW_SLOTS", {"few": 10**6, "many": -1}[request.param])


def routings():
    generator = torch.Generator().manual_seed(1)
    full = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(11)])
    w = torch.rand(11, 2, dtype=torch.float64, generator=generator) + 0.1
    holes = w * (torch.rand(11, 2, generator=generator) < 0.5)
    return {
        "full": (w, full),
        "holes": (holes, full),
        "one expert": (w[:, :1], torch.full((11, 1), 2)),
        "k = E": (torch.rand(11, E, dtype=torch.float64, generator=generator), torch.arange(E).repeat(11, 1)),
        "nothing used": (torch.zeros_like(w), full),
    }


@pytest.mark.usefixtures("sorting")
@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("case", list(routings()))
def test_equals_the_loop_with_all_gradients(case, align):
    w, chosen = routings()[case]
    x = torch.randn(11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    w = w.requires_grad_()
    leaves, functions = experts()
    seen = []
    watched = [lambda rows, f=f: (seen.append(len(rows)), f(rows))[1] for f in functions]
    got = run_experts(x, Routing(w, chosen, E), watched, align)
    assert all(rows % align == 0 for rows in seen)
    expected = loop(x, w, chosen, functions) + 0 * x
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    inputs = [x, w, *leaves]
    mine = torch.autograd.grad(got.sum(), inputs, materialize_grads=True)  # sum: the incoming gradient has stride 0.
    theirs = torch.autograd.grad(expected.sum(), inputs, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("sorting")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", list(routings()))
def test_every_engine_equals_the_loop_with_all_gradients(case, engine):
    w, chosen = routings()[case]
    x = torch.randn(11, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    w = w.requires_grad_()
    stacked, functions, together = stack()
    routing = Routing(w, chosen, E)
    got = run_experts(x, routing, functions, engine=engine, stacked=together)
    assert torch.equal(got, run_experts(x, routing, functions, engine=engine, stacked=together))
    expected = loop(x, w, chosen, functions) + 0 * x
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    inputs = [x, w, stacked]
    mine = torch.autograd.grad(got.sum(), inputs, materialize_grads=True)  # sum: the incoming gradient has stride 0.
    theirs = torch.autograd.grad(expected.sum(), inputs, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("sorting")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", list(routings()))
def test_the_grouped_product_equals_the_loop(case, dtype, monkeypatch):
    assert grouped_works(torch.device("cpu"), dtype, 16)
    called = []
    real = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **kwargs: (called.append(1), real(*args, **kwargs))[1])
    w, chosen = routings()[case]
    w = w.to(dtype).requires_grad_()
    x = torch.randn(11, 16, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
    stacked, functions, together = stack(dtype, 16)
    results = []
    for engine in ("grouped", "loop"):
        y = run_experts(x, Routing(w, chosen, E), functions, engine=engine, stacked=together)
        results.append([y, *torch.autograd.grad(y.sum(), [x, w, stacked], materialize_grads=True)])
    assert len(called) == (case != "nothing used")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol={torch.float32: 1e-4, torch.bfloat16: 0.3}[dtype])


@pytest.mark.parametrize("holes", [False, True])
def test_a_few_tokens_and_many_experts_in_bfloat16(holes, monkeypatch):
    """The short way of decoding equals the loop up to bfloat16's rounding; a routing with empty slots takes the usual one."""
    called, real = [], module._run_few
    monkeypatch.setattr(module, "_run_few", lambda *args: (called.append(1), real(*args))[1])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 16, 16, generator=generator).bfloat16() / 4
    functions = [lambda x, e=e: torch.tanh(x @ weight[e].T) for e in range(40)]
    x = torch.randn(5, 16, generator=generator).bfloat16()
    chosen = torch.stack([torch.randperm(40, generator=generator)[:4] for _ in range(5)])
    w = torch.rand(5, 4, generator=generator) + 0.1
    w[2, 1] *= not holes
    with torch.no_grad():
        routing = Routing(w, chosen, 40)
        y = run_experts(x, routing, functions, stacked=lambda rows, product: torch.tanh(product(rows, weight)))
        wide = [lambda x, e=e: torch.tanh(x @ weight[e].float().T) for e in range(40)]
        exact = run_experts(x.float(), routing, wide, engine="loop")
    assert y.dtype == torch.bfloat16
    assert len(called) == (not holes)
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=0.02)


def test_the_buffer_has_room_for_the_busiest_expert_and_no_more():
    w, chosen = routings()["holes"]
    _, functions, together = stack()
    seen = []
    run_experts(
        torch.randn(11, D, dtype=torch.float64), Routing(w, chosen, E), functions, engine="bmm",
        stacked=lambda rows, product: (seen.append(rows.shape), together(rows, product))[1],
    )
    assert seen == [(E, int(Routing(w, chosen, E).counts().max()), D)]


def test_engines_are_chosen_by_shape_with_a_reason_that_is_logged_once(caplog):
    even, skewed, many = [2] * 8, [8] + [0] * 7, [512] * 8
    x = torch.zeros(8, 256)
    with torch.no_grad():
        assert choose_engine("auto", x, even)[0] == "bmm"
        assert choose_engine("auto", x.bfloat16(), even)[0] == "bmm"
        assert choose_engine("auto", x.bfloat16(), [16] * 8)[0] == "bmm"
        assert choose_engine("auto", x, [16] * 8)[0] == "grouped"
        assert choose_engine("auto", x, skewed)[0] == "grouped"
        assert choose_engine("auto", x[:, :255], skewed)[0] == "segments"
        assert choose_engine("auto", x.double(), even)[0] == "segments"
        assert choose_engine("auto", x, many)[0] == "segments"
    assert choose_engine("auto", x, even)[0] == "segments"
    assert choose_engine("grouped", x, even)[0] == "grouped"
    assert choose_engine("grouped", x.double(), even)[0] == "segments"
    assert choose_engine("grouped", x[:, :255], even)[0] == "segments"
    module._log_once.cache_clear()
    w, chosen = routings()["full"]
    _, functions, together = stack()
    with caplog.at_level(logging.DEBUG, logger="gatework"):
        for _ in range(3):
            x = torch.zeros(11, D, dtype=torch.float64)
            run_experts(x, Routing(w, chosen, E), functions, engine="grouped", stacked=together)
    assert [record.getMessage() for record in caplog.records] == [
        "experts run by the engine 'segments': torch has no grouped product for float64 on cpu and these widths"
    ]


def test_rows_are_the_used_slots_sorted_by_expert():
    w, chosen = routings()["holes"]
    plan = dispatch(Routing(w, chosen, E))
    used = [(int(chosen[n, j]), n) for n in range(11) for j in range(2) if w[n, j] != 0]
    expected = [n for _, n in sorted(used, key=lambda pair: pair[0])]
    assert plan.tokens.tolist() == expected
    assert plan.counts == [sum(e == expert for e, _ in used) for expert in range(E)]
    assert plan.n_rows == len(used)


@pytest.mark.usefixtures("sorting")
@pytest.mark.parametrize("align", [1, 4])
def test_a_token_that_nobody_serves_may_hold_anything(align):
    w, chosen = routings()["full"]
    w = w.clone()
    w[0] = 0
    leaves, functions = experts()
    x = torch.randn(11, D, dtype=torch.float64)
    expected = torch.autograd.grad(run_experts(x, Routing(w, chosen, E), functions, align).sum(), leaves)
    x[0] = float("nan")
    y = run_experts(x, Routing(w, chosen, E), functions, align)
    assert torch.isfinite(y).all()
    for mine, theirs in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_an_expert_without_tokens_is_not_called():
    called = []
    functions = [lambda x, e=e: (called.append((e, len(x))), x)[1] for e in range(E)]
    run_experts(torch.randn(3, D), Routing(torch.ones(3, 1), torch.tensor([[2], [0], [2]]), E), functions)
    assert called == [(0, 1), (2, 2)]


@pytest.mark.parametrize("w", [[0.3, 0.7], [0.0, 0.7], [0.0, 0.0]])
def test_one_token_without_a_graph(w):
    _, functions = experts()
    called = []
    watched = [lambda rows, e=e, f=f: (called.append(e), f(rows))[1] for e, f in enumerate(functions)]
    x, w, chosen = torch.randn(1, D, dtype=torch.float64), torch.tensor([w], dtype=torch.float64), torch.tensor([[3, 1]])
    with torch.no_grad():
        got = run_experts(x, Routing(w, chosen, E), watched)
        torch.testing.assert_close(got, loop(x, w, chosen, functions), rtol=0, atol=1e-14)
    assert called == [e for e, weight in zip((3, 1), w[0], strict=True) if weight]


@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_without_a_used_slot_nobody_runs_and_the_output_is_as_wide_as_the_experts_and_0(engine, n):
    def nobody(*args):
        raise AssertionError

    routing = Routing(torch.zeros(n, 2, dtype=torch.float64), torch.tensor([[0, 1]]).repeat(n, 1), E)
    x = torch.full((n, D), float("nan"), dtype=torch.float64, requires_grad=True)  # As padding may be.
    for width in (None, 3):
        y = run_experts(x, routing, [nobody] * E, engine=engine, stacked=nobody, width=width)
        assert torch.equal(y, torch.zeros(n, width or D, dtype=torch.float64))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
        with torch.no_grad():
            assert torch.equal(run_experts(x, routing, [nobody] * E, engine=engine, stacked=nobody, width=width), y)


def test_no_tokens():
    _, functions = experts()
    x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    y = run_experts(x, Routing(torch.zeros(0, 2, dtype=torch.float64), torch.zeros(0, 2).long(), E), functions)
    assert y.shape == (0, D)
    y.sum().backward()


def test_permuted_tokens_permute_the_output_and_two_calls_agree_bitwise():
    w, chosen = routings()["full"]
    _, functions = experts()
    x = torch.randn(11, D, dtype=torch.float64)
    order = torch.randperm(11)
    y = run_experts(x, Routing(w, chosen, E), functions)
    assert torch.equal(y, run_experts(x, Routing(w, chosen, E), functions))
    torch.testing.assert_close(run_experts(x[order], Routing(w[order], chosen[order], E), functions), y[order], rtol=0, atol=1e-14)


def test_the_number_of_experts_is_checked():
    with pytest.raises(ValueError, match="chooses among 4 experts, 1 were given"):
        run_experts(torch.zeros(1, D), Routing(torch.ones(1, 1), torch.zeros(1, 1).long(), E), [lambda x: x])
    with pytest.raises(ValueError, match="the routing is for 1 tokens, 2 were given"):
        run_experts(torch.zeros(2, D), Routing(torch.ones(1, 1), torch.zeros(1, 1).long(), 1), [lambda x: x])


def test_an_engine_has_what_it_needs():
    w, chosen = routings()["full"]
    _, functions = experts()
    x = torch.zeros(11, D, dtype=torch.float64)
    with pytest.raises(ValueError, match="the engine 'bmm' needs experts of stacked weights"):
        run_experts(x, Routing(w, chosen, E), functions, engine="bmm")


def test_unstack_gathers_one_gradient_with_zeros_for_the_unused():
    stacked = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    first, _, third = unstack(stacked)
    ((first**2).sum() + (3 * third).sum()).backward()
    expected = torch.stack([2 * stacked[0], torch.zeros(2, 2), torch.full((2, 2), 3.0)]).detach()
    torch.testing.assert_close(stacked.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 300, 240)], ids=["small", "onednn"])
def test_gradients_of_products_go_to_their_place_in_every_backward_pass(shape):
    n, _, width = shape
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(shape, generator=generator, requires_grad=True)
    xs = [torch.randn(64, width, generator=generator) for _ in range(n)]
    slices = unstack(stacked)
    used_twice = linear(xs[0], slices[0]) + linear(xs[1], slices[0])
    loss = used_twice.square().sum() + linear(xs[1], slices[1]).square().sum()
    first, second = (torch.autograd.grad(loss, stacked, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    direct = ((xs[0] @ stacked[0].T + xs[1] @ stacked[0].T).square().sum() + (xs[1] @ stacked[1].T).square().sum())
    (expected,) = torch.autograd.grad(direct, stacked)
    for got in (first, second):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-2)
        assert not got[2:].any()


def test_the_probe_for_a_grouped_product_is_not_counted():
    module._grouped_runs.cache_clear()
    with count_flops() as count:
        assert grouped_works(torch.device("cpu"), torch.bfloat16, 16)
    assert count.total == 0
