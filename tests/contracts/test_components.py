"""What every registered component keeps: a part whose inputs are its own, which ``inputs/<id>.py`` makes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatework.core import No, advance, capability, entries, lookup, losses, metrics

from .checks import close, finite, gradients, same, through_a_file
from .parts import example_inputs, objective


def components(capable: str | None = None) -> Any:
    """All components, by name (that have the capability)."""
    found = [entry.name for entry in entries("component") if capable is None or capability(entry.cls, capable)]
    return pytest.mark.parametrize("name", found)


EVERY = components()


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating tensors in an output or an input."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in tensors(item))
    elif isinstance(value, list | tuple):
        yield from (t for item in value for t in tensors(item))
    elif hasattr(value, "__dataclass_fields__"):
        yield from tensors(vars(value))


def fresh(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    part: nn.Module = example_inputs(name).make().to(dtype)
    return part


def new(name: str, train: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In use: no parameter at a special value, a short training behind it, schedules moved."""
    part = fresh(name)
    with torch.no_grad():
        for p in part.parameters():
            p.add_(0.1 * torch.randn_like(p))
        part.train()
        for step in (1, 2, 3):
            part(*example_inputs(name).inputs(torch.float64, step))
            advance(part, step, 3)
    losses(part)
    metrics(part)
    return part.to(dtype).train(train)


def run(name: str, part: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs that ask for a gradient, and outputs."""
    given = example_inputs(name).inputs(dtype, seed)
    leaves = [t.requires_grad_() for t in tensors(given)]
    torch.manual_seed(9)
    return leaves, list(tensors(part(*given)))


def everything(name: str, part: nn.Module) -> dict[str, Any]:
    """Outputs, losses, metrics and gradients of one call."""
    leaves, outputs = run(name, part)
    said = losses(part)
    total = sum(objective(y) for y in outputs if y.requires_grad) + sum(said.values())
    if isinstance(total, Tensor) and total.requires_grad:
        total.backward()
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)} | {f"input {i}": t.grad for i, t in enumerate(leaves)}
    found |= said | metrics(part) | gradients(part)
    return {key: value for key, value in found.items() if value is not None}


@EVERY
def test_gradients_are_finite_and_reach_every_trainable_parameter(name):
    part = new(name, train=True)
    finite(everything(name, part), "training")
    unreached = [key for key, p in part.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unreached, f"no gradient reaches {unreached}"


@EVERY
def test_dtypes(name):
    for dtype in (torch.float32, torch.float64):
        for y in run(name, new(name, dtype=dtype), dtype)[1]:
            assert y.dtype == dtype
            finite(y, "output")


@EVERY
def test_bfloat16_autocast_is_finite(name):
    part = new(name, train=True, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = run(name, part, torch.float32)[1]
    for y in outputs:
        finite(y, "bfloat16 output")
    total = sum(y.float().square().sum() for y in outputs if y.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    finite({key: g for key, g in gradients(part).items() if g is not None}, "bfloat16 gradient")


@EVERY
def test_state_dict_holds_all(name):
    part, other = new(name), fresh(name, seed=5)
    other.load_state_dict(through_a_file(part.state_dict()))
    for step in (4, 5):
        for train in (True, False):
            same(*(run(name, net.train(train))[1] for net in (part, other)), "outputs after loading")
        for net in (part, other):
            advance(net, step, 6)
    same(dict(part.state_dict()), dict(other.state_dict()), "state after two more steps")


@EVERY
def test_deepcopy_and_pickle_in_the_middle_of_training(name):
    part = new(name, train=True)
    run(name, part)
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert losses(other) == {}
        assert metrics(other) == {}
        same(run(name, copy.deepcopy(part).eval())[1], run(name, other.eval())[1], "outputs of a copy")


@EVERY
def test_same_seed_same_numbers(name):
    same(dict(fresh(name, 7).state_dict()), dict(fresh(name, 7).state_dict()), "two constructions from one seed")
    for train in (True, False):
        same(*(everything(name, new(name, train)) for _ in range(2)), "two equal runs")


@EVERY
def test_gradients_of_stride_0(name):
    results = []
    for expanded in (True, False):
        part = new(name, train=True)
        leaves, outputs = run(name, part)
        for y in (y for y in outputs if y.requires_grad):
            one = torch.full((), 0.7, dtype=y.dtype).expand(y.shape)
            y.backward(one if expanded else one.contiguous(), retain_graph=True)
        found = {f"input {i}": t.grad for i, t in enumerate(leaves)} | gradients(part)
        results.append({key: g for key, g in found.items() if g is not None})
    close(*results, "gradients from a gradient of stride 0")


@components("batch_invariant")
def test_rows_do_not_depend_on_each_other(name):
    part = new(name)
    given = example_inputs(name).inputs(torch.float64, 1)
    whole = list(tensors(part(*given)))
    for row in range(3):
        alone = list(tensors(part(*(t[row : row + 1] if isinstance(t, Tensor) else t for t in given))))
        close(alone, [y[row : row + 1] for y in whole], "a row alone")


@pytest.mark.compile
@components("compiles")
def test_compiled_equals_eager_and_compiles_once(name):
    torch._dynamo.reset()
    plain, compiled = new(name, train=True), new(name, train=True)
    run_compiled = torch.compile(compiled, fullgraph=True, dynamic=False, backend="aot_eager")
    for seed in (1, 2):
        results = []
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            for part, forward in ((plain, plain), (compiled, run_compiled)):
                part.zero_grad()
                given = example_inputs(name).inputs(torch.float64, seed)
                leaves = [t.requires_grad_() for t in tensors(given)]
                torch.manual_seed(9)
                outputs = list(tensors(forward(*given)))
                said = losses(part)
                (sum(objective(y) for y in outputs) + sum(said.values())).backward()
                found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
                found |= {f"input {i}": t.grad for i, t in enumerate(leaves)}
                found |= said | metrics(part) | gradients(part)
                results.append({key: value for key, value in found.items() if value is not None})
        close(*results, "compiled")


@EVERY
def test_a_component_that_does_not_compile_says_why(name):
    answer = capability(lookup(name).cls, "compiles")
    assert answer is True or (isinstance(answer, No) and answer.reason)


@EVERY
def test_repr(name):
    part = fresh(name)
    assert type(part).__name__ in repr(part)
    assert "object at 0x" not in repr(part)
