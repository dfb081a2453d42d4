"""The memory layer against its equations; what it skips."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import PartError, build
from gatework.core.cost import count_flops
from gatework.feedforward import MemoryLayer


def made(d_model=6, slots=9, k=3, seed=0):
    torch.manual_seed(seed)
    layer = MemoryLayer(d_model, slots, k).double()
    torch.nn.init.normal_(layer.values)
    return layer


def reference(layer, x):
    """One input at a time, from the equations."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]):
        scores = [(key @ row) / math.sqrt(len(row)) for key in layer.keys]
        best = sorted(range(len(scores)), key=lambda i: -scores[i].item())[: layer.k]
        total = sum(scores[i].exp() for i in best)
        rows.append(sum(scores[i].exp() / total * layer.values[i] for i in best))
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("shape", [(6,), (2, 5, 6), (17, 6)])
def test_outputs_and_gradients_equal_the_equations(k, shape):
    layer = made(k=k)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    results = []
    for run in (layer, lambda x: reference(layer, x)):
        y = run(x)
        grads = torch.autograd.grad((y * weight).sum(), [x, layer.keys, layer.values], allow_unused=True)
        results.append([y, *grads])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


def test_k_rows_are_active_and_weights_sum_to_1():
    layer = made(slots=50, k=4)
    x = torch.randn(30, 6, dtype=torch.float64)
    weights, slots = layer.read(x)
    assert weights.shape == slots.shape == (30, 4)
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(30, dtype=torch.float64), rtol=0, atol=1e-14)
    assert all(len(set(row)) == 4 for row in slots.tolist())
    # A step on one input moves the values of its own slots, and no others.
    layer(x[:1]).square().sum().backward()
    assert sorted(layer.values.grad.any(1).nonzero()[:, 0].tolist()) == sorted(slots[0].tolist())
    assert sorted(layer.keys.grad.any(1).nonzero()[:, 0].tolist()) == sorted(slots[0].tolist())


def test_with_all_slots_it_is_a_softmax_mlp():
    layer = made(k=9)
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = (x @ layer.keys.t() / math.sqrt(6)).softmax(-1) @ layer.values
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_own_backward_with_gradcheck():
    layer = made()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(x, keys, values):
        return torch.func.functional_call(layer, {"keys": keys, "values": values}, (x,))

    assert torch.autograd.gradcheck(run, (x, layer.keys, layer.values))


def test_only_the_scores_of_the_forward_pass_meet_all_slots():
    layer, x = MemoryLayer(32, 512, k=8), torch.randn(64, 32, requires_grad=True)
    with count_flops() as count:
        y = layer(x)
    assert count.total == 2 * 64 * 32 * 512
    with count_flops() as count:
        y.sum().backward()
    assert count.total == 0  # Reading and adding rows.
    assert layer.active_parameters() == 512 * 32 + 8 * 32


def test_large_scores_and_equal_ones_stay_finite():
    layer = made(k=2)
    with torch.no_grad():
        layer.keys[0], layer.keys[1] = 1e6, 1e6
    x = torch.ones(3, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), (layer.values[0] + layer.values[1]).expand(3, -1) / 2, rtol=0, atol=1e-12)


def test_sizes_and_their_errors():
    assert tuple(MemoryLayer(4, k=8).keys.shape) == (64, 4)
    with pytest.raises(PartError, match="k must be between 1 and the 5 slots, got 6"):
        build("memory_layer(d_ff=5, k=6)", d_model=4)
    with pytest.raises(PartError, match="k must be between 1 and the 64 slots, got 0"):
        build("memory_layer(k=0)", d_model=4)
    with pytest.raises(PartError, match=r"MemoryLayer was built for width 4, not for inputs of shape \(2, 5\)"):
        MemoryLayer(4)(torch.zeros(2, 5))


def test_slots_are_read_by_a_list_of_tokens(unchecked):
    for shape in ((2, 5), (1, 2, 4), (4,)):
        with pytest.raises(PartError, match=rf"MemoryLayer reads inputs of shape \(tokens, 4\), not \({shape[0]},"):
            MemoryLayer(4, k=8).read(torch.zeros(shape))
