"""Packed small numbers: five trits (-1, 0, 1) in a byte, as digits of a number in base 3."""

from __future__ import annotations

import torch
from jaxtyping import Int, Num, UInt8
from torch import Tensor

#: Trits in a byte: 3**5 = 243 of 256 values are used, 1.6 bits for log2(3) = 1.585.
TRITS = 5


def pack_trits(trits: Int[Tensor, "*R I"]) -> UInt8[Tensor, "*R P"]:
    """Pack each row of trits into ceil(I / 5) bytes, the first trit in the lowest digit, -1 as digit 0.

    Every row begins at a byte of its own, so that rows can be taken out alone; what a last byte has too much is filled
    with the trit -1 (:func:`unpack_trits` is told the length).
    """
    padding = -trits.shape[-1] % TRITS
    digits = torch.nn.functional.pad(trits.to(torch.uint8) + 1, (0, padding)).unflatten(-1, (-1, TRITS))
    powers = torch.tensor([3**k for k in range(TRITS)], dtype=torch.uint8, device=trits.device)
    return (digits * powers).sum(-1, dtype=torch.uint8)


def unpack_trits(packed: UInt8[Tensor, "*R P"], length: int, dtype: torch.dtype = torch.int8) -> Num[Tensor, "*R I"]:
    """The ``length`` trits of each row of :func:`pack_trits`, as numbers of ``dtype``."""
    powers = torch.tensor([3**k for k in range(TRITS)], device=packed.device)
    values = torch.arange(256, device=packed.device)[:, None]
    table = (values.div(powers, rounding_mode="floor") % 3 - 1).to(dtype)
    trits = table.index_select(0, packed.reshape(-1).int()).view(*packed.shape[:-1], packed.shape[-1] * TRITS)
    return trits[..., :length]


__all__ = ["TRITS", "pack_trits", "unpack_trits"]
