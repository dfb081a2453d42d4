"""Inputs of ``cross_gate``."""

import torch

from gatework.gates.cross_gate import SymmetricCrossGate


def make():
    return SymmetricCrossGate(8)


def inputs(dtype, seed):
    return tuple(torch.randn(2, 3, 8, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype))
