"""Inputs and states of five nodes of three graphs."""

import torch

from gatework.gates.g_forgetnet import GForgetNet


def make():
    return GForgetNet(inputs=4, d_model=3)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 5, width, dtype=torch.float64, generator=generator).to(dtype) for width in (4, 3))
