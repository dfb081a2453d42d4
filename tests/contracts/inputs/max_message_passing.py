"""Three graphs, of which one node has no edges."""

import torch

from gatework.mixers.max_message_passing import MaxMessagePassing


def make():
    return MaxMessagePassing(inputs=3, edge_inputs=2, d_model=5, d_ff=7)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    linked = torch.rand(3, 6, 6, generator=generator) < 0.5
    linked[:, 2] = False
    shapes = (3, 6, 3), (3, 6, 6, 2)
    nodes, edges = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return nodes, edges, linked
