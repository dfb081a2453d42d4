"""A small model and three of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatework.gates.block_sparsity import BlockSparsityGate


def gated() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3))


def make() -> BlockSparsityGate:
    return BlockSparsityGate(gated(), (2, 6), budget=0.6)


def inputs(dtype: torch.dtype, seed: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return gated().to(dtype), torch.randn(3, 2, 6, dtype=torch.float64).to(dtype)
