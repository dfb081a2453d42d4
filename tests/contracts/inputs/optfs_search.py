"""A small model with a gate: it says which of its inputs is the largest by the signs of all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatework.gates.optfs import OptFS


class Signs(nn.Module):
    """Each of 16 numbers becomes one of two features: positive or not."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 6)
        self.gate = OptFS(32, penalty=1e-3, epochs=4, search=0.5)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(96, 24), nn.Tanh())])
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        ids = 2 * torch.arange(16) + (x[:, 0] > 0)
        return self.head(self.blocks[0](self.gate(self.table(ids), ids).flatten(1)))


def model() -> nn.Module:
    return Signs()
