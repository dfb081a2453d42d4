"""A small classifier, and examples of which some expert gets one right (of two classes both are seldom wrong)."""

import torch

from gatework.experts import GlobalLocal
from gatework.models import Classifier


def make():
    return GlobalLocal(Classifier((1, 5), classes=2, d_model=6, layers=1), local=4, hidden=3)


def inputs(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 1, 5, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.tensor([0, 1, 0]), torch.tensor([True, True, False])
