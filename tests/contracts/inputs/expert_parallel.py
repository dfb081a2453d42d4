import torch

from gatework.experts import MoE
from gatework.experts.expert_parallel import ExpertParallel


def make():
    return ExpertParallel(MoE(8, d_ff=8, experts=4, shared=1))


def inputs(dtype, seed):
    return (torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype),)
