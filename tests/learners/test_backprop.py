from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gatework.bench import checkpoint
from gatework.core import Part, build, losses
from gatework.learners import Backprop
from gatework.models import Decoder
from gatework.optim import SGDR, AdaBelief, AdamW, Cosine


class Penalised(Part):
    """A linear layer that leaves two losses while it trains, and has a schedule of its own."""

    slot = "feedforward"

    def __init__(self, d_model: int, weight: float) -> None:
        super().__init__()
        self.linear = nn.Linear(d_model, d_model, dtype=torch.float64)
        self.weight = weight
        self.register_buffer("moved", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x).tanh()
        if self.training:
            self.losses = {"power": self.weight * (y**2).mean(), "bias": self.weight * self.linear.bias.sum()}
        return y

    def advance(self, step: int, total_steps: int) -> None:
        self.moved.copy_(torch.tensor([step, total_steps]))


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Penalised(4, 0.1), Penalised(4, 0.3)])
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.dropout(block(x))
        return self.head(x)


def net(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return Net(dropout)


def batch(step=0, rows=6):
    generator = torch.Generator().manual_seed(50 + step)
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64), torch.randint(3, (rows,), generator=generator)


def by_hand(model, x, y, gradient_of=None):
    """The objective, written out."""
    first, second = model.blocks
    a = torch.tanh(x @ first.linear.weight.T + first.linear.bias)
    b = torch.tanh(a @ second.linear.weight.T + second.linear.bias)
    logits = b @ model.head.weight.T + model.head.bias
    task = (torch.logsumexp(logits, 1) - logits[torch.arange(len(y)), y]).mean()
    extra = {
        "blocks.0.power": 0.1 * (a**2).mean(),
        "blocks.0.bias": 0.1 * first.linear.bias.sum(),
        "blocks.1.power": 0.3 * (b**2).mean(),
        "blocks.1.bias": 0.3 * second.linear.bias.sum(),
    }
    return task, extra


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr)


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
def test_estimate_is_the_gradient_of_the_task_and_all_parts_losses(accumulate):
    model = net()
    x, y = batch()
    task, extra = by_hand(model, x, y)
    expected = torch.autograd.grad(task + sum(extra.values()), list(model.parameters()))
    learner = Backprop(model, nn.functional.cross_entropy, sgd(model), accumulate=accumulate)
    for _ in range(2):  # The second estimate starts from zero again.
        values = learner.estimate((x, y))
    for p, g in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
    assert set(values) == {"loss", *extra}
    for name, value in {"loss": task, **extra}.items():
        torch.testing.assert_close(values[name], value.detach(), rtol=1e-10, atol=1e-12)
        assert not values[name].requires_grad
    assert losses(model) == {}


def test_step_is_estimate_clip_optimizer_schedule_and_advance():
    model = net()
    start = copy.deepcopy(model)
    optimizer = sgd(model, lr=0.5)
    schedule = Cosine(optimizer, total_steps=4, warmup=0.0, floor=0.0)
    learner = Backprop(model, nn.functional.cross_entropy, optimizer, schedule, total_steps=4, clip_norm=0.05)
    x, y = batch()
    task, extra = by_hand(start, x, y)
    gradient = torch.autograd.grad(task + sum(extra.values()), list(start.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert norm > 0.05
    values = learner.step((x, y))
    torch.testing.assert_close(values["loss"], task.detach())
    for p, q, g in zip(model.parameters(), start.parameters(), gradient, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.5 * g * 0.05 / norm, rtol=1e-5, atol=1e-9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.8535533905932737)
    assert model.blocks[1].moved.tolist() == [1, 4]
    learner.step((x, y))
    assert model.blocks[0].moved.tolist() == [2, 4]


def test_parameters_that_the_optimizer_does_not_own_neither_accumulate_nor_count_for_the_norm():
    model, alone = net(), net()
    trained = [p for p in model.head.parameters()]
    learner = Backprop(model, nn.functional.cross_entropy, torch.optim.SGD(trained, lr=0.1), clip_norm=1e-3)
    learner.step(batch())
    for block in alone.blocks:
        block.requires_grad_(False)
    frozen = Backprop(alone, nn.functional.cross_entropy, torch.optim.SGD(alone.head.parameters(), lr=0.1), clip_norm=1e-3)
    frozen.step(batch())
    assert torch.equal(model.head.weight, alone.head.weight)
    once = [p.grad.clone() for p in model.blocks.parameters()]
    learner.estimate(batch())
    learner.estimate(batch())
    for p, g in zip(model.blocks.parameters(), once, strict=True):
        assert p.grad.abs().sum() < 1.5 * g.abs().sum()


def test_predict_is_the_evaluation_mode_and_puts_every_mode_back():
    model = net(dropout=0.5)
    model.blocks[0].eval()  # A block that its owner keeps frozen.
    learner = Backprop(model, nn.functional.cross_entropy, sgd(model))
    x, _ = batch()
    modes = [module.training for module in model.modules()]
    first, second = learner.predict(x), learner.predict(x)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):
        learner.predict(x[:, :2])
    assert [module.training for module in model.modules()] == modes


OPTIMIZERS = {
    "adamw": lambda params: AdamW(params, lr=0.01),
    "adabelief": lambda params: AdaBelief(params, lr=0.01, amsgrad=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
}
SCHEDULES = {
    "cosine": lambda optimizer: Cosine(optimizer, total_steps=12),
    "sgdr": lambda optimizer: SGDR(optimizer, total_steps=12, keep_iterate=True),
    "none": lambda optimizer: None,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_resumes_bit_for_bit_from_a_checkpoint(optim, schedule, tmp_path):
    def learner(seed):
        model = net(seed=seed)
        optimizer = OPTIMIZERS[optim](model.parameters())
        loss = nn.functional.cross_entropy
        return Backprop(model, loss, optimizer, SCHEDULES[schedule](optimizer), total_steps=12, clip_norm=0.5)

    first = learner(0)
    for step in range(5):
        first.step(batch(step))
    checkpoint.save(tmp_path / "run.safetensors", first.state_dict())
    second = learner(1)
    second.load_state_dict(checkpoint.load(tmp_path / "run.safetensors"))
    for step in range(5, 12):
        ours, theirs = first.step(batch(step)), second.step(batch(step))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for (name, p), (_, q) in zip(first.model.state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(p, q), name
    assert first.steps == second.steps == 12
    if schedule == "sgdr":
        assert first.schedule.cycle == second.schedule.cycle == 3
        for p, q in zip(first.schedule.best_iterate(), second.schedule.best_iterate(), strict=True):
            assert torch.equal(p, q)


def test_a_state_with_a_schedule_is_not_loaded_without_one():
    model = net()
    optimizer = sgd(model)
    with_schedule = Backprop(model, nn.functional.cross_entropy, optimizer, Cosine(optimizer, total_steps=3))
    without = Backprop(model, nn.functional.cross_entropy, optimizer)
    with pytest.raises(ValueError, match="taken with a schedule"):
        without.load_state_dict(with_schedule.state_dict())
    with pytest.raises(ValueError, match="taken without a schedule"):
        with_schedule.load_state_dict(without.state_dict())


def test_learns_a_sequence_with_a_decoder():
    torch.manual_seed(0)
    model = Decoder(8, d_model=16, layers=1, heads=2)
    optimizer = AdaBelief(model.parameters(), lr=0.01)

    def loss_fn(output, y):
        return nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())

    learner = build("backprop", "learner", model=model, loss_fn=loss_fn, optimizer=optimizer, total_steps=80, clip_norm=1.0)
    tokens = torch.arange(33).remainder(7).repeat(4, 1)
    seen = [learner.step((tokens[:, :-1], tokens[:, 1:]))["loss"].item() for _ in range(80)]
    assert seen[-1] < 0.1 < 1.5 < seen[0]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"total_steps": 0}, "total_steps must be at least 1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive, got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be positive, got nan"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
    ],
)
def test_wrong_values_are_refused(options, sentence):
    model = net()
    with pytest.raises(ValueError, match=sentence):
        Backprop(model, nn.functional.cross_entropy, sgd(model), **options)
