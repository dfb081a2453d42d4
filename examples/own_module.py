"""A gatework part in one's own module: a mixture of experts inside a plain PyTorch network."""

import torch
from torch import nn

from gatework import core
from gatework.experts import MoE


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.experts = MoE(d_model=64, d_ff=32, experts=8, gate="topk(k=2)")
        self.last = nn.Linear(64, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(h + self.experts(h))


def main() -> None:
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    x = torch.randn(512, 16)
    y = torch.where(x[:, :1] > 0, x[:, 1:2], -x[:, 2:3])  # Two regimes: something for experts to share out.
    steps = 200
    for step in range(1, steps + 1):
        loss = nn.functional.mse_loss(network(x), y)
        # The gate's balance losses are already weighted; the part leaves them where `core.losses` finds them.
        total = loss + sum(core.losses(network).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        core.advance(network, step, steps)
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")
    assert loss.item() < 0.2


if __name__ == "__main__":
    main()
