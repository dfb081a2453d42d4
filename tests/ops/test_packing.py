"""Trits in bytes: against a number in base 3 built digit by digit."""

from __future__ import annotations

import pytest
import torch

from gatework.ops.packing import pack_trits, unpack_trits


def reference(row: list[int]) -> list[int]:
    """The bytes of one row: every five trits a number in base 3, lowest digit first, missing digits 0."""
    packed = []
    for start in range(0, len(row), 5):
        value = 0
        for trit in reversed(row[start : start + 5]):
            value = 3 * value + trit + 1
        packed.append(value)
    return packed


@pytest.mark.parametrize("shape", [(4, 5), (3, 7), (2, 3, 11), (6,), (1, 1), (2, 25)])
def test_packing_equals_the_reference_and_unpacks_exactly(shape):
    trits = torch.randint(-1, 2, shape, dtype=torch.int8)
    packed = pack_trits(trits)
    rows = [reference(row) for row in trits.reshape(-1, shape[-1]).tolist()]
    # A short last group keeps its digits low: the padding's digit is 0.
    assert packed.dtype == torch.uint8
    assert packed.reshape(-1, packed.shape[-1]).tolist() == rows
    assert packed.shape == (*shape[:-1], -(-shape[-1] // 5))
    for dtype in (torch.int8, torch.float32, torch.float64, torch.bfloat16, torch.float16):
        again = unpack_trits(packed, shape[-1], dtype)
        assert again.dtype == dtype
        assert torch.equal(again, trits.to(dtype))


def test_all_243_groups():
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5)
    packed = pack_trits(every)
    assert sorted(packed.flatten().tolist()) == list(range(243))
    assert torch.equal(unpack_trits(packed, 5), every.to(torch.int8))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_pack(shape):
    packed = pack_trits(torch.zeros(shape, dtype=torch.int8))
    assert packed.shape == (shape[0], -(-shape[1] // 5))
    assert unpack_trits(packed, shape[1]).shape == shape


def test_rows_unpack_alone():
    trits = torch.randint(-1, 2, (9, 13), dtype=torch.int8)
    packed, order = pack_trits(trits), torch.tensor([7, 0, 7, 3])
    assert torch.equal(unpack_trits(packed[order], 13), trits[order])
