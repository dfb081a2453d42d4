import torch
from torch import nn

from gatework.experts import Phatgoose


def make():
    a, b, v = (torch.randn(*shape) for shape in ((4, 2, 12), (4, 7, 2), (4, 12)))
    return Phatgoose(nn.Linear(12, 7), a, b, v, k=2)


def inputs(dtype, seed):
    return (torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype),)
