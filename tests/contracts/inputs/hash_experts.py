"""Points of the unit square; each takes both experts, so that three points reach all parameters."""

import torch

from gatework.experts import HeterogeneousHashExperts


def make():
    return HeterogeneousHashExperts(2, features=3, experts=2, gate="topk(k=2)", levels=3, log2_size=5, n_max=32, coarsest=8, d_ff=4)


def inputs(dtype, seed):
    points = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (points.to(dtype),)
