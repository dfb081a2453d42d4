"""Rows of three examples with five fields."""

from __future__ import annotations

import torch
from torch import Tensor

from gatework.gates.optfs import OptFS


def make() -> OptFS:
    return OptFS(features=15, penalty=1e-2, epochs=3, final_beta=4.0)


def inputs(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(15, generator=generator)[:5] for _ in range(3)])
    return torch.randn(3, 5, 4, dtype=torch.float64, generator=generator).to(dtype), ids
