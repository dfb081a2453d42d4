"""Started by ``test_loss_free.py``, once per rank: trains a small mixture under DistributedDataParallel, writes what it got."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gatework import core
from gatework.gates import LossFree, TopK, ZLoss

STEPS, MICRO, TOKENS, D, E = 3, 3, 8, 6, 4


class Mixture(nn.Module):
    """Linear experts (the layers of ``experts`` take longer to import than this takes to run)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = TopK(D, E, balance=[ZLoss(0.1), LossFree(E, 0.05)])
        self.experts = nn.Linear(D, E * D)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.gate(x).dense()[:, :, None] * self.experts(x).view(-1, E, D)).sum(1)


def train(rank: int, world: int, accumulate: str) -> dict[str, torch.Tensor]:
    """Weights and the bias after each step; every step has MICRO micro-batches, of whose tokens a rank takes its share."""
    torch.manual_seed(0)
    layer = Mixture().double()
    nn.init.normal_(layer.gate.weight)
    model = DistributedDataParallel(layer) if world > 1 else layer
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    generator = torch.Generator().manual_seed(1)
    biases, share = [], TOKENS // world
    for step in range(STEPS):
        for micro in range(MICRO):
            x = torch.randn(TOKENS, D, dtype=torch.float64, generator=generator)
            x[TOKENS // 2 :] += 2  # The ranks choose unlike experts.
            x = x[rank * share : (rank + 1) * share]
            quiet = world > 1 and accumulate == "no_sync" and micro < MICRO - 1
            with model.no_sync() if quiet else contextlib.nullcontext():
                loss = (model(x) - x).square().mean() + sum(core.losses(model).values())
                (loss / MICRO).backward()
        if accumulate == "checkpoint":
            layer.load_state_dict(layer.state_dict())
        optimizer.step()
        optimizer.zero_grad()
        core.advance(model, step + 1, STEPS)
        biases.append(layer.gate.balance.loss_free.bias.clone())
    return {name: p.detach() for name, p in layer.named_parameters()} | {"biases": torch.stack(biases)}


def main(folder: Path, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found = {how: train(rank, world, how) for how in ("no_sync", "every", "checkpoint")}
    dist.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
