"""The pyramid gate against its equations, position by position."""

from __future__ import annotations

import copy

import pytest
import torch

from gatework.core import PartError
from gatework.gates import PyramidGate

from .two_streams import EXACT, C, mapped, normed, sigmoid, silu, with_odd_norms


def made(tokens=False, train=False, **settings):
    torch.manual_seed(0)
    return with_odd_norms(PyramidGate(C, tokens=tokens, **settings), train)


def level(tokens=False, size=(4, 3), finer=(8, 6), batch=3):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, 5, C)] * 2 + [(batch, 5, C // 2)] * 2 if tokens else [(batch, C, *size)] * 2 + [(batch, C // 2, *finer)] * 2
    return [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def strided(layer, x):
    """3x3, stride 2, zeros around, tap by tap; x (B, H, W, C)."""
    b, h, w, c = x.shape
    wide = torch.zeros(b, h + 3, w + 3, c, dtype=x.dtype)
    wide[:, 1 : h + 1, 1 : w + 1] = x
    rows, columns = (h + 1) // 2, (w + 1) // 2
    taps = [
        wide[:, i : i + 2 * rows : 2, j : j + 2 * columns : 2] @ layer.weight[:, :, i, j].T for i in range(3) for j in range(3)
    ]
    return sum(taps)


def pieces(part, a, b, before_a, before_b):
    """base and S, (positions..., C) and (positions..., 1)."""
    tokens, train = part.tokens, part.training
    if not tokens:
        a, b, before_a, before_b = (x.permute(0, 2, 3, 1) for x in (a, b, before_a, before_b))
    first, norm, _, last = part.spatial
    h = (mapped if tokens else strided)(first, torch.cat([before_a, before_b], -1))
    h = normed(norm, h, train)
    s = sigmoid(mapped(last, silu(h)))
    if not tokens and s.shape[1:3] != a.shape[1:3]:  # The nearest position.
        rows = [i * s.shape[1] // a.shape[1] for i in range(a.shape[1])]
        columns = [j * s.shape[2] // a.shape[2] for j in range(a.shape[2])]
        s = s[:, rows][:, :, columns]
    first, norm, _, last = part.interaction
    mixed = mapped(last, torch.clamp(normed(norm, mapped(first, torch.cat([a, b], -1)), train), min=0))
    shares = torch.exp(mapped(part.share, mixed))
    shares = shares / shares.sum(-1, keepdim=True)
    return shares[..., :1] * mixed[..., :C] + shares[..., 1:] * mixed[..., C:], s


def reference(part, *given):
    base, s = pieces(part, *given)
    out = base * (1 + s)
    return out if part.tokens else out.permute(0, 3, 1, 2)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("sizes", [None, ((4, 3), (8, 6)), ((4, 3), (7, 5)), ((3, 5), (4, 4)), ((5, 2), (8, 6))], ids=str)
def test_outputs_and_gradients_are_the_equations(train, sizes):
    """With None tokens; else a level and the finer one, of even, odd and unequal sizes."""
    part = made(sizes is None, train)
    given = level(True) if sizes is None else level(False, *sizes)
    got, wanted = part(*given), reference(part, *given)
    torch.testing.assert_close(got, wanted, **EXACT)
    leaves, upstream = [*given, *part.parameters()], torch.randn_like(got)
    for y, z in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=1e-11)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_spatial_gate_scales_between_1_and_2(tokens):
    part, given = made(tokens), level(tokens)
    base, s = pieces(part, *given)
    out = part(*given)
    out = out if tokens else out.permute(0, 2, 3, 1)
    assert ((s > 0) & (s < 1)).all()
    assert (out.abs() >= base.abs()).all()
    assert (out.abs() <= 2 * base.abs()).all()


@pytest.mark.parametrize("tokens", [False, True])
def test_swapping_the_streams_and_their_weights_changes_nothing(tokens):
    part, (a, b, before_a, before_b) = made(tokens), level(tokens)
    other = copy.deepcopy(part)

    def swapped(weight, axis):
        first, second = weight.detach().clone().chunk(2, axis)
        weight.data.copy_(torch.cat([second, first], axis))

    swapped(other.spatial[0].weight, 1)
    swapped(other.interaction[0].weight, 1)
    for p in other.interaction[3].parameters():
        swapped(p, 0)
    swapped(other.share.weight, 1)
    for p in other.share.parameters():
        swapped(p, 0)
    torch.testing.assert_close(other(b, a, before_b, before_a), part(a, b, before_a, before_b), **EXACT)
    assert not torch.allclose(part(b, a, before_b, before_a), part(a, b, before_a, before_b))


def test_a_token_sees_its_own_position_only():
    part, given = made(tokens=True), level(True)
    for grad in torch.autograd.grad(part(*given)[:, 2].square().sum(), given):
        assert grad[:, 2].any()
        assert not grad[:, [0, 1, 3, 4]].any()


def test_modality_dropout_takes_one_stream_of_a_sample_at_both_levels():
    batch = 400
    part, given = made(train=True, modality_dropout=0.5), level(batch=batch, size=(1, 1), finer=(1, 1))
    torch.manual_seed(3)
    grads = torch.autograd.grad(part(*given).square().sum(), given)
    lost = [~grad.flatten(1).any(1) for grad in grads]
    assert torch.equal(lost[0], lost[2])
    assert torch.equal(lost[1], lost[3])
    assert not (lost[0] & lost[1]).any()
    assert all(abs(some.double().mean() - 0.25) < 0.07 for some in lost[:2])
    part.eval()
    assert torch.equal(part(*given), part(*given))


def test_autocast():
    part, given = made(tokens=True).float(), [x.detach().float() for x in level(True)]
    with torch.autocast("cpu", torch.bfloat16):
        y = part(*given)
    torch.testing.assert_close(y.double(), made(tokens=True)(*(x.double() for x in given)), rtol=0.05, atol=0.05)


def test_wrong_inputs_meet_one_sentence():
    part, given = made(), level()
    tokens, few = made(tokens=True), level(True)
    for some, inputs, message in [
        (part, [given[0], given[1][:, :, 1:], *given[2:]], r"one shape \(B, 8, H, W\)"),
        (part, [*given[:2], *given[:2]], r"a stream has shape \(B, 4, H, W\), not \(3, 8, 4, 3\)"),
        (part, [*given[:2], *(x[:1] for x in given[2:])], "the level before has 1 examples and this one 3; they are levels of one"),
        (tokens, [*few[:2], *(x[:, 1:] for x in few[2:])], "the level before has 4 tokens and this one 5; make them equal first"),
    ]:
        with pytest.raises(PartError, match=message):
            some(*inputs)
    for settings, message in [({"d_model": 7}, "even and at least 2, got 7"), ({"modality_dropout": 1.5}, "dropout must be in")]:
        with pytest.raises(ValueError, match=message):
            PyramidGate(**({"d_model": C} | settings))
