"""Inputs of ``divcontrol``."""

import torch

from gatework.experts.divcontrol import DivLinear


def make():
    return DivLinear(6, 5, d_condition=4, groups=3, learngenes=2, tailors=1)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, condition = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in ((3, 2, 6), (3, 4)))
    return x, condition
