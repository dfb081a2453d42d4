"""The symmetric cross gate against its equations, position by position."""

from __future__ import annotations

import copy

import pytest
import torch

from gatework.core import PartError
from gatework.gates import SymmetricCrossGate

from .two_streams import EXACT, C, mapped, normed, sigmoid, silu, with_odd_norms


def made(tokens=False, train=False, **settings):
    torch.manual_seed(0)
    return with_odd_norms(SymmetricCrossGate(C, tokens=tokens, **({"dropout": 0.0} | settings)), train)


def streams(tokens=False, seed=1):
    shape = (2, 3, 5, C) if tokens else (2, 3, C, 5, 4)
    a, b = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a.requires_grad_(), b.requires_grad_()


# The reference works on (positions..., C).


def depthwise(layer, x):
    """3x3 with zeros around, tap by tap; x (B, H, W, C)."""
    b, h, w, c = x.shape
    wide = torch.zeros(b, h + 2, w + 2, c, dtype=x.dtype)
    wide[:, 1:-1, 1:-1] = x
    return sum(wide[:, i : i + h, j : j + w] * layer.weight[:, 0, i, j] for i in range(3) for j in range(3))


def refined(stream, x, train, tokens):
    steps = list(stream.refine)
    h = x
    if not tokens:
        h, steps = depthwise(steps[0], x), steps[1:]
    return x + silu(normed(steps[3], mapped(steps[2], silu(normed(steps[0], h, train))), train))


def fused(stream, x, own, other, train):
    guide = stream.guide
    g = normed(guide[4], mapped(guide[3], silu(normed(guide[1], mapped(guide[0], other), train))), train)
    return normed(stream.norm, x + own * (1 + sigmoid(mapped(stream.mask, other))) + sigmoid(mapped(stream.gate, g)) * g, train)


def reference(part, a, b):
    tokens, train = part.tokens, part.training
    a, b = (x if tokens else x.permute(0, 2, 3, 1) for x in (a, b))
    r_a, r_b = refined(part.a, a, train, tokens), refined(part.b, b, train, tokens)
    out = fused(part.a, a, r_a, r_b, train), fused(part.b, b, r_b, r_a, train)
    return out if tokens else tuple(y.permute(0, 3, 1, 2) for y in out)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_outputs_and_gradients_are_the_equations(tokens, train):
    part, (a, b) = made(tokens, train), streams(tokens)
    wanted = reference(part, a, b)
    got = part(a, b)
    leaves = [a, b, *part.parameters()]
    weights = streams(tokens, seed=7)
    totals = [sum((y * w.detach()).sum() for y, w in zip(ys, weights, strict=True)) for ys in (got, wanted)]
    for y, z in zip(got, wanted, strict=True):
        torch.testing.assert_close(y, z, **EXACT)
    for y, z in zip(*(torch.autograd.grad(total, leaves) for total in totals), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tokens", [False, True])
def test_swapping_the_streams_and_their_weights_swaps_the_outputs(tokens):
    part, (a, b) = made(tokens), streams(tokens)
    other = copy.deepcopy(part)
    other.a, other.b = other.b, other.a
    first, second = part(a, b)
    swapped = other(b, a)
    assert torch.equal(swapped[0], second)
    assert torch.equal(swapped[1], first)
    assert not torch.allclose(part(b, a)[1], first), "the weights are not shared"


def test_without_what_crosses_and_a_flat_mask():
    """Gate and G at 0, m = 1/2: a' = BN(a + 1.5 r_a)."""
    part, (a, b) = made(), streams()
    with torch.no_grad():
        for p in (*part.a.gate.parameters(), *part.a.guide.parameters(), *part.a.mask.parameters()):
            p.zero_()
    r_a = part.a.refined(a)
    torch.testing.assert_close(part(a, b)[0], part.a.norm(a + 1.5 * r_a), **EXACT)


def test_a_token_meets_its_partner_only():
    part, (a, b) = made(tokens=True), streams(tokens=True)
    for out in part(a, b):
        for given in (a, b):
            (grad,) = torch.autograd.grad(out[:, 2].square().sum(), given, retain_graph=True)
            assert grad[:, 2].any()
            assert not grad[:, [0, 1, 3, 4]].any()


def test_dropout_falls_on_the_refined_streams_and_on_what_crosses():
    part, (a, b) = made(train=True, dropout=0.5), streams()
    calls = []
    for stream in (part.a, part.b):
        stream.dropout.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
    part(a, b)
    assert len(calls) == 4
    for given, out in calls:
        kept = out != 0
        assert 0.4 < kept.double().mean() < 0.6
        torch.testing.assert_close(out[kept], 2 * given[kept], **EXACT)


def test_one_pixel_odd_sizes_and_autocast():
    part = made()
    for shape in ((1, C, 1, 1), (2, C, 7, 3)):
        x = torch.randn(shape, dtype=torch.float64)
        assert all(y.shape == shape and y.isfinite().all() for y in part(x, 2 * x))
    tokens, x = made(tokens=True).float(), torch.randn(2, 3, C)
    with torch.autocast("cpu", torch.bfloat16):
        for y, z in zip(tokens(x, -x), made(tokens=True)(x.double(), -x.double()), strict=True):
            torch.testing.assert_close(y.double(), z, rtol=0.05, atol=0.05)


def test_wrong_inputs_meet_one_sentence():
    part, x = made(), torch.zeros(2, C, 3, 3, dtype=torch.float64)
    for given, message in [
        ((x, x[:, :, 1:]), r"two streams have one shape \(B, 8, H, W\), not \(2, 8, 3, 3\) and \(2, 8, 2, 3\)"),
        ((x[0], x[0]), r"a stream has shape \(B, 8, H, W\), not \(8, 3, 3\)"),
        ((x[:, 1:], x[:, 1:]), r"a stream has shape \(B, 8, H, W\), not \(2, 7, 3, 3\)"),
    ]:
        with pytest.raises(PartError, match=message):
            part(*given)
    with pytest.raises(PartError, match=r"\(B, T, 8\)"):
        made(tokens=True)(x, x)
    few = {"d_model": 4, "tokens": True}
    for settings, message in [({"d_model": 0}, "at least 1"), (few, "at least 8 with tokens"), ({"dropout": 1.0}, "dropout")]:
        with pytest.raises(ValueError, match=message):
            SymmetricCrossGate(**({"d_model": C} | settings))
