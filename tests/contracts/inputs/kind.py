"""Inputs of ``kind``."""

import torch

from gatework.experts.kind import KINDLinear


def make():
    return KINDLinear(6, 5, classes=3, learngenes=2, tailors=1)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 6, dtype=torch.float64, generator=generator).to(dtype), torch.tensor([2, 0, 1])
