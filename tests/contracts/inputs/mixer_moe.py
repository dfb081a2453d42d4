"""Three environments, of which the middle one has an expert of its own."""

import torch

from gatework.experts import MixERLayer


def make():
    layer = MixERLayer(2, 3, environments=3, experts=2, context=4, d_ff=5)
    with torch.no_grad():
        layer.contexts[1] = 1
        layer.weight.zero_()
        layer.weight[:, 1] = torch.tensor([1.0, 1, 1, 1, -2])
    return layer


def inputs(dtype, seed):
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype), torch.tensor([0, 1, 2])
