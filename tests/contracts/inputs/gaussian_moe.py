"""Inputs of ``gaussian_moe``."""

import torch

from gatework.experts.gaussian_moe import GaussianMoE


def make():
    return GaussianMoE(d_in=2, experts=3, activation="sigmoid", temperature=True)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, generator=generator, dtype=dtype), torch.randn(3, generator=generator, dtype=dtype)
