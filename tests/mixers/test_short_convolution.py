"""The short convolution against its equation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatework.mixers.base import ShortConvolution

CHANNELS = 5


def layer(width: int = 4) -> ShortConvolution:
    torch.manual_seed(0)
    return ShortConvolution(CHANNELS, width).double()


def inputs(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, length, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def reference(m: ShortConvolution, x: torch.Tensor, tail: torch.Tensor | None, segments: torch.Tensor | None) -> torch.Tensor:
    """``silu(sum_j w_j x_{t - width + 1 + j})``, one token and one weight at a time."""
    width = m.weight.shape[1]
    rows = []
    for b in range(len(x)):
        for t in range(x.shape[1]):
            total = x.new_zeros(CHANNELS)
            for j in range(width):
                s = t - width + 1 + j
                if s >= 0:
                    if segments is None or segments[b, s] == segments[b, t]:
                        total = total + m.weight[:, j] * x[b, s]
                elif tail is not None:
                    total = total + m.weight[:, j] * tail[b, s]  # Counted from the tail's end.
            rows.append(total * torch.sigmoid(total))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("width", [1, 2, 4, 6])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17])
@pytest.mark.parametrize("given", ["nothing", "tail", "segments"])
def test_equals_the_equation_with_all_gradients(width, length, given):
    m, x = layer(width), inputs(length).requires_grad_()
    tail = inputs(width - 1, 2).requires_grad_() if given == "tail" and width > 1 else None
    segments = None
    if given == "segments":
        segments = torch.stack([torch.arange(length) // 3, torch.full((length,), 7)])
    got, expected = m(x, tail, segments=segments)[0], reference(m, x, tail, segments)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = inputs(length, 3)
    leaves = [x, m.weight] if tail is None else [x, m.weight, tail]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradcheck():
    m, x, tail = layer(), inputs(6).requires_grad_(), inputs(3, 2).requires_grad_()
    weight = m.weight.detach().clone().requires_grad_()

    def run(x, weight, tail):
        return torch.func.functional_call(m, {"weight": weight}, (x, tail))

    assert torch.autograd.gradcheck(run, (x, weight, tail))


def test_equals_a_depthwise_convolution():
    m, x = layer(), inputs(30)
    convolved = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), m.weight[:, None], groups=CHANNELS).transpose(1, 2)
    torch.testing.assert_close(m(x)[0], F.silu(convolved), rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [2, 0, 1, 3, 5], [0, 4, 7]])
def test_pieces_equal_whole(width, pieces):
    m, x = layer(width), inputs(11)
    tail, outputs = m.init_tail(2, torch.float64, "cpu"), []
    for piece in x.split(pieces, 1):
        y, tail = m(piece, tail)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), m(x)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(tail, x[:, 11 - (width - 1) :])
    assert tail.shape == (2, width - 1, CHANNELS)


def test_gradients_pass_from_piece_to_piece():
    m, x = layer(), inputs(11).requires_grad_()
    first, tail = m(x[:, :2])
    second, tail = m(x[:, 2:3], tail)
    third, _ = m(x[:, 3:], tail)
    upstream = inputs(11, 3)
    leaves = [x, m.weight]
    pieces = torch.autograd.grad(torch.cat([first, second, third], 1), leaves, upstream)
    for a, b in zip(pieces, torch.autograd.grad(m(x)[0], leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("counts", [[0, 1], [2, 3], [5, 4]])
def test_the_tail_holds_the_last_real_inputs(counts):
    m, x, tail = layer(), inputs(5).requires_grad_(), inputs(3, 2).requires_grad_()
    real = torch.arange(5) < torch.tensor(counts)[:, None]
    _, got = m(x, tail, real)
    expected = torch.stack([torch.cat([tail[b], x[b, :n]])[-3:] for b, n in enumerate(counts)])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    upstream = inputs(3, 4)
    for a, b in zip(*(torch.autograd.grad(y, [x, tail], upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_tail_holds_no_more_memory_than_it_shows():
    m = layer()
    _, tail = m(inputs(50))
    assert tail.untyped_storage().nbytes() == tail.numel() * tail.element_size()


def test_nothing_to_do():
    m, tail = layer(), inputs(3)
    y, after = m(inputs(0), tail)
    assert y.shape == (2, 0, CHANNELS)
    torch.testing.assert_close(after, tail)
    y, after = m(inputs(4)[:0])
    assert y.shape == (0, 4, CHANNELS)
    assert after.shape == (0, 3, CHANNELS)


def test_a_width_below_1():
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        ShortConvolution(CHANNELS, 0)
