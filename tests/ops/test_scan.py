"""Scans against loops."""

from __future__ import annotations

import pytest
import torch

from gatework.ops.scan import associative_scan, linear_scan

LENGTHS = [1, 2, 3, 4, 5, 7, 8, 13, 16, 33]


@pytest.mark.parametrize("length", LENGTHS)
def test_matrix_products_keep_their_order(length):
    matrices = torch.randn(2, length, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(length)) / 2
    (prefixes,) = associative_scan(lambda a, b: (a[0] @ b[0],), (matrices,))
    expected = [matrices[:, 0]]
    for t in range(1, length):
        expected.append(expected[-1] @ matrices[:, t])
    torch.testing.assert_close(prefixes, torch.stack(expected, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("with_state", [False, True])
def test_linear_scan_equals_the_loop_with_gradients(length, with_state):
    generator = torch.Generator().manual_seed(length)
    decay, x, state = (
        torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in [(2, length, 3), (2, length, 3), (2, 3)]
    )
    h, steps = (state if with_state else torch.zeros_like(state)), []
    for t in range(length):
        h = decay[:, t] * h + x[:, t]
        steps.append(h)
    expected = torch.stack(steps, 1)
    got = linear_scan(decay, x, state if with_state else None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    inputs = [decay, x, state] if with_state else [decay, x]
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    mine, theirs = (torch.autograd.grad(o, inputs, upstream, materialize_grads=True) for o in (got, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_an_empty_scan_and_other_axes():
    assert associative_scan(lambda a, b: (a[0] + b[0],), (torch.zeros(2, 0),))[0].shape == (2, 0)
    x = torch.arange(6.0).view(6, 1)
    assert torch.equal(associative_scan(lambda a, b: (a[0] + b[0],), (x,), dim=0)[0], x.cumsum(0))


def test_combinations_grow_linearly_and_depth_logarithmically():
    work, calls = [], []

    def combine(a, b):
        work.append(a[0].shape[1])
        calls.append(1)
        return (a[0] + b[0],)

    associative_scan(combine, (torch.ones(1, 1024),))
    assert sum(work) < 2 * 1024
    assert len(calls) <= 2 * 10


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        associative_scan(lambda a, b: a, (torch.zeros(1, 3), torch.zeros(1, 4)))
