"""Memory layers: k slots read and written, against the dense form that the released code has, and against an MLP as wide.

D 64, k 8, float32, 1 thread, a training step's forward and backward pass over 1,024 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.feedforward import MLP, MemoryLayer

TOKENS, WIDTH, K = 1024, 64, 8


def dense(layer: MemoryLayer) -> Callable[[Tensor], Tensor]:
    """The same function, with a weight for every slot, most of them 0, times all values."""

    def run(x: Tensor) -> Tensor:
        best, slots = (x @ layer.keys.t() * x.shape[-1] ** -0.5).topk(layer.k)
        weights = torch.zeros(len(x), len(layer.keys), dtype=x.dtype).scatter(1, slots, best.softmax(-1))
        return weights @ layer.values

    return run


def both_ways(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> Callable[[], list[Tensor]]:
    wanted = [x, *layer.parameters()]
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def step() -> list[Tensor]:
        y = run(x)
        return [y, *torch.autograd.grad(y, wanted, upstream)]

    return step


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = MemoryLayer(WIDTH, 512, K).double()
    x = torch.randn(100, WIDTH, dtype=torch.float64, requires_grad=True)
    for ours, theirs in zip(both_ways(layer, layer, x)(), both_ways(dense(layer), layer, x)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    print("correct: outputs and all gradients equal the dense form's (float64, 1e-12)")

    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    for slots in (1024, 4096, 16384):
        layer, mlp = MemoryLayer(WIDTH, slots, K), MLP(WIDTH, slots)
        ours, full, wide = interleaved(
            both_ways(layer, layer, x), both_ways(dense(layer), layer, x), both_ways(mlp, mlp, x), repeats=9
        )
        row(f"memory layer, {slots} slots: k of them vs all", ours, full, "sparse", "dense", ">= 2", full / ours >= 2)
        row(f"memory layer, {slots} slots: vs an MLP as wide", ours, wide, "memory", "mlp")


if __name__ == "__main__":
    main()
