"""Gated prefix attention against its equations, and the identities of the paper."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gatework.core.cost import count_flops
from gatework.mixers import Attention, NoRGa
from gatework.mixers.norga import _biased, _Merged

D, HEADS, KV, P = 16, 4, 2, 5
WIDTH = D // HEADS
ACTS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu, "gelu": nn.functional.gelu}


def layer(**settings) -> NoRGa:
    torch.manual_seed(0)
    m = NoRGa(D, **({"heads": HEADS, "kv_heads": KV, "prefix": P} | settings)).double()
    for name, p in m.named_parameters():
        if name in ("alpha", "tau"):
            nn.init.constant_(p, 0.8 if name == "alpha" else 1.3)
        elif "prompts" not in name:
            nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else nn.init.normal_(p, std=0.35)
    return m


def inputs(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def norm(m, x, gain):
    return x if gain is None else x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain.weight


def turn(m, x, position):
    if not m.rope:
        return x
    angle = position * m.rope_base ** (-torch.arange(0, WIDTH, 2, dtype=x.dtype) / WIDTH)
    z = torch.complex(x[: WIDTH // 2], x[WIDTH // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def reference(m: NoRGa, x: torch.Tensor, act) -> torch.Tensor:
    """One query at a time: P gated scores and those of the tokens it sees, one softmax."""
    prompt_keys, prompt_values = m.prompts[m.task]
    rows = []
    for row in x:
        k = norm(m, m.key(row), m.k_norm)
        v, outputs = m.value(row), []
        for t, x_t in enumerate(row):
            q, heads = norm(m, m.query(x_t), m.q_norm), []
            for h in range(HEADS):
                g = h // (HEADS // m.kv_heads)
                seen = [s for s in range(len(row)) if (s <= t or not m.causal) and (m.window is None or abs(t - s) < m.window)]
                scores = prompt_keys[g] @ q[h] / WIDTH**0.5
                scores = scores + m.tau * act(m.alpha * scores)
                own = torch.stack([turn(m, q[h], t) @ turn(m, k[s, g], s) / WIDTH**0.5 for s in seen])
                weights = torch.cat([scores, own]).softmax(0)
                heads.append(weights @ torch.cat([prompt_values[g], v[seen, g]]))
            outputs.append(m.o_proj.weight @ torch.cat(heads))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kv_heads": 4, "rope": False}, {"window": 3, "qk_norm": True}, {"causal": False}, {"tasks": 3}]
    + [{"activation": name} for name in ACTS if name != "tanh"],
    ids=str,
)
def test_equals_the_equations_with_all_gradients(settings):
    m, x = layer(**settings), inputs().requires_grad_()
    if "tasks" in settings:
        m.select(1)
        m.requires_grad_(True)
    got, wanted = m(x), reference(m, x, ACTS[settings.get("activation", "tanh")])
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    weight = torch.randn(got.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))
    named = {"x": x} | {name: p for name, p in m.named_parameters() if not name.startswith("prompts") or name.endswith(str(m.task))}
    mine, theirs = (torch.autograd.grad((y * weight).sum(), [*named.values()]) for y in (got, wanted))
    for name, a, b in zip(named, mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        assert a.any()


@pytest.mark.parametrize("scale", ["alpha", "tau"])
def test_without_a_gate_it_is_plain_prefix_tuning(scale):
    m, x = layer(), inputs()
    with torch.no_grad():
        getattr(m, scale).zero_()
    torch.testing.assert_close(m(x), reference(m, x, torch.zeros_like), rtol=0, atol=1e-12)


def test_a_linear_gate_scales_the_scores():
    m, x = layer(activation=nn.Identity()), inputs()
    plain = copy.deepcopy(m)
    with torch.no_grad():
        plain.tau.zero_()
        plain.prompts[0][0] *= 1 + m.tau * m.alpha
    torch.testing.assert_close(m(x), plain(x), rtol=0, atol=1e-12)


def test_without_a_prompt_it_is_the_frozen_attention_bitwise():
    m, x = layer(), inputs(70)
    plain = Attention(D, HEADS, KV).double()
    plain.load_state_dict({name: p for name, p in m.state_dict().items() if "proj" in name})
    assert not torch.allclose(m(x), plain(x))
    m.select(None)
    assert torch.equal(m(x), plain(x))
    keep = torch.arange(70).expand(2, -1) % 3 == 0
    assert torch.equal(m(x, keep=keep), plain(x, keep=keep))


@pytest.mark.parametrize("form", ["causal", "masked", "whole"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_ways_to_the_joint_softmax_agree(form, dtype):
    make = torch.Generator().manual_seed(2)
    gated, values, *qkv = (
        torch.randn(shape, generator=make, dtype=torch.float64) for shape in [(2, 3, 7, 4), (3, 4, 8), *[(2, 3, 7, 8)] * 3]
    )
    gated = 30 * gated  # Far beyond what an exponential without the largest score taken off could hold in float32.
    bias = torch.where(torch.rand(2, 1, 7, 7, generator=make) < 0.4, 0.0, float("-inf")) if form == "masked" else None
    if bias is not None:
        bias = bias.masked_fill(torch.eye(7, dtype=torch.bool), 0)
    exact = None
    for way, kind in ((_biased, torch.float64), (_Merged.apply, dtype)):
        leaves = [t.detach().to(kind).requires_grad_() for t in (values, *qkv)]
        scores = gated.to(torch.promote_types(kind, torch.float32)).requires_grad_()
        y = way(scores, *leaves, None if bias is None else bias.to(kind), form == "causal")
        assert y.dtype == kind
        found = [y, *torch.autograd.grad((y * torch.cos(torch.arange(y.numel())).view(y.shape)).sum(), [scores, *leaves])]
        exact = found if exact is None else exact
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance)


def test_the_prompt_costs_its_own_columns_only():
    m, plain, x = layer(), Attention(D, HEADS, KV).double(), inputs(12)
    counts = []
    for part in (plain, m):
        with count_flops() as count:
            part(x)
        counts.append(count.total)
    assert counts[1] - counts[0] == 2 * 2 * HEADS * 12 * P * WIDTH * 2  # Two products of B H (T, P) rows.
    assert sum(p.numel() for p in m.parameters()) - sum(p.numel() for p in plain.parameters()) == 2 * KV * P * WIDTH + 2
    assert m.state_bytes(12) == plain.state_bytes(12)


def test_a_prompt_has_no_position():
    m, token = layer(), inputs(1)
    with torch.no_grad():
        m.k_proj.weight.zero_()
        m.v_proj.weight.zero_()
    # Equal tokens whose keys and values are 0 differ by their place and number alone: s tokens of score 0 dilute the prompt.
    y = m(token.expand(-1, 6, -1))
    scores = m.prompts[0][0].repeat_interleave(2, 0) @ m.query(token)[:, 0, :, :, None] / WIDTH**0.5
    mass = (scores + m.tau * torch.tanh(m.alpha * scores)).exp().sum(2)
    read = torch.linalg.solve(m.o_proj.weight, y.transpose(1, 2)).view(2, HEADS, WIDTH, 6)
    torch.testing.assert_close(read[..., 5] * (mass + 6) / (mass + 1), read[..., 0], rtol=1e-8, atol=1e-10)


def test_a_task_trains_its_prompt_and_the_first_one_the_gate():
    m, x = layer(tasks=3), inputs()
    assert [p.requires_grad for p in m.prompts] == [True, False, False]
    outputs = []
    for task in range(3):
        m.learn(task)
        trained = {name for name, p in m.named_parameters() if p.requires_grad}
        assert trained == {f"prompts.{task}"} | ({"alpha", "tau"} if task == 0 else set())
        before = copy.deepcopy(m.state_dict())
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.03, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            (m(x) - task).square().mean().backward()
            optimizer.step()
        changed = {name for name, value in m.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == trained
        outputs.append(m(x).detach())
    for task in range(3):
        m.select(task)
        # The gate is the first task's for good, so that no task forgets.
        assert torch.equal(m(x), outputs[task])
    assert [p.requires_grad for p in m.prompts] == [False, False, True]


def test_initialisation():
    torch.manual_seed(0)
    m = NoRGa(256, heads=4)
    assert m.prompts[0].shape == (2, 4, 20, 64)
    assert 0.999 < m.prompts[0].abs().max() <= 1
    assert m.prompts[0].std().item() == pytest.approx(3**-0.5, rel=0.02)
    assert m.alpha.item() == m.tau.item() == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer(prefix=0), "prefix and tasks must be at least 1, got 0 and 1"),
        (lambda: layer(tasks=0), "prefix and tasks must be at least 1, got 5 and 0"),
        (lambda: layer(tasks=2).select(2), "task 2 is not one of the 2 that norga was built for, counted from 0"),
        (lambda: layer().learn(-1), "task -1 is not one of the 1"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
