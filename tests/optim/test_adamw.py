from __future__ import annotations

import math

import pytest
import torch

from gatework.core import build
from gatework.optim import AdamW


@pytest.mark.parametrize("foreach", [True, False])
def test_equals_the_equations(foreach):
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = AdamW([p], lr=0.05, foreach=foreach)
    x, m, v = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for t in range(1, 9):
        gradient = [math.sin(t), 3 * math.cos(t)]
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        for i, g in enumerate(gradient):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.95 * v[i] + 0.05 * g * g
            x[i] = (1 - 0.05 * 0.1) * x[i] - 0.05 * m[i] / (1 - 0.9**t) / (math.sqrt(v[i] / (1 - 0.95**t)) + 1e-8)
    torch.testing.assert_close(p.detach(), torch.tensor(x, dtype=torch.float64), rtol=1e-12, atol=0)


def test_is_multi_tensor_and_takes_the_groups_of_the_bench():
    decayed, free = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    groups = [{"params": [decayed]}, {"params": [free], "weight_decay": 0.0}]
    optimizer = build("adamw(betas=(0.9, 0.99))", "optim", params=groups, lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["foreach"] and group["betas"] == (0.9, 0.99) for group in optimizer.param_groups)
    decayed.grad, free.grad = torch.zeros(2, 2), torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), torch.full((2, 2), 0.99))
    assert torch.equal(free.detach(), torch.ones(2, 2))


def test_resumes_bit_for_bit_and_shares_no_memory():
    def run(optimizer, start, steps):
        (p,) = optimizer.param_groups[0]["params"]
        for step in range(start, start + steps):
            p.grad = torch.full_like(p, math.sin(step))
            optimizer.step()
        return p.detach().clone()

    first = AdamW([torch.nn.Parameter(torch.ones(3))])
    at_five = run(first, 0, 5)
    second = AdamW([torch.nn.Parameter(at_five)], lr=1.0)
    second.load_state_dict(first.state_dict())
    whole = run(first, 5, 5)  # Would move the second's moments too, were they shared.
    assert torch.equal(run(second, 5, 5), whole)
