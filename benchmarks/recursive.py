"""What a stack of shared layers costs beside the plain stack of as many layers: time, FLOPs that ran, parameters.

Sharing alone computes what the stack computes. The updates (rank 8) add at most 2 rank (in + out) FLOPs per linear and token; a
tenth of the stack's time is asked for where many tokens run at once. Decoding one token at a time, where each of the two small
products of an update is a call of its own, stands beside it.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from _timing import interleaved, row

from gatework.core.cost import count_flops, count_parameters
from gatework.depth import Recursive, Stack
from gatework.depth.base import Block
from gatework.feedforward import GLU
from gatework.mixers import Attention

WIDTH, LAYERS, HEADS, D_FF, LOOPS, RANK = 256, 4, 4, 704, 2, 8
WANT = 0.9


def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def forward_backward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    return loss


def decode(model: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        state = model.init_state(len(x))
        for t in range(x.shape[1]):
            model(x[:, t : t + 1], state=state)


def check(blocks: list[Block], x: torch.Tensor) -> None:
    """At full rank, with norms of its own, the policy is the stack, before any time is taken."""
    blocks = [block.double() for block in copy.deepcopy(blocks)]
    same = Recursive(blocks, LOOPS, rank=D_FF, init="average", lora="svd", share_norms=False)
    torch.testing.assert_close(forward(same, x.double()), forward(Stack(blocks), x.double()), rtol=0, atol=1e-10)


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    blocks = [Block(Attention(WIDTH, HEADS), GLU(WIDTH, D_FF), WIDTH) for _ in range(LAYERS)]
    models = {
        "stack": Stack(copy.deepcopy(blocks)),
        "shared": Recursive(blocks, LOOPS, rank=0),
        f"rank {RANK}": Recursive(blocks, LOOPS, rank=RANK),
    }
    check(blocks, torch.randn(2, 50, WIDTH))
    print(", ".join(f"{name} {count_parameters(model):,} parameters" for name, model in models.items()))
    for name, call, shape, want in (
        ("forward", forward, (8, 512, WIDTH), WANT),
        ("forward+backward", forward_backward, (8, 512, WIDTH), WANT),
        ("32 tokens one by one", decode, (1, 32, WIDTH), None),
    ):
        x = torch.randn(shape)
        counts = []
        for model in models.values():
            with count_flops() as count:
                call(model, x)
            counts.append(count.total)
        seconds = interleaved(*(partial(call, model, x) for model in models.values()), repeats=7, warmup=1)
        for i, side in list(enumerate(models))[1:]:
            more = counts[i] / counts[0] - 1
            row(f"recursive {name}, {side}: {more:+.1%} FLOPs", seconds[i], seconds[0], side, "stack", f">= {WANT}" if want else "",
                seconds[0] / seconds[i] >= want if want else None)


if __name__ == "__main__":
    main()
