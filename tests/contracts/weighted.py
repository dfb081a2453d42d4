"""The contracts of the slot ``weight`` as plain functions of a part; see ``checks.py``.

The model has every kind of weight: a tied embedding and head, a linear layer, a convolution, a stack of experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatework import weights
from gatework.core import PartError, Weight
from gatework.core.cost import count_parameters

from .checks import close, finite, same, through_a_file

WIDTH, TOKENS, EXPERTS = 10, 13, 3
NAMES = ["conv.weight", "embedding.weight", "head.weight", "linear.weight", "stack"]
Make = Callable[[], Weight]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, 12)
        self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, 12) / 4)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        h = self.linear(self.norm(x)).tanh()
        experts = torch.einsum("bti,eoi->ebto", h, self.stack)
        return self.head(x + experts[0] * experts[1].sigmoid() + experts[2])


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def weighted(make: Make, seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
    model = net(seed, dtype)
    weights.apply(model, "*", make())
    return model


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, TOKENS, (2, 7), generator=torch.Generator().manual_seed(seed))


def effective(model: Net) -> dict[str, Tensor]:
    return {f"{name}.weight": getattr(model, name).weight.detach() for name in ("conv", "embedding", "head", "linear")} | {
        "stack": model.stack.detach()
    }


def loss(model: nn.Module, seed: int = 1) -> Tensor:
    x = tokens(seed)
    return F.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())


def has_packed_form(make: Make) -> bool:
    try:
        weights.pack(weighted(make))
    except PartError as error:
        if "has no packed form" not in str(error):
            raise
        return False
    return True


def check_weights(make: Make) -> None:
    """The shapes and dtypes of the model, in every dtype, finite; the report tells what happened."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        plain = net(0, dtype)
        before = {name: (w.shape, w.dtype) for name, w in effective(plain).items()}
        counted = count_parameters(plain), weights.stored_bytes(plain)
        report = weights.apply(plain, "*", make())
        after = effective(plain)
        found = {name: (w.shape, w.dtype) for name, w in after.items()}
        assert found == before, f"{found} for {before}"
        finite(after, f"{dtype} weight")
        assert sorted(report.tensors) == NAMES
        assert {name: torch.Size(shape) for name, shape in report.tensors.items()} == {n: shape for n, (shape, _) in before.items()}
        assert report.parameters == (counted[0], count_parameters(plain))
        assert report.bytes == (counted[1], weights.stored_bytes(plain))
        same(after["embedding.weight"], after["head.weight"], "tied weights")
        if dtype not in (torch.float16,):
            finite(plain(tokens()), f"{dtype} output")


def check_gradients(make: Make) -> None:
    """Finite, and every parameter gets one that is not 0; both modes give the same numbers."""
    model = weighted(make)
    loss(model).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, f"no gradient reaches {name}"
        finite(p.grad, f"gradient of {name}")
        assert p.grad.any(), f"no gradient reaches {name}"
    same(model.eval()(tokens()), model.train()(tokens()), "evaluation and training")


def check_training(make: Make) -> None:
    """SGD and Adam lower the loss through it."""
    for optimizer, lr in ((torch.optim.SGD, 0.05), (torch.optim.AdamW, 0.01)):
        model = weighted(make)
        rule = optimizer(model.parameters(), lr=lr)
        first = loss(model).item()
        for _ in range(30):
            rule.zero_grad()
            loss(model).backward()
            rule.step()
        last = loss(model).item()
        assert last < 0.9 * first, f"{optimizer.__name__} took the loss from {first:.4g} to {last:.4g}"


def check_determinism(make: Make) -> None:
    same(effective(weighted(make, 3)), effective(weighted(make, 3)), "two models from one seed")
    model = weighted(make)
    same(effective(model), effective(model), "read twice")


def check_fold(make: Make) -> None:
    """Plain parameters, bitwise what was used, modules as they were; tied weights tied, others apart."""
    model, plain = weighted(make), net()
    used, y = effective(model), model(tokens())
    weights.fold(model)
    same(effective(model), used, "folded weights")
    same(model(tokens()), y, "folded output")
    assert repr(model) == repr(plain)
    assert sorted(model.state_dict()) == sorted(plain.state_dict())
    assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()} == {
        n: (p.shape, p.dtype, p.requires_grad) for n, p in plain.named_parameters()
    }
    assert model.head.weight is model.embedding.weight, "the tied weights are apart"
    assert weights.stored_bytes(model) == weights.stored_bytes(plain)
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def check_refolding(make: Make) -> None:
    """Folding half of the model leaves the other half parametrized."""
    model = net()
    weights.apply(model, ["conv", "linear"], make())
    used, y = effective(model), model(tokens())
    weights.apply(model, "stack", make())
    with pytest.raises(PartError, match=r"conv.weight is parametrized already"):
        weights.apply(model, "conv", make())
    weights.fold(model)
    same({n: effective(model)[n] for n in NAMES[:4]}, {n: used[n] for n in NAMES[:4]}, "after a second part was applied")
    assert y.isfinite().all()


def check_pack(make: Make) -> None:
    """What the parametrized model did, in fewer bytes; unpacked again by ``fold``."""
    model = weighted(make)
    y, used = model(tokens()), effective(model)
    before = weights.stored_bytes(net())
    report = weights.pack(model)
    assert report.bytes[1] == weights.stored_bytes(model) < before, f"{report.bytes[1]} bytes packed, {before} plain"
    assert sorted(report.tensors) == NAMES
    same(effective(model), used, "packed weights")
    same(model(tokens()), y, "packed output")
    wide = weights.stored_bytes(model)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(tokens()).dtype == torch.bfloat16
    assert weights.stored_bytes(half) < wide
    folded = copy.deepcopy(model)
    weights.fold(folded)
    close(half(tokens()).double(), y, "packed in bfloat16", rtol=0, atol=0.05 * float(y.detach().abs().max()))
    same(folded(tokens()), y, "folded after packing")
    assert repr(folded) == repr(net())
    same(model(tokens()), y, "the packed model after its copies were changed")
    with pytest.raises(PartError, match="nothing to pack"):
        weights.pack(model)


def check_state_dict(make: Make) -> None:
    """What is saved loads into a model on which the same was done, whatever random values that one had."""
    model = weighted(make)
    loss(model).backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.1 * p.grad)
    y = model(tokens())
    other = weighted(make, seed=5)
    other.load_state_dict(through_a_file(model.state_dict()))
    same(other(tokens()), y, "output after loading")
    for some in (model, other):
        some.zero_grad()
        loss(some).backward()
    same([p.grad for p in other.parameters()], [p.grad for p in model.parameters()], "gradients after loading")
    if has_packed_form(make):
        weights.pack(model)
        packed = weighted(make, seed=6)
        weights.pack(packed)
        packed.load_state_dict(through_a_file(model.state_dict()))
        same(packed(tokens()), y, "output after loading packed")


def check_copies(make: Make) -> None:
    """A deep copy is apart: changed, folded or packed, it leaves the original alone."""
    model = weighted(make)
    y = model(tokens())
    changed, folded = copy.deepcopy(model), copy.deepcopy(model)
    same(changed(tokens()), y, "output of a copy")
    assert len(list(changed.parameters())) == len(list(model.parameters())), "what was shared is apart in the copy"
    with torch.no_grad():
        for tensor in changed.parameters():
            tensor.zero_()
    weights.fold(folded)
    if has_packed_form(make):
        weights.pack(copy.deepcopy(model))
    same(model(tokens()), y, "the original after its copies were changed")
    close(folded(tokens()), y, "the folded copy")


def check_compilation(make: Make) -> None:
    """``torch.compile(fullgraph=True)``, plain and packed: outputs and gradients of eager, compiled once."""
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), nn.Linear(12, WIDTH)))
        weights.apply(models[-1], "*", make())
    model, compiled = models
    run = torch.compile(compiled, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(seed))
        results: list[Any] = []
        with torch._dynamo.config.patch(error_on_recompile=seed > 1):
            for some, forward in ((model, model), (compiled, run)):
                some.zero_grad()
                y = forward(x)
                y.square().sum().backward()
                results.append({"y": y.detach()} | {n: p.grad for n, p in some.named_parameters()})
        for name, value in results[0].items():
            close(results[1][name], value, f"compiled {name}", rtol=0, atol=1e-5 * float(value.abs().max()))
    packed = weighted(make, dtype=torch.float32)
    if has_packed_form(make):
        weights.pack(packed)
        with torch.no_grad():
            run = torch.compile(packed, fullgraph=True, dynamic=False, backend="aot_eager")
            close(run(tokens()), packed(tokens()), "compiled packed output", rtol=0, atol=1e-5)
