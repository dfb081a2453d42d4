"""Logits of four bars, and values of which one lies beyond either end."""

import torch

from gatework.learners import BarDistribution


def make():
    return BarDistribution(torch.tensor([-2.0, -0.5, 0.1, 0.4, 3.0]))


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=generator).to(dtype)
    return logits, torch.tensor([-4.0, -1.0, 0.0, 0.2, 7.0], dtype=dtype).repeat(3, 1)
