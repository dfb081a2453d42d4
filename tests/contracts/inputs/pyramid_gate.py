"""Inputs of ``pyramid_gate``."""

import torch

from gatework.gates.pyramid_gate import PyramidGate


def make():
    return PyramidGate(8, modality_dropout=0.3)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 8, 4, 3)] * 2 + [(3, 4, 7, 6)] * 2
    return tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
