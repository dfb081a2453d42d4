from __future__ import annotations

import math

import pytest
import torch

from gatework.core import build
from gatework.optim import Constant, Cosine


def optimizer(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in rates], lr=0.1)


def rates(schedule, steps):
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in schedule.optimizer.param_groups])
        schedule.optimizer.step()
        schedule.step()
    return torch.tensor(seen, dtype=torch.float64)


def test_warms_up_linearly_then_follows_half_a_cosine_to_its_floor():
    seen = rates(Cosine(optimizer(1.0, 0.01), total_steps=200, warmup=0.05, floor=0.2), 230)
    warm = torch.arange(1, 11, dtype=torch.float64) / 10
    down = torch.tensor([0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * t / 190)) for t in range(190)], dtype=torch.float64)
    expected = torch.cat([warm, down, torch.full((30,), 0.2, dtype=torch.float64)])
    torch.testing.assert_close(seen[:, 0], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(seen[:, 1], expected / 100, rtol=0, atol=1e-16)


def test_equals_pytorch_without_warm_up():
    ours, theirs = optimizer(0.3), optimizer(0.3)
    seen = rates(Cosine(ours, total_steps=57, warmup=0.0, floor=0.0), 57)
    reference = rates(torch.optim.lr_scheduler.CosineAnnealingLR(theirs, T_max=57), 57)
    torch.testing.assert_close(seen, reference, rtol=0, atol=1e-14)


def test_resumes_bit_for_bit():
    whole = rates(Cosine(optimizer(0.3), total_steps=50), 50)
    first = Cosine(optimizer(0.3), total_steps=50)
    rates(first, 20)
    second = Cosine(optimizer(0.7), total_steps=9)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(rates(second, 30), whole[20:])


def test_one_step_run_uses_a_rate():
    assert rates(Cosine(optimizer(1.0), total_steps=1), 1).item() == 1.0


def test_constant_stays():
    schedule = build("constant", "schedule", optimizer=optimizer(0.5, 0.25), total_steps=10)
    assert isinstance(schedule, Constant)
    assert rates(schedule, 5).tolist() == [[0.5, 0.25]] * 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"total_steps": 5, "warmup": 1.0}, r"warmup is a share of the run in \[0, 1\), got 1.0"),
        ({"total_steps": 5, "floor": 1.5}, r"floor is a share of the learning rate in \[0, 1\], got 1.5"),
    ],
)
def test_wrong_values_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Cosine(optimizer(0.1), **options)
