"""Started by ``test_expert_parallel.py``, once per rank: one training step's outputs and gradients, saved to a file."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from gatework.core import losses
from gatework.experts import MoE
from gatework.experts.expert_parallel import ExpertParallel
from gatework.experts.expert_placement import ExpertPlacement

D = 8
#: Ranks and tokens of each: as many, unequally many, none.
TOKENS = ([5, 5], [9, 2], [6, 0], [0, 0])
PLACEMENTS = ((0, 0, 1, 1), (1, 0, 1, 0))


def layer() -> MoE:
    torch.manual_seed(0)
    made = MoE(D, d_ff=6, experts=4, shared=1).double()
    torch.nn.init.normal_(made.gate.weight)
    return made


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def main(rank: int, world: int, file: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    results = {}
    for case, counts in enumerate(TOKENS):
        for ranks in PLACEMENTS:
            # The tokens need no gradient: every rank joins the backward exchanges all the same.
            for needs_gradient in (False, True):
                group = init_device_mesh("cpu", (world,)) if case == 0 else None
                part = ExpertParallel(layer(), group, ExpertPlacement(ranks, world))
                x = tokens(counts[rank], rank).requires_grad_(needs_gradient)
                y = part(x)
                (y.square().sum() + 0 * sum(losses(part).values())).backward()
                gradients = {name: p.grad for name, p in part.named_parameters()}
                results[json.dumps([counts, ranks, needs_gradient])] = (y.detach(), x.grad, gradients)
    torch.save(results, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
