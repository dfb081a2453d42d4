from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

from gatework.core import PartError, build
from gatework.optim import SGDR


def sgd(*rates):
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in rates], lr=0.1, momentum=0.9)


def rates(schedule, optimizer, steps):
    """The learning rates that ``steps`` optimizer steps would use."""
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return torch.tensor(seen, dtype=torch.float64)


def expected(step, t_0, t_mult, lr, lr_min=0.0):
    """Equation 5, the cycles counted one by one."""
    cycle = 0
    while step >= sum(t_0 * t_mult**i for i in range(cycle + 1)) - 1e-7:
        cycle += 1
    since = max(step - sum(t_0 * t_mult**i for i in range(cycle)), 0.0)
    return lr_min + 0.5 * (lr - lr_min) * (1 + math.cos(math.pi * since / (t_0 * t_mult**cycle)))


@pytest.mark.parametrize(("t_0", "t_mult", "lr_min"), [(10, 1, 0.0), (7, 2, 0.01), (1, 2, 0.0), (3, 3, 0.001), (1, 1, 0.0)])
def test_equals_pytorch_for_whole_cycles(t_0, t_mult, lr_min):
    a, b = sgd(0.5, 0.05), sgd(0.5, 0.05)
    ours = rates(SGDR(a, t_0=float(t_0), t_mult=float(t_mult), lr_min=lr_min), a, 150)
    theirs = rates(CosineAnnealingWarmRestarts(b, T_0=t_0, T_mult=t_mult, eta_min=lr_min), b, 150)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("t_0", "t_mult"), [(7.3, 1.0), (10.5, 1.5), (0.7, 2.0), (4.0, 1.1), (100 / 3, 1.0)])
def test_equals_the_equation_for_real_lengths(t_0, t_mult):
    optimizer = sgd(0.5)
    seen = rates(SGDR(optimizer, t_0=t_0, t_mult=t_mult, lr_min=0.02), optimizer, 200)[:, 0]
    wanted = torch.tensor([expected(step, t_0, t_mult, 0.5, 0.02) for step in range(200)], dtype=torch.float64)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-9)


def test_restarts_at_the_sums_of_the_lengths():
    optimizer = sgd(1.0)
    schedule = SGDR(optimizer, t_0=5.0)
    ended, restarted = [], []
    for step in range(1, 80):
        optimizer.step()
        schedule.step()
        if schedule.cycle_ended:
            ended.append(step)
        if optimizer.param_groups[0]["lr"] == 1.0:
            restarted.append(step)
    assert ended == restarted == [5 * (2**i - 1) for i in range(1, 5)]
    assert schedule.cycle == 4


def test_epochs_are_fractions_per_batch():
    a, b = sgd(1.0), sgd(1.0)
    epochs = rates(SGDR(a, t_0=1.5, steps_per_epoch=67.0), a, 300)
    steps = rates(SGDR(b, t_0=100.5), b, 300)
    assert torch.equal(epochs, steps)
    assert epochs[100] < 1e-3 < epochs[101]


@pytest.mark.parametrize(
    ("total", "cycles", "t_mult"), [(700, 3, 2.0), (100, 3, 2.0), (1000, 7, 1.0), (999, 4, 1.3), (2, 3, 2.0), (1, 1, 2.0)]
)
def test_a_run_of_known_length_ends_where_a_cycle_ends(total, cycles, t_mult):
    optimizer = sgd(1.0)
    schedule = SGDR(optimizer, total_steps=total, cycles=cycles, t_mult=t_mult)
    seen = rates(schedule, optimizer, total)[:, 0]
    assert schedule.cycle == cycles
    assert schedule.cycle_ended
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1.0)
    if total > 50 * cycles:
        assert seen[-1] < 0.01
        assert int((seen.diff() > 0.5).sum()) == cycles - 1


def test_restarts_keep_the_momentum():
    optimizer = sgd(0.1)
    (p,) = optimizer.param_groups[0]["params"]
    schedule = SGDR(optimizer, t_0=2.0)
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    assert schedule.cycle_ended
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full((2,), 1.9))


def train(optimizer, schedule, steps, start=0):
    (p,) = optimizer.param_groups[0]["params"]
    for step in range(start, start + steps):
        p.grad = torch.tensor([math.sin(step), math.cos(step)])
        optimizer.step()
        schedule.step()
    return p


def test_keeps_the_iterate_at_the_end_of_the_last_finished_cycle():
    optimizer = sgd(0.1)
    schedule = SGDR(optimizer, t_0=3.0, keep_iterate=True)
    assert schedule.best_iterate() is None
    with pytest.raises(ValueError, match="no cycle has ended yet"):
        schedule.load_best_iterate()
    after_nine = train(optimizer, schedule, 9).detach().clone()
    p = train(optimizer, schedule, 4, start=9)
    assert not torch.equal(p, after_nine)
    (kept,) = schedule.best_iterate()
    assert torch.equal(kept, after_nine)
    schedule.load_best_iterate()
    assert torch.equal(p.detach(), after_nine)
    with pytest.raises(ValueError, match="keep_iterate=True only"):
        SGDR(sgd(0.1), t_0=3.0).best_iterate()


def test_resumes_bit_for_bit():
    optimizer = sgd(0.1)
    schedule = SGDR(optimizer, t_0=3.7, t_mult=1.4, keep_iterate=True)
    p = train(optimizer, schedule, 11)
    state = copy.deepcopy((p.detach(), optimizer.state_dict(), schedule.state_dict()))

    other = sgd(0.9)
    resumed = SGDR(other, t_0=1.0, keep_iterate=True)
    other.param_groups[0]["params"][0].data.copy_(state[0])
    other.load_state_dict(state[1])
    resumed.load_state_dict(state[2])
    assert torch.equal(resumed.best_iterate()[0], schedule.best_iterate()[0])
    for start in range(11, 40):
        a, b = train(optimizer, schedule, 1, start), train(other, resumed, 1, start)
        assert torch.equal(a, b)
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
        assert torch.equal(resumed.best_iterate()[0], schedule.best_iterate()[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "give t_0, the first cycle's length, or total_steps"),
        ({"t_0": 0.0}, "t_0 must be positive, got 0.0"),
        ({"t_0": math.nan}, "t_0 must be positive, got nan"),
        ({"t_0": 1.0, "t_mult": 0.5}, "t_mult must be at least 1, got 0.5"),
        ({"t_0": 1.0, "lr_min": -1.0}, "lr_min must be at least 0"),
        ({"t_0": 1.0, "steps_per_epoch": 0.0}, "steps_per_epoch must be positive"),
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"total_steps": 10, "cycles": 0}, "cycles must be at least 1"),
    ],
)
def test_wrong_values_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SGDR(sgd(0.1), **options)


def test_builds_from_an_expression():
    schedule = build("sgdr(cycles=2, t_mult=1.0)", "schedule", optimizer=sgd(0.1), total_steps=80)
    assert schedule.first_cycle == 40
    schedule = build("sgdr(t_0=12.5)", "schedule", optimizer=sgd(0.1), total_steps=80)
    assert schedule.first_cycle == 12.5
    with pytest.raises(PartError, match="sgdr: cycles must be at least 1"):
        build("sgdr(cycles=0)", "schedule", optimizer=sgd(0.1), total_steps=80)
