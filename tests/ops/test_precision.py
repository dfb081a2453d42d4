"""Numerics that autocast must not touch."""

import torch

from gatework.ops.precision import without_autocast


def test_autocast_is_off_inside_and_on_again_behind():
    a, cpu = torch.randn(4, 4), torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with without_autocast(cpu):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    with without_autocast(cpu):
        assert (a @ a).dtype == torch.float32
