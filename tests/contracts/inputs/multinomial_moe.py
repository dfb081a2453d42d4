"""Inputs of ``multinomial_moe``."""

import torch

from gatework.experts.multinomial_moe import MultinomialMoE


def make():
    return MultinomialMoE(d_in=2, experts=3, classes=4, transform="tanh")


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, generator=generator, dtype=dtype), torch.randint(4, (3,), generator=generator)
