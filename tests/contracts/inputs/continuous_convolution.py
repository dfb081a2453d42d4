"""Samples of three functions on a plane, asked for at other places."""

import torch

from gatework.mixers.continuous_convolution import ContinuousConvolution


def make():
    return ContinuousConvolution(d_in=3, d_out=4, radius=0.6, taps=3, axes=2)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(3, 9, 3, dtype=torch.float64, generator=generator)
    points, at = (torch.rand(3, count, 2, dtype=torch.float64, generator=generator) for count in (9, 5))
    return u.to(dtype), points.to(dtype), torch.full((3, 9), 1 / 9, dtype=dtype), at.to(dtype)
