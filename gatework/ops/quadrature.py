"""Weights of sampled points, with which a sum over them is an integral."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def trapezoid(points: Float[Tensor, "*B T"], period: float | None = None) -> Float[Tensor, "*B T"]:
    """The weights of the trapezoid rule: half the way from each point's neighbour on the left to that on the right.

    The end points' weights are half the way to their only neighbour; with ``period`` the first and the last are neighbours. A
    single point has the weight 1, or the period.

    Args:
        points: places on a line, rising along the last axis.
        period: length of a circle on which they lie, more than they span.
    """
    if points.shape[-1] == 1:
        return torch.full_like(points, 1.0 if period is None else period)
    if period is None:
        ends = points[..., :1], points[..., -1:]
    else:
        ends = points[..., -1:] - period, points[..., :1] + period
    around = torch.cat([ends[0], points, ends[1]], -1)
    return (around[..., 2:] - around[..., :-2]) / 2
