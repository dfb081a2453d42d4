"""The contracts as plain functions: each takes a :class:`Case` and raises AssertionError where the part breaks its word.

The tests run them over the registry, and over toys that break one contract each, to show that every check can fail.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import jaxtyping
import torch
import torch._inductor.config
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from gatework.core import PartError, Routing, State, advance, capability, losses, metrics
from gatework.core.cost import count_flops
from gatework.core.registry import parameters

from .parts import EXPERTS, LENGTH, MASKLESS, Case, alternatives, call, conditions, objective

#: Another order of the same sums, in float64.
CLOSE = {"rtol": 0, "atol": 1e-10}


def same(a: Any, b: Any, what: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def close(a: Any, b: Any, what: str = "", **tolerance: float) -> None:
    torch.testing.assert_close(a, b, msg=lambda text: f"{what}: {text}", **(tolerance or CLOSE))


def finite(values: Any, what: str) -> None:
    for name, value in values.items() if isinstance(values, dict) else [("", values)]:
        assert value is not None, f"{what}: {name} is None"
        assert value.isfinite().all(), f"{what}: {name} is not finite"


def gradients(part: torch.nn.Module) -> dict[str, Tensor | None]:
    """Of what the part does not hold frozen by itself."""
    return {name: p.grad for name, p in part.named_parameters() if p.requires_grad}


def input_gradient(part: torch.nn.Module, x: Tensor) -> Tensor | None:
    """The input's gradient; zeros where a static gate, which does not look at its tokens, has left none."""
    return torch.zeros_like(x) if getattr(part, "static", False) and x.grad is None else x.grad


def through_a_file(value: Any) -> Any:
    """Saved and loaded as data, without pickled code."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# -- every module


def check_shapes_and_dtypes(case: Case) -> None:
    width = case.width
    for dtype in (torch.float32, torch.float64):
        part = case.new(dtype)
        shapes: list[tuple[int, ...]] = [(3, 24, width), (1, 1, width), (2, 7, width), (0, 3, width), (2, 0, width)]
        if case.slot == "gate":
            shapes = [(72, width), (1, width), (0, width)]
        elif case.slot == "feedforward":
            shapes += [(width,), (5, width), (2, 2, 3, width)]
        elif case.slot == "channel_gate":
            shapes += [(width,), (5, width)]
        elif case.slot == "activation":
            shapes += [(), (3,), (2, 1, 2, 3)]
        elif capability(part, "any_length"):
            shapes += [(1, length, width) for length in (2, 63, 64, 65, 130)]
        else:
            shapes = [(3, LENGTH, width), (1, LENGTH, width), (0, LENGTH, width)]
        for train in (False, True):
            part.train(train)
            for shape in shapes:
                x = torch.randn(shape, dtype=dtype, requires_grad=True)
                y = part(x, **conditions(part, x))
                wanted: tuple[int, ...] = shape
                if isinstance(y, Routing):
                    y, wanted = y.dense(), (shape[0], EXPERTS)
                assert y.shape == wanted, f"{tuple(y.shape)} for {shape}"
                assert y.dtype == dtype, f"{y.dtype} for {dtype}"
                finite(y, f"output of {shape}")
                said = losses(part)
                finite(said, f"losses of {shape}")
                finite(metrics(part), f"metrics of {shape}")
                (y.sum() + sum(said.values())).backward()
                finite(input_gradient(part, x), f"gradient of {shape}")


def check_gradients(case: Case) -> None:
    """Finite, and every parameter gets one that is not 0."""
    part, x = case.new(train=True), case.x(8).requires_grad_()
    y = call(part, x)
    assert y.requires_grad, "the output has no graph"
    (objective(y) + sum(losses(part).values())).backward()
    finite({"x": input_gradient(part, x)} | gradients(part), "gradient")
    unreached = [name for name, g in gradients(part).items() if not g.any() and name not in part.fades]
    assert not unreached, f"no gradient reaches {unreached}"
    assert getattr(part, "static", False) or x.grad.any(), "no gradient reaches the input"


def check_state_dict(case: Case) -> None:
    """All that a part has learnt and counted is in its ``state_dict``."""
    part, other = case.new(seed=0), case.fresh(seed=5)
    other.load_state_dict(through_a_file(part.state_dict()))
    x = case.x()
    for step in (4, 5):
        for train in (True, False):
            results = []
            for net in (part, other):
                torch.manual_seed(step)
                results.append(call(net.train(train), x))
            same(*results, "output after loading")
        same(metrics(part), metrics(other), "metrics after loading")
        for net in (part, other):
            advance(net, step, 6)
    same(dict(part.state_dict()), dict(other.state_dict()), "state after two more steps")


def check_copies(case: Case) -> None:
    """``deepcopy`` and ``pickle`` in the middle of training: equal, apart, without side outputs."""
    part, x = case.new(train=True), case.x().requires_grad_()
    call(part, x)
    left = [sorted(m.losses) for m in part.modules() if getattr(m, "losses", None)]
    before = copy.deepcopy(part.state_dict())
    for other in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert losses(other) == {}, "a copy brings losses along"
        assert metrics(other) == {}, "a copy brings metrics along"
        assert repr(other) == repr(part)
        same(call(copy.deepcopy(part).eval(), x), call(copy.deepcopy(other).eval(), x), "output of a copy")
        with torch.no_grad():
            for tensor in (*other.parameters(), *other.buffers()):
                tensor.zero_()
        same(dict(part.state_dict()), dict(before), "the original's state after the copy's was zeroed")
    assert [sorted(m.losses) for m in part.modules() if getattr(m, "losses", None)] == left, "copying took the original's losses"


def check_bfloat16(case: Case) -> None:
    """Under CPU autocast and wholly in bfloat16: finite outputs, gradients and side outputs."""
    for autocast in (True, False):
        for train in (True, False):
            part = case.new(torch.float32 if autocast else torch.bfloat16, train=train)
            dtype = torch.float32 if autocast else torch.bfloat16
            x = case.x(8, dtype=dtype).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                masks: list[Any] = [{}] if case.slot in MASKLESS else [{}, {"mask": case.mask(x)}]
                for settings in masks:
                    y = call(part, x, **settings)
                    said = losses(part)
                    finite(y, "bfloat16 output")
                    finite(said, "bfloat16 losses")
                    finite(metrics(part), "bfloat16 metrics")
            if not autocast and case.slot != "gate":
                assert y.dtype == torch.bfloat16, f"{y.dtype} for bfloat16"
            y = y.float()
            (y.square().sum() + sum(said.values())).backward()
            finite(input_gradient(part, x), "bfloat16 gradient of x")
            finite({name: g for name, g in gradients(part).items() if g is not None}, "bfloat16 gradient")


def check_determinism(case: Case) -> None:
    """Same seed, same part; same part, same call, same numbers."""
    same(dict(case.fresh(seed=7).state_dict()), dict(case.fresh(seed=7).state_dict()), "two constructions from one seed")
    for train in (True, False):
        results = []
        for _ in range(2):
            part, x = case.new(train=train), case.x().requires_grad_()
            torch.manual_seed(9)
            y = call(part, x)
            said = losses(part)
            (objective(y) + sum(said.values())).backward()
            reached = {name: g for name, g in gradients(part).items() if g is not None}
            results.append({"y": y, "x": x.grad} | said | metrics(part) | reached)
        same(*results, "two equal runs")
    first = call(part, x)
    same(first, call(part, x), "two calls in evaluation")


def check_expanded_gradients(case: Case) -> None:
    """Incoming gradients of stride 0 (from ``sum``, ``mean``, ``expand``) are as good as any."""
    results = []
    for expanded in (True, False):
        part, x = case.new(train=True), case.x(8).requires_grad_()
        torch.manual_seed(9)
        y = call(part, x)
        one = torch.full((), 0.7, dtype=y.dtype).expand(y.shape)
        y.backward(one if expanded else one.contiguous())
        results.append({"x": x.grad} | {name: g for name, g in gradients(part).items() if g is not None})
    close(*results, "gradients from a gradient of stride 0")


def check_checkpointing(case: Case) -> None:
    """Recomputation in the backward pass changes no gradient, counts nothing twice and leaves nothing behind."""
    results = []
    for recompute in (True, False):
        part, x = case.new(train=True), case.x(8).requires_grad_()
        torch.manual_seed(9)
        with set_checkpoint_early_stop(False):
            y = checkpoint(lambda t, part=part: call(part, t), x, use_reentrant=False) if recompute else call(part, x)
            said, seen = losses(part), metrics(part)
            (objective(y) + sum(said.values())).backward()
        assert losses(part) == {}, "the recomputation offers the losses a second time"
        assert metrics(part) == {}, "the recomputation offers the metrics a second time"
        state = {f"state.{name}": value for name, value in part.state_dict().items()}
        results.append({"x": x.grad} | gradients(part) | state | said | seen)
    same(*results, "with activation checkpointing")


def check_side_outputs(case: Case) -> None:
    """Losses while training only, with a graph; metrics without; each handed out once."""
    part, x = case.new(train=True), case.x()
    call(part, x)
    call(part.eval(), x)
    assert losses(part) == {}, "the losses of an earlier training pass after one in evaluation"
    call(part.train(), x)
    said, seen = losses(part), metrics(part)
    assert losses(part) == {}
    assert metrics(part) == {}
    for name, value in said.items():
        assert value.dim() == 0, f"the loss {name} is no scalar"
        assert value.requires_grad, f"the loss {name} has no graph"
    call(part.eval(), x)
    assert losses(part) == {}, "a loss in evaluation"
    seen |= metrics(part)
    for name, value in seen.items():
        assert not value.requires_grad, f"the metric {name} holds a graph"
    finite(said | seen, "side output")


def check_mask(case: Case) -> None:
    """What stands in padded places changes neither real outputs nor losses, metrics or statistics; nor do they themselves."""
    x = case.x()
    mask = case.mask(x)
    other = torch.where(mask[..., None], x, 5 * torch.randn_like(x))
    for train in (True, False):
        results = []
        for some in (x, other):
            part = case.new(train=train)
            torch.manual_seed(9)
            y = call(part, some, mask=mask)
            finite(y, "output with padding")
            state = {f"state.{name}": value for name, value in part.state_dict().items()}
            results.append({"y": y[mask]} | losses(part) | metrics(part) | state)
        close(*results, "with other padding")
    part = case.new()
    if case.slot in ("gate", "feedforward"):
        close(call(part, x, mask=mask)[mask], call(part, x[mask]), "with padding removed")
        said = metrics(part)
        call(part, x, mask=mask)
        close(metrics(part), said, "metrics with padding removed")
    for train in (True, False):
        y = call(part.train(train), x, mask=torch.zeros_like(mask))
        finite(y, "output of nothing but padding")
        finite(losses(part) | metrics(part), "side output of nothing but padding")


def check_batch_invariance(case: Case) -> None:
    """A row's output does not depend on the other rows."""
    part, x = case.new(), case.x()
    y = call(part, x)
    close(torch.cat([call(part, x[i : i + 1]) for i in range(len(x))]), y, "rows alone")
    order = torch.randperm(len(x))
    close(call(part, x[order]), y[order], "rows in another order")


def settings(part: torch.nn.Module) -> list[Any]:
    """All plain values that a part and its children hold, and their tensors."""
    plain = [v for m in part.modules() for k, v in vars(m).items() if isinstance(v, int | float | str) and k != "training"]
    return plain + [tensor.tolist() for tensor in part.state_dict().values()]


def check_repr(case: Case) -> None:
    """Names the class, and tells apart parts that were built differently."""
    part = case.fresh()
    shown = repr(part)
    assert case.cls.__name__ in shown
    assert "object at 0x" not in shown
    silent = []
    for name, value in alternatives(case.cls):
        try:
            other = Case(case.cls, dict(case.args) | {name: value}, case.mixer).fresh()
        except ValueError:
            continue
        if repr(other) == shown and settings(other) != settings(part):
            silent.append(f"{name}={value}")
    assert not silent, f"repr does not show {silent}"


def check_docstring(case: Case, paper_source: str | None = None) -> None:
    """A short summary, every constructor argument under ``Args``, the paper's address in the module."""
    text = inspect.getdoc(case.cls) or ""
    summary = text.split("\n\n")[0]
    assert 4 < len(summary) < 75, f"the summary has {len(summary)} characters"
    assert "\n" not in summary
    assert summary.endswith(".")
    arguments = re.search(r"^Args:\n((?:(?: .*)?\n?)*)", text, re.MULTILINE)
    heads = re.findall(r"^    (\w[\w, ]*):", arguments[1], re.MULTILINE) if arguments else []
    named = {name.strip() for head in heads for name in head.split(",")}
    missing = set(parameters(case.cls)) - named
    assert not missing, f"Args does not name {sorted(missing)}"
    assert named <= set(parameters(case.cls)), f"Args names {sorted(named - set(parameters(case.cls)))}, which is no argument"
    if paper_source:
        number = paper_source.rstrip("/").rpartition("/")[2]
        module = inspect.getmodule(case.cls)
        assert number in (module.__doc__ or ""), f"the module's docstring does not name {number}"


# -- sequence mixers and depth policies


def check_causality(case: Case) -> None:
    """Neither the value nor the gradient of an early output knows a later input."""
    part, length = case.new(), 37
    x = case.x(2, length).requires_grad_()
    y = call(part, x)
    for t in (1, 17, 36):
        later = x.detach().clone()
        later[:, t:] = torch.randn_like(later[:, t:])
        close(call(part, later)[:, :t], y[:, :t], f"outputs before {t} with other inputs from {t} on", rtol=0, atol=1e-12)
        (grad,) = torch.autograd.grad(objective(y[:, :t]), x, retain_graph=True)
        close(grad[:, t:], torch.zeros_like(grad[:, t:]), f"gradient from before {t} to inputs from {t} on", rtol=0, atol=1e-12)


def refusal(call: Callable[[], Any]) -> str:
    """What a call that cannot be served says, without the annotation check of the test run, which would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        call()
    except PartError as error:
        return str(error)
    except Exception as error:
        return type(error).__name__
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    return ""


def check_wrong_calls(case: Case) -> None:
    """Shapes, masks and states that do not fit meet one sentence."""
    part, x = case.new(), case.x(3)
    real, ids = torch.ones(3, LENGTH, dtype=torch.bool), torch.zeros(3, LENGTH, dtype=torch.long)
    wrong: list[tuple[Tensor, dict[str, Any], str]] = [
        (x[..., 1:], {}, "inputs of shape"), (x[0], {}, "inputs of shape"),
        (x, {"mask": real[:, 1:]}, "mask has one bool per token"), (x, {"mask": real.double()}, "mask has one bool per token"),
        (x, {"keep": real[1:]}, "keep has one bool per token"), (x, {"state": State()}, "own init_state|sees later tokens"),
    ]
    if capability(part, "packs"):
        wrong.append((x, {"segments": ids[:, 1:]}, "segments has one whole number"))
    if capability(part, "decodes"):
        wrong += [
            (x, {"state": part.init_state(2)}, "the state holds 2 sequences and the input 3"),
            (x, {"state": part.init_state(3), "segments": ids}, "packed documents cannot be decoded"),
        ]
    if not capability(part, "any_length"):
        wrong.append((x[:, 1:], {}, f"{LENGTH} tokens"))
    for some, given, message in wrong:
        said = refusal(lambda some=some, given=given: part(some, **given))
        assert re.search(message, said), f"{said!r} does not say {message!r} of {sorted(given)}"


def fed(part: Any, x: Tensor, pieces: list[int], state: Any = None, **settings: Tensor) -> Tensor:
    """Outputs of ``x`` fed in pieces of these lengths."""
    state = part.init_state(len(x)) if state is None else state
    outputs, start = [], 0
    assert sum(pieces) == x.shape[1]
    for size in pieces:
        span = slice(start, start + size)
        outputs.append(part(x[:, span], state=state, **{name: value[:, span] for name, value in settings.items()}))
        start += size
    return torch.cat(outputs, dim=1)


def check_decoding(case: Case) -> None:
    """Whole, in pieces, token by token: the same outputs as the parallel form."""
    part, length = case.new(), 70 if case.slot == "mixer" else 24
    x = case.x(3, length)
    y = part(x)
    pieces = [length], [1, 5, 0, 10, length - 16], [length - 4, 1, 1, 1, 1], [1] * length
    for grad, some in (*((False, p) for p in pieces), *((True, p) for p in pieces[:-1])):
        with torch.set_grad_enabled(grad):
            close(fed(part, x, some), y, f"pieces {some[:5]} with gradients {'on' if grad else 'off'}")
    close(part(x), y, "the parallel form after decoding")


def check_reordering(case: Case) -> None:
    part, x = case.new(), case.x(3, 20)
    order = torch.tensor([2, 0, 0, 1])
    state = part.init_state(3)
    with torch.no_grad():
        fed(part, x[:, :12], [8, 1, 1, 1, 1], state)
        state.reorder(order)
        close(fed(part, x[order, 12:], [1] * 8, state), part(x[order])[:, 12:], "outputs after reordering")


def check_state_bytes(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        part = case.new(dtype)
        state, done = part.init_state(3), 0
        for length in (1, 7, 40):
            with torch.no_grad():
                fed(part, case.x(3, length - done, dtype), [length - done], state)
            done = length
            assert state.nbytes == 3 * part.state_bytes(length), f"{state.nbytes / 3} bytes after {length} tokens"


#: Real tokens of three rows of 9 places: padding on the left, on the right, on both sides and inside.
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool)


def check_padding(case: Case) -> None:
    """A padded row's real outputs are those of the row alone, with a state too, and so are the tokens decoded after it."""
    part, x, more = case.new(), 3 * case.x(3, 9), case.x(3, 6, seed=8)
    alone = [part(torch.cat([x[i][PADDED[i]], more[i]])[None])[0] for i in range(3)]
    counts = PADDED.sum(1).tolist()
    wanted = torch.cat([row[:n] for row, n in zip(alone, counts, strict=True)])
    y = part(x, mask=PADDED)
    finite(y, "output with padding")
    close(y[PADDED], wanted, "padded rows")
    for pieces in ([9], [4, 3, 2], [1] * 9):
        state = part.init_state(3)
        with torch.no_grad():
            close(fed(part, x, pieces, state, mask=PADDED)[PADDED], wanted, f"padded rows in pieces {pieces}")
            rest = fed(part, more, [1, 3, 1, 1], state)
        for i, n in enumerate(counts):
            close(rest[i], alone[i][n:], f"what row {i} decodes after pieces {pieces}")


def check_packing(case: Case) -> None:
    """Packed documents come out as they do alone, with padding too."""
    part, x = case.new(), case.x(2, 80)
    lengths = ([5, 1, 64, 10], [40, 40])
    segments = torch.stack([torch.repeat_interleave(torch.tensor([7, 2, 9, 4][: len(n)]), torch.tensor(n)) for n in lengths])
    alone = torch.stack([torch.cat([part(piece[None])[0] for piece in row.split(n)]) for row, n in zip(x, lengths, strict=True)])
    close(part(x, segments=segments), alone, "packed documents")
    mask = torch.ones(2, 80, dtype=torch.bool)
    mask[0, 70:] = False
    mask[1, :40] = False
    close(part(x, segments=segments, mask=mask)[mask], alone[mask], "packed documents beside padding")


def check_keep(case: Case) -> None:
    """Kept tokens' outputs are the full ones, the others exactly 0, the state sees all, and the rest is not computed."""
    part = case.new()
    length = 20 if capability(part, "any_length") else LENGTH
    x, more, decodes = case.x(3, length), case.x(3, 3, seed=8), capability(part, "decodes")
    whole, after = part(x), part(torch.cat([x, more], dim=1))[:, length:] if decodes else None
    some = case.mask(x)
    for keep in (some, torch.zeros_like(some), torch.ones_like(some), some & (torch.arange(3) == 1)[:, None]):
        wanted = torch.where(keep[..., None], whole, 0)
        y = part(x, keep=keep)
        close(y, wanted, "kept tokens")
        assert not y[~keep].any(), "tokens that are not kept"
        for pieces in ([length], [7, length - 7], [1] * length) if decodes else ():
            state = part.init_state(3)
            with torch.no_grad():
                close(fed(part, x, pieces, state, keep=keep), wanted, f"kept tokens in pieces {pieces}")
                close(fed(part, more, [1, 2], state), after, f"outputs after pieces {pieces}")
    padding = torch.ones_like(some)
    padding[:, :6] = False
    masked = part(x, mask=padding)
    keep = some & padding
    close(part(x, mask=padding, keep=keep), torch.where(keep[..., None], masked, 0), "kept tokens beside padding")
    few = torch.zeros_like(some)
    few[:, ::5] = True
    with count_flops() as every, torch.no_grad():
        part(x)
    with count_flops() as kept, torch.no_grad():
        part(x, keep=few)
    assert kept.total < every.total, "keeping a fifth costs as much as keeping all"


# -- gates


def check_routing(case: Case) -> None:
    """A valid sparse matrix, in float32 whatever autocast says; padding is routed nowhere."""
    x = case.x()
    mask = case.mask(x)
    for train in (True, False):
        part = case.new(train=train)
        for settings in ({}, {"mask": mask}):
            routing = part(x, **conditions(part, x), **settings)
            weights, experts = routing.weights, routing.experts
            assert routing.n_experts == EXPERTS
            assert weights.shape == experts.shape == (len(x), weights.shape[1])
            assert not experts.dtype.is_floating_point
            assert ((experts >= 0) & (experts < EXPERTS)).all(), "an expert that does not exist"
            used = weights != 0
            assert used[mask].any(), "nobody is routed"
            twice = (torch.nn.functional.one_hot(experts, EXPERTS) * used[..., None]).sum(1) > 1
            assert not twice.any(), "a token names one expert twice"
            if "mask" in settings:
                assert not weights[~mask].any(), "padding is routed"
            dense = routing.dense()
            same(Routing.from_dense(dense).dense(), dense, "dense and back")
            same(routing.counts(), (dense != 0).sum(0), "counts")
            for name in ("logits", "probs"):
                values = getattr(routing, name)
                assert values is None or values.shape == (len(x), EXPERTS), name
            if routing.probs is not None:
                close(routing.probs.sum(1), torch.ones(len(x), dtype=torch.float64), "sums of probabilities", rtol=0, atol=1e-6)
        said = call(part.eval(), x)
        order = torch.randperm(len(x))
        close(call(part, x[order]), said[order], "tokens in another order")
    part = case.new(torch.float32)
    plain = part(x.float(), **conditions(part, x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        cast = part(x.float(), **conditions(part, x.float()))
    assert cast.weights.dtype == torch.float32, f"routing in {cast.weights.dtype} under autocast"
    same(cast.dense(), plain.dense(), "routing under autocast")
    finite(call(part, 1e4 * x.float()), "routing of extreme tokens")


# -- compilation


def check_compilation(case: Case, backend: str = "inductor") -> None:
    """``torch.compile(fullgraph=True)``: outputs and gradients of eager, and no second compilation for the same shape."""
    torch._dynamo.reset()
    probe = case.new(torch.float32, train=True)
    call(probe, case.x(dtype=torch.float32))
    for train in (True, False) if losses(probe) else (True,):  # Without losses the two modes are one graph.
        plain, compiled = case.new(torch.float32, train=train), case.new(torch.float32, train=train)
        # In evaluation the graph is the question: one code generation per part is slow enough.
        run = torch.compile(compiled, fullgraph=True, dynamic=False, backend=backend if train else "aot_eager")
        for seed in (1, 2, 3):
            results = []
            # Eager random numbers, so that noise is the same on both sides.
            with torch._dynamo.config.patch(error_on_recompile=seed > 1), torch._inductor.config.patch(fallback_random=True):
                for part, forward in ((plain, plain), (compiled, run)):
                    x = case.x(dtype=torch.float32, seed=seed).requires_grad_()
                    torch.manual_seed(seed)
                    y = call(forward, x)
                    part.zero_grad()
                    said, seen = losses(part), metrics(part)
                    (objective(y) + sum(said.values())).backward()
                    advance(part, seed, 3)
                    results.append({"y": y, "x": x.grad} | said | seen | gradients(part))
            eager, fast = ({name: value for name, value in result.items() if value is not None} for result in results)
            assert eager.keys() == fast.keys(), f"compiled: {sorted(fast)}, eager: {sorted(eager)}"
            for name, value in eager.items():
                scale = float(value.detach().abs().max())
                close(fast[name], value, f"compiled {name}", rtol=0, atol=1e-5 * scale)


#: What every module keeps, for tests of settings that the contract tests do not reach.
MODULE_CHECKS = [
    check_shapes_and_dtypes, check_gradients, check_state_dict, check_copies, check_bfloat16, check_determinism,
    check_expanded_gradients, check_checkpointing, check_side_outputs, check_mask,
]
