"""Tiles of weights that are stretches of one shared array, against the equations with Python's own integers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from gatework import weights
from gatework.core import PartError
from gatework.weights import Roast, SharedArray

P = 2038074743
ROWS, COLUMNS, TILE = 5, 7, (2, 3)


def numbers(seed, purpose):
    digests = [hashlib.sha256(f"{seed} {purpose} {k}".encode()).digest() for k in range(3)]
    return [int.from_bytes(digest[:8], "big") % (P // 2 - 1) * 2 + 1 for digest in digests]


def reference(size, seed):
    """Slot and sign of each entry of the only weight."""
    a, b, d = numbers(seed, "slots")
    e, f, g = numbers(seed, "signs")
    slots, signs = [], []
    for i in range(ROWS):
        for j in range(COLUMNS):
            start = (a * (i // TILE[0]) + b * (j // TILE[1] + ROWS) + d) % P % (size - TILE[0] * TILE[1])
            slots.append(start + i % TILE[0] * TILE[1] + j % TILE[1])
            p = i * COLUMNS + j
            signs.append(1 if (e * p + f * p * p + g) % P % 2 == 0 else -1)
    return torch.tensor(slots), torch.tensor(signs, dtype=torch.float64)


def shared(part, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(COLUMNS, ROWS, bias=False).double()
    spread = layer.weight.detach().std(correction=0)
    weights.apply(layer, "*", part)
    return layer, layer.parametrizations.weight.original, spread


@pytest.mark.parametrize(("ratio", "seed"), [(0.5, 0), (0.9, 3), (2.0, 1)])
def test_every_entry_and_the_gradient_are_the_equations(ratio, seed):
    layer, psi, spread = shared(Roast(ratio=ratio, tile=TILE, scaler="none", init=0.3, seed=seed))
    slots, signs = reference(len(psi), seed)
    lam = spread / psi.detach().square().mean().sqrt()
    expected = lam * signs * psi.detach()[slots]
    torch.testing.assert_close(layer.weight.detach().flatten(), expected, rtol=1e-12, atol=0)
    incoming = torch.randn(ROWS, COLUMNS, dtype=torch.float64)
    (layer.weight * incoming).sum().backward()
    by_hand = torch.zeros_like(psi).index_add_(0, slots, lam * signs * incoming.flatten())
    torch.testing.assert_close(psi.grad, by_hand, rtol=1e-12, atol=1e-14)


def test_a_tile_is_a_stretch_and_tiles_overlap_even_in_a_long_array():
    slots, _ = reference(70, 0)
    grid = slots.view(ROWS, COLUMNS)
    assert grid[:2, :3].flatten().diff().tolist() == [1] * 5
    layer, psi, _ = shared(Roast(ratio=2.0, tile=TILE))
    (layer.weight.sum()).backward()
    assert int((psi.grad != 0).sum()) <= len(slots.unique()) < ROWS * COLUMNS


def test_it_is_stable_rps_with_the_map_roast():
    settings = {"ratio": 0.6, "tile": TILE, "scaler": "v5", "seed": 2}
    one, psi, _ = shared(Roast(**settings))
    other, twin, _ = shared(SharedArray(map="roast", **settings))
    assert torch.equal(psi, twin)
    for layer in (one, other):
        layer.weight.square().sum().backward()
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(psi.grad, twin.grad)


def test_a_tile_that_does_not_fit_is_refused():
    with pytest.raises(PartError, match="has 12 numbers; map=roast takes 257 to "):
        weights.apply(nn.Linear(10, 10), "*", "roast")
    with pytest.raises(PartError, match="roast: a tile has at least one row and column, got "):
        weights.apply(nn.Linear(10, 10), "*", "roast(tile=(0, 2))")
