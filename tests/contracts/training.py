"""The contracts of optimizers, schedules and learners as plain functions of a class; see ``checks.py``."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatework.core import build
from gatework.core.registry import parameters
from gatework.gates import attach
from gatework.models import Classifier

from .checks import close, finite, same, through_a_file

SHAPES = ((4, 3), (5,), (), (2, 2, 2), (0,))


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in SHAPES]


def weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(tensor) for tensor in tensors(dtype)]


def take_steps(optimizer: Any, steps: range, skip: bool = True) -> None:
    """Steps with gradients that depend on the step alone; every other step the second parameter has none."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for p, g in zip(params, tensors(seed=100 + step), strict=True):
            p.grad = g.to(p.dtype)
        if skip and step % 2:
            params[1].grad = None
        optimizer.step()


def state_tensors(optimizer: Any) -> dict[str, Any]:
    return {f"{i}.{name}": value for i, kept in optimizer.state_dict()["state"].items() for name, value in kept.items()}


# -- optimizers


def check_foreach(cls: type) -> None:
    """The multi-tensor step and the plain loop give the same numbers."""
    results = []
    for foreach in (True, False):
        params = weights()
        optimizer = cls(params, lr=0.05, foreach=foreach)
        before = [p.detach().clone() for p in params]
        take_steps(optimizer, range(9))
        results.append([p.detach() for p in params] + [v for v in state_tensors(optimizer).values() if isinstance(v, Tensor)])
        moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
        assert moved == [True] * 4 + [False], f"which parameters moved: {moved}"
    close(*results, "foreach and the plain loop", rtol=1e-12, atol=1e-14)


def check_resuming(cls: type) -> None:
    """Continued from its ``state_dict`` in a file it goes where it would have gone, bit for bit; both dtypes."""
    for dtype in (torch.float64, torch.bfloat16):
        params = weights(dtype)
        optimizer = cls([{"params": params[:2], "lr": 0.02}, {"params": params[2:]}], lr=0.05)
        take_steps(optimizer, range(4))
        saved = through_a_file(optimizer.state_dict())
        again = [nn.Parameter(p.detach().clone()) for p in params]
        other = cls([{"params": again[:2]}, {"params": again[2:]}], lr=0.3)
        other.load_state_dict(saved)
        for some in (optimizer, other):
            take_steps(some, range(4, 9))
        same([p.detach() for p in again], [p.detach() for p in params], f"resumed in {dtype}")
        same(state_tensors(other), state_tensors(optimizer), f"state resumed in {dtype}")
        finite({str(i): p for i, p in enumerate(params)}, f"{dtype} parameters")
        assert all(p.dtype == dtype for p in params)


def check_missing_gradients(cls: type) -> None:
    """A parameter without a gradient stays, decay or not; of a separable method it has its own clock: as if it had been
    stepped alone."""
    params = weights()
    optimizer = cls(params, lr=0.05)
    before = params[1].detach().clone()
    for step in range(3):
        take_steps(optimizer, range(2 * step + 1, 2 * step + 2))
    same(params[1].detach(), before, "a parameter without gradients")
    if not cls.capabilities["separable"]:
        return
    take_steps(optimizer, range(10, 13), skip=False)
    alone = nn.Parameter(before.clone())
    lonely = cls([alone], lr=0.05)
    for step in range(10, 13):
        alone.grad = tensors(seed=100 + step)[1]
        lonely.step()
    close(params[1].detach(), alone.detach(), "a parameter that joins late", rtol=1e-12, atol=1e-14)


def check_groups(cls: type) -> None:
    """Two groups of a separable method are two optimizers; otherwise each group still goes by its own ``lr``."""
    if not cls.capabilities["separable"]:
        for rates in ((0.05, 0.0), (0.05, 0.001)):
            params = weights()
            before = [p.detach().clone() for p in params]
            take_steps(cls([{"params": params[:2]}, {"params": params[2:], "lr": rates[1]}], lr=rates[0]), range(6), skip=False)
            moves = [(p.detach() - b).norm().item() for p, b in zip(params, before, strict=True)]
            assert moves[0] > 0
            assert moves[3] < moves[0] / 10 if rates[1] else moves[3] == 0, f"moves of {moves} at rates {rates}"
        return
    params, twins = weights(), weights()
    optimizer = cls([{"params": params[:2], "lr": 0.01}, {"params": params[2:]}], lr=0.05)
    parts = [cls(twins[:2], lr=0.01), cls(twins[2:], lr=0.05)]
    take_steps(optimizer, range(6), skip=False)
    for step in range(6):
        for p, g in zip(twins, tensors(seed=100 + step), strict=True):
            p.grad = g
        for part in parts:
            part.step()
    close([p.detach() for p in params], [p.detach() for p in twins], "groups", rtol=1e-12, atol=1e-14)


def check_closure(cls: type) -> None:
    """``step(closure)`` evaluates with gradients on, returns the loss, and steps by the new gradient."""
    params, twins = weights(), weights()
    optimizer, plain = cls(params, lr=0.05), cls(twins, lr=0.05)

    def loss(some: list[nn.Parameter]) -> Tensor:
        return sum((p.square() * (i + 1)).sum() for i, p in enumerate(some))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(params)
        value.backward()
        return value

    for _ in range(4):
        wanted = loss(twins)
        plain.zero_grad()
        wanted.backward()
        plain.step()
        found = optimizer.step(closure)
        assert found is not None, "the closure's loss is lost"
        same(found.detach(), wanted.detach(), "the closure's loss")
    same([p.detach() for p in params], [p.detach() for p in twins], "with a closure")
    assert plain.step() is None


def check_refusals(cls: type) -> None:
    """Rates that make no sense, in the defaults or in a group, and sparse gradients."""
    for bad in (-1.0, math.nan):
        with pytest.raises(ValueError, match=r"(?i)lr|learning rate"):
            cls(weights(), lr=bad)
        with pytest.raises(ValueError, match=r"(?i)lr|learning rate"):
            cls([{"params": weights(), "lr": bad}], lr=0.1)
    with pytest.raises(ValueError, match="empty"):
        cls([], lr=0.1)
    table, first = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))
    optimizer = cls([first, table], lr=0.1)
    first.grad = torch.ones(3)
    table.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (4, 2), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert (table == 1).all()
    assert (first == 1).all(), "a refused step has moved another parameter"


def check_complex(cls: type) -> None:
    """Complex parameters move as pairs of real ones."""
    start, grads = torch.randn(3, 2, dtype=torch.complex128), [torch.randn(3, 2, dtype=torch.complex128) for _ in range(5)]
    pair, number = nn.Parameter(torch.view_as_real(start).clone()), nn.Parameter(start.clone())
    real, complexes = cls([pair], lr=0.05), cls([number], lr=0.05)
    for g in grads:
        pair.grad, number.grad = torch.view_as_real(g).clone(), g.clone()
        real.step()
        complexes.step()
    close(torch.view_as_real(number.detach()), pair.detach(), "complex parameters", rtol=1e-12, atol=1e-14)


def check_descent(cls: type) -> None:
    """It minimises a quadratic bowl, whatever the layout of the gradient (stride 0 too), and leaves the gradient as it is."""
    target = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = cls([p], lr=0.02 if cls.learning_rates is None else math.sqrt(math.prod(cls.learning_rates)))
    start = (p - target).square().sum().item()
    for _ in range(300):
        p.grad = 2 * (p.detach() - target)
        given = p.grad.clone()
        optimizer.step()
        same(p.grad, given, "the gradient after the step")
    assert (p - target).square().sum() < 0.05 * start, f"{(p - target).square().sum():.3g} of {start:.3g} is left"
    results = []
    for expanded in (True, False):
        p = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        optimizer = cls([p], lr=0.02)
        for _ in range(3):
            g = torch.full((), 0.3, dtype=torch.float64).expand(4, 3)
            p.grad = g if expanded else g.contiguous()
            optimizer.step()
        results.append(p.detach())
    same(*results, "gradients of stride 0")


def check_optimizer_copies(cls: type) -> None:
    params = weights()
    optimizer = cls(params, lr=0.05)
    take_steps(optimizer, range(3))
    other = copy.deepcopy(optimizer)
    assert repr(other) == repr(optimizer)
    assert cls.__name__ in repr(optimizer)
    assert "lr: 0.05" in repr(optimizer)
    for some in (optimizer, other):
        take_steps(some, range(3, 6))
    same(state_tensors(other), state_tensors(optimizer), "a copied optimizer")


# -- schedules

STEPS = 20


def scheduled(cls: type, lr: float = 0.4) -> tuple[Any, Any]:
    """An optimizer of two groups, the second at a tenth of ``lr``, and the schedule over it."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": params[:1]}, {"params": params[1:], "lr": lr / 10}], lr=lr)
    return optimizer, cls(optimizer, **({"total_steps": STEPS} if "total_steps" in parameters(cls) else {}))


def rates(optimizer: Any, schedule: Any, steps: int) -> Iterator[list[float]]:
    for _ in range(steps):
        yield [float(group["lr"]) for group in optimizer.param_groups]
        optimizer.step()
        schedule.step()


def check_rates(cls: type) -> None:
    """Positive and finite all through the run, finite and not negative after it; each group's own rate is its scale."""
    optimizer, schedule = scheduled(cls)
    found = torch.tensor(list(rates(optimizer, schedule, STEPS)), dtype=torch.float64)
    finite(found, "rates")
    assert (found > 0).all(), f"rates {found[:, 0].tolist()}"
    close(found[:, 1], found[:, 0] / 10, "the group at a tenth", rtol=1e-12, atol=0)
    optimizer, schedule = scheduled(cls, lr=0.8)
    doubled = torch.tensor(list(rates(optimizer, schedule, STEPS)), dtype=torch.float64)
    close(doubled, 2 * found, "twice the rate", rtol=1e-12, atol=0)
    after = torch.tensor(list(rates(optimizer, schedule, 2 * STEPS)))
    finite(after, "rates after the run")
    assert (after >= 0).all()
    same(torch.tensor(schedule.get_last_lr()), torch.tensor([group["lr"] for group in optimizer.param_groups]), "get_last_lr")


def check_schedule_resuming(cls: type) -> None:
    """Continued from its ``state_dict``, with the optimizer's, at any step: the same rates."""
    whole = list(rates(*scheduled(cls), STEPS))
    for done in (0, 1, 7, 19):
        optimizer, schedule = scheduled(cls)
        for _ in rates(optimizer, schedule, done):
            pass
        saved = through_a_file({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})
        optimizer, schedule = scheduled(cls, lr=0.1)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        assert list(rates(optimizer, schedule, STEPS - done)) == whole[done:], f"resumed after {done} steps"


# -- learners


def learner(cls: type, seed: int = 0, lr: float = 0.05) -> Any:
    torch.manual_seed(seed)
    own = importlib.util.find_spec(f"{__package__}.inputs.{cls.part_name}")
    if own is not None:  # A rule that needs more of a model than blocks and a head says which: ``model()``.
        model = importlib.import_module(own.name).model().double()
    else:
        model = Classifier((1, 16), classes=3, backbone="mlp", d_model=12, layers=3, activation="xsilu")
    if cls.part_name == "gradient_routing":
        attach(model, "_blocks", "feature_selection")
    model = model.double()
    optimizer = build("adamw", "optim", params=model.parameters(), lr=lr)
    schedule = build("cosine", "schedule", optimizer=optimizer, total_steps=STEPS)
    offered = {"optimizer": optimizer, "schedule": schedule, "total_steps": STEPS, "loss_fn": nn.functional.cross_entropy}
    return cls(model, **{name: value for name, value in offered.items() if name in parameters(cls)})


def batch(seed: int = 0, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, 16, dtype=torch.float64, generator=generator)
    return x, x[:, 0, :3].argmax(1)


def check_estimate(cls: type) -> None:
    """Fills every ``p.grad`` anew, moves nothing, returns detached losses."""
    rule = learner(cls)
    before = {name: p.detach().clone() for name, p in rule.model.named_parameters()}
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        said = rule.estimate(batch())
        assert "loss" in said
        assert not any(value.requires_grad for value in said.values()), "a loss with its graph"
        grads = {name: p.grad.clone() for name, p in rule.model.named_parameters()}
        finite(grads | said, "estimate")
        assert all(g.any() for g in grads.values()), "a parameter without a gradient"
        results.append(grads | said)
    same(*results, "estimating twice")
    same({name: p.detach() for name, p in rule.model.named_parameters()}, before, "parameters after an estimate")


def check_learning(cls: type) -> None:
    """Steps move every parameter and lower the loss; ``step`` returns what ``estimate`` would."""
    rule, other = learner(cls), learner(cls)
    before = {name: p.detach().clone() for name, p in rule.model.named_parameters()}
    torch.manual_seed(1)
    first = rule.step(batch())
    torch.manual_seed(1)
    same(first, other.estimate(batch()), "losses of step and estimate")
    still = [name for name, p in rule.model.named_parameters() if torch.equal(p, before[name])]
    assert not still, f"the step has not moved {still}"
    for _ in range(STEPS - 1):
        last = rule.step(batch())
    assert last["loss"] < 0.8 * first["loss"], f"the loss went from {first['loss']:.4g} to {last['loss']:.4g}"


def check_prediction(cls: type) -> None:
    """The same twice, without a graph, the model's modes left as they were."""
    rule = learner(cls)
    rule.model.train()
    next(iter(rule.model.blocks)).eval()
    modes = [module.training for module in rule.model.modules()]
    y = rule.predict(batch()[0])
    assert y.shape == (12, 3)
    assert not y.requires_grad
    finite(y, "prediction")
    same(rule.predict(batch()[0]), y, "predicting twice")
    assert [module.training for module in rule.model.modules()] == modes, "the model's modes have changed"


def check_learner_resuming(cls: type) -> None:
    """Continued from its ``state_dict`` in a file: bit for bit where it would have gone."""
    rule = learner(cls)
    for step in range(7):
        rule.step(batch(step))
    other = learner(cls, seed=9, lr=0.01)
    other.load_state_dict(through_a_file(rule.state_dict()))
    for step in range(7, 13):
        losses = []
        for some in (rule, other):
            torch.manual_seed(step)
            losses.append(some.step(batch(step)))
        same(*losses, f"losses of step {step}")
    same(dict(other.model.state_dict()), dict(rule.model.state_dict()), "parameters")
    same(other.predict(batch()[0]), rule.predict(batch()[0]), "predictions")
