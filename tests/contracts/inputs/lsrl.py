"""Queries of three dictionaries of two words, and what they say."""

import torch

from gatework.mixers.lsrl import table_lookup


def make():
    return table_lookup(1)


def inputs(dtype, seed):
    return (torch.randint(4, (3, 5, 1), generator=torch.Generator().manual_seed(seed)).to(dtype),)
