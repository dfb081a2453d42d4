"""The contract checks can fail: toys that keep every contract pass them all, and toys that break one are found out."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gatework.core import Activation, FeedForward, Gate, Routing, SequenceMixer, State, in_backward
from gatework.depth import Stack
from gatework.learners import Backprop
from gatework.mixers.base import check_call
from gatework.optim import Cosine
from gatework.optim.base import Optimizer, check_numbers

from . import checks, training
from .parts import WIDTH, Case

# -- the good ones


class Good(FeedForward):
    """A linear map with a running count and a loss.

    Args:
        d_model: width.
        scale: factor.
    """

    def __init__(self, d_model: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(d_model, d_model)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("progress", torch.zeros(()))

    def extra_repr(self):
        return f"scale={self.scale}"

    def advance(self, step, total_steps):
        self.progress.fill_(step / total_steps)

    def real(self, x, mask):
        return x if mask is None else x[mask]

    def forward(self, x, mask=None):
        y = self.linear(x).tanh() * (self.scale + self.progress.to(x.dtype))
        real = self.real(y, mask)
        loss = real.square().sum() / max(real.numel(), 1)
        if not in_backward():
            self.losses = {"size": loss} if self.training else {}
            self.metrics = {"mean": real.detach().sum() / max(real.numel(), 1)}
            self.count(real)
        return y

    def count(self, real):
        self.seen += real.numel() / WIDTH


class GoodGate(Gate):
    """The two largest of linear scores."""

    def __init__(self, d_model: int, n_experts: int) -> None:
        super().__init__()
        self.n_experts = n_experts
        self.weight = nn.Parameter(torch.randn(n_experts, d_model))

    def scores(self, x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            return (x.to(dtype) @ self.weight.to(dtype).T).softmax(-1)

    def forward(self, x, mask=None):
        probs = self.scores(x)
        weights, experts = probs.topk(2, dim=-1)
        if mask is not None:
            weights = weights * mask[:, None]
        return Routing(weights, experts, self.n_experts, None, probs)


@dataclass
class SumState(State):
    total: Tensor


class GoodMixer(SequenceMixer):
    """The sum of all values so far, times the query; forgets nothing."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.query = nn.Linear(d_model, d_model)
        self.value = nn.Linear(d_model, d_model)

    def check(self, x, state, mask, segments, keep):
        check_call(self, WIDTH, x, state, SumState, mask, segments, keep)

    def weights(self, x, segments):
        """(B, T, T): who is added up for whom."""
        length = x.shape[1]
        w = torch.ones(length, length, dtype=x.dtype).tril().expand(len(x), -1, -1)
        return w if segments is None else w * (segments[:, :, None] == segments[:, None, :])

    def forward(self, x, state=None, mask=None, segments=None, keep=None):
        self.check(x, state, mask, segments, keep)
        v = self.value(x)
        if mask is not None:
            v = v * mask[..., None]
        total = self.weights(x, segments) @ v
        if state is not None:
            total = total + state.total[:, None]
            state.total = state.total + v.sum(1)
        if keep is None:
            return self.query(x) * total
        y = torch.zeros_like(x)
        y[keep] = self.query(x[keep]) * total[keep]
        return y

    def init_state(self, batch_size, *, dtype=None, device=None):
        return SumState(torch.zeros(batch_size, WIDTH, dtype=dtype or self.query.weight.dtype))

    def state_bytes(self, length):
        return WIDTH * self.query.weight.element_size()


MODULE_CHECKS = [*checks.MODULE_CHECKS, checks.check_batch_invariance, checks.check_repr]
MIXER_CHECKS = [
    checks.check_causality, checks.check_decoding, checks.check_reordering, checks.check_state_bytes, checks.check_padding,
    checks.check_packing, checks.check_keep, checks.check_wrong_calls,
]


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("cls", [Good, GoodGate, GoodMixer], ids=lambda cls: cls.__name__)
def test_good_toys_pass_what_all_modules_keep(check, cls):
    check(Case(cls))


@pytest.mark.parametrize("check", MIXER_CHECKS, ids=lambda check: check.__name__)
def test_a_good_mixer_passes(check):
    check(Case(GoodMixer))


def test_a_good_gate_and_a_good_docstring_pass():
    checks.check_routing(Case(GoodGate))
    checks.check_docstring(Case(Good))


# -- one broken contract each


class Float32(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask).float()


class Unused(Good):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        self.extra = nn.Parameter(torch.zeros(3))


class Blocked(Good):
    def forward(self, x, mask=None):
        return super().forward(x.detach(), mask) + 0 * x


class OutsideOfTheState(Good):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        del self.progress
        self.progress = torch.zeros(())


class CarriesItsGraph(Good):
    def __getstate__(self):
        return dict(self.__dict__)


class SharesItsMemory(Good):
    def __deepcopy__(self, memo):
        other = type(self)(WIDTH).double().train(self.training)
        for name, p in self.named_parameters():
            other.get_parameter(name).data = p.data
        for name, value in self.named_buffers():
            other.get_buffer(name).data = value.data
        return other


class OverflowsInBfloat16(Good):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        low = torch.bfloat16 in (y.dtype, self.linear(x).dtype)
        return y / 0 if low else y


class StartsAnywhere(Good):
    def __init__(self, d_model: int) -> None:
        super().__init__(d_model)
        nn.init.constant_(self.linear.bias, random.random())


class GoesAnywhere(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask) * random.random()


class _Dense(torch.autograd.Function):
    """The identity, with a gradient that is right for dense incoming gradients only."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad if grad.is_contiguous() else 2 * grad


class WantsDenseGradients(Good):
    def forward(self, x, mask=None):
        return _Dense.apply(super().forward(x, mask))


class CountsTwice(Good):
    def forward(self, x, mask=None):
        if in_backward():
            self.count(x)
        return super().forward(x, mask)


class TellsTwice(Good):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        self.losses = {"size": y.square().mean()} if self.training else {}
        return y


class LossInEvaluation(Good):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        self.losses = {"size": y.square().mean()}
        return y


class StaleLoss(Good):
    def forward(self, x, mask=None):
        before = self.losses
        y = super().forward(x, mask)
        if not self.training:
            self.losses = before
        return y


class MetricWithGraph(Good):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        self.metrics = {"mean": y.mean()}
        return y


class CountsPadding(Good):
    def real(self, x, mask):
        return x


class MixesRows(Good):
    def forward(self, x, mask=None):
        return super().forward(x - x.mean(0, keepdim=True), mask)


class Silent(Good):
    def extra_repr(self):
        return ""


class ReadsUnwritten(Good):
    def forward(self, x, mask=None):
        return super().forward(x, mask) + 0 * torch.empty_like(x)


class Undocumented(Good):
    """A linear map.

    Args:
        d_model: width.
    """


class Misdocumented(Good):
    """A linear map.

    Args:
        d_model: width.
        scale: factor.
        shift: there is no such thing.
    """


class LongWinded(Good):
    """A linear map whose summary goes on for longer than the one line that a listing has for it.

    Args:
        d_model: width.
        scale: factor.
    """


class Broken16(GoodGate):
    def scores(self, x):
        return (x @ self.weight.T).softmax(-1)


class RoutesPadding(GoodGate):
    def forward(self, x, mask=None):
        return super().forward(x)


class NamesTwice(GoodGate):
    def forward(self, x, mask=None):
        r = super().forward(x, mask)
        return Routing(r.weights, r.experts[:, :1].expand(-1, 2), r.n_experts, None, r.probs)


class NamesNobody(GoodGate):
    def forward(self, x, mask=None):
        r = super().forward(x, mask)
        return Routing(r.weights, r.experts + 2, r.n_experts, None, r.probs)


class CountsPlaces(GoodGate):
    def forward(self, x, mask=None):
        r = super().forward(x, mask)
        return Routing(r.weights * torch.linspace(0.5, 1, len(x), dtype=x.dtype)[:, None], r.experts, r.n_experts, None, r.probs)


class SeesLater(GoodMixer):
    def weights(self, x, segments):
        return torch.ones_like(super().weights(x, segments))


class LearnsFromLater(GoodMixer):
    def forward(self, x, **settings):
        later = x.sum(1, keepdim=True)
        return super().forward(x, **settings) + later - later.detach()


class ForgetsPieces(GoodMixer):
    def forward(self, x, state=None, **settings):
        y = super().forward(x, state=state, **settings)
        if state is not None:
            state.total = self.value(x)[:, -1] if x.shape[1] else state.total
        return y


@dataclass
class HiddenState(SumState):
    def reorder(self, index):
        self.total = self.total[:1].expand(len(index), -1)


class ForgetsToReorder(GoodMixer):
    def init_state(self, batch_size, **settings):
        return HiddenState(super().init_state(batch_size, **settings).total)


class HidesBytes(GoodMixer):
    def state_bytes(self, length):
        return length


class AddsPadding(GoodMixer):
    def forward(self, x, mask=None, **settings):
        return super().forward(x, **settings)


class AddsPaddingToItsState(GoodMixer):
    def forward(self, x, state=None, mask=None, **settings):
        y = super().forward(x, state=state, mask=mask, **settings)
        if state is not None and mask is not None:
            state.total = state.total + (self.value(x) * ~mask[..., None]).sum(1)
        return y


class MixesDocuments(GoodMixer):
    def weights(self, x, segments):
        return super().weights(x, None)


class TakesAnyMask(GoodMixer):
    def check(self, x, state, mask, segments, keep):
        check_call(self, WIDTH, x, state, SumState, None, segments, keep)


class TakesAnyState(GoodMixer):
    def check(self, x, state, mask, segments, keep):
        check_call(self, WIDTH, x, None, None, mask, segments, keep)


class KeepsAll(GoodMixer):
    def forward(self, x, keep=None, **settings):
        return super().forward(x, **settings)


class KeepsInVain(GoodMixer):
    def forward(self, x, keep=None, **settings):
        y = super().forward(x, **settings)
        return y if keep is None else torch.where(keep[..., None], y, 0)


class KeepsNoneInItsState(GoodMixer):
    def forward(self, x, state=None, keep=None, **settings):
        before = None if state is None else state.total
        y = super().forward(x, state=state, keep=keep, **settings)
        if state is not None and keep is not None:
            state.total = before + (self.value(x) * keep[..., None]).sum(1)
        return y


class ForgetsItsState(Stack):
    def forward(self, x, state=None, mask=None, segments=None):
        return super().forward(x, None, mask, segments)


class DropsTheMask(Stack):
    def forward(self, x, state=None, mask=None, segments=None):
        return super().forward(x, state, None, segments)


class DropsTheSegments(Stack):
    def forward(self, x, state=None, mask=None, segments=None):
        return super().forward(x, state, mask)


class SkipsByTheBatch(Stack):
    def forward(self, x, state=None, mask=None, segments=None):
        y = super().forward(x, state, mask, segments)
        size = x.square().mean(-1, keepdim=True)
        return torch.where(size > size.mean(), y, x)


class Step(Activation):
    def forward(self, x):
        return (x > 0).to(x.dtype) + x.detach()


@pytest.mark.parametrize(
    ("cls", "check", "why"),
    [
        (Float32, checks.check_shapes_and_dtypes, "float32 for torch.float64"),
        (ReadsUnwritten, checks.check_shapes_and_dtypes, "output of .* is not finite"),
        (Unused, checks.check_gradients, "extra is None"),
        (Blocked, checks.check_gradients, "no gradient reaches the input"),
        (Step, checks.check_gradients, "the output has no graph"),
        (OutsideOfTheState, checks.check_state_dict, "output after loading"),
        (CarriesItsGraph, checks.check_copies, "deepcopy"),
        (SharesItsMemory, checks.check_copies, "after the copy's was zeroed"),
        (OverflowsInBfloat16, checks.check_bfloat16, "bfloat16 output.* not finite"),
        (StartsAnywhere, checks.check_determinism, "two constructions"),
        (GoesAnywhere, checks.check_determinism, "two equal runs"),
        (WantsDenseGradients, checks.check_expanded_gradients, "gradient of stride 0"),
        (CountsTwice, checks.check_checkpointing, "with activation checkpointing.*seen"),
        (TellsTwice, checks.check_checkpointing, "losses a second time"),
        (LossInEvaluation, checks.check_side_outputs, "in evaluation"),
        (StaleLoss, checks.check_side_outputs, "after one in evaluation"),
        (MetricWithGraph, checks.check_side_outputs, "mean holds a graph"),
        (CountsPadding, checks.check_mask, "with other padding"),
        (MixesRows, checks.check_batch_invariance, "rows alone"),
        (Silent, checks.check_repr, "repr does not show .'scale=0.5'"),
        (Undocumented, checks.check_docstring, "does not name .'scale'"),
        (Misdocumented, checks.check_docstring, "'shift'.*no argument"),
        (LongWinded, checks.check_docstring, "summary has 90"),
        (Broken16, checks.check_routing, "bfloat16 under autocast"),
        (RoutesPadding, checks.check_routing, "padding is routed"),
        (NamesTwice, checks.check_routing, "one expert twice"),
        (NamesNobody, checks.check_routing, "out of bounds"),
        (CountsPlaces, checks.check_routing, "in another order"),
        (SeesLater, checks.check_causality, "outputs before 1"),
        (LearnsFromLater, checks.check_causality, "gradient from before 1"),
        (SeesLater, checks.check_decoding, "pieces"),
        (ForgetsPieces, checks.check_decoding, "pieces"),
        (ForgetsToReorder, checks.check_reordering, "outputs after reordering"),
        (HidesBytes, checks.check_state_bytes, "bytes after 1"),
        (AddsPadding, checks.check_padding, "padded rows"),
        (AddsPaddingToItsState, checks.check_padding, "what row 0 decodes"),
        (MixesDocuments, checks.check_packing, "packed documents"),
        (TakesAnyMask, checks.check_wrong_calls, "mask has one bool"),
        (TakesAnyState, checks.check_wrong_calls, "own init_state"),
        (KeepsAll, checks.check_keep, "kept tokens"),
        (KeepsInVain, checks.check_keep, "costs as much"),
        (KeepsNoneInItsState, checks.check_keep, "outputs after pieces"),
        (ForgetsItsState, checks.check_decoding, "pieces"),
        (DropsTheMask, checks.check_padding, "padded rows"),
        (DropsTheSegments, checks.check_packing, "packed documents"),
        (SkipsByTheBatch, checks.check_decoding, "pieces"),
        (SkipsByTheBatch, checks.check_batch_invariance, "rows alone"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.__name__,
)
def test_a_broken_part_is_found_out(cls, check, why):
    with pytest.raises((AssertionError, RuntimeError), match=f"(?s){why}"):
        check(Case(cls))


# -- optimizers, schedules, learners


class Momentum(Optimizer):
    """SGD with momentum."""

    def __init__(self, params, lr=0.1, momentum=0.9, foreach=True):
        super().__init__(params, {"lr": lr, "momentum": momentum, "foreach": foreach})

    def check(self, group):
        check_numbers(group, lr=(0.0, float("inf")))

    def init_state(self, p, group):
        return {"average": torch.zeros_like(p)}

    def update(self, params, grads, state, step, group):
        torch._foreach_mul_(state["average"], group["momentum"])
        torch._foreach_add_(state["average"], grads)
        torch._foreach_add_(params, state["average"], alpha=-group["lr"])


OPTIMIZER_CHECKS = [
    training.check_foreach, training.check_resuming, training.check_missing_gradients, training.check_groups,
    training.check_closure, training.check_refusals, training.check_complex, training.check_descent,
    training.check_optimizer_copies,
]


@pytest.mark.parametrize("check", OPTIMIZER_CHECKS, ids=lambda check: check.__name__)
def test_a_good_optimizer_passes(check):
    check(Momentum)


class NormOverAll(Momentum):
    def update(self, params, grads, state, step, group):
        norm = sum(g.norm() for g in grads)
        super().update(params, [g / norm for g in grads], state, step, group)


class RemembersOutside(Momentum):
    def step(self, closure=None):
        self.taken = getattr(self, "taken", 0) + 1
        for group in self.param_groups:
            group["momentum"] = min(0.9, 0.1 * self.taken)
        return super().step(closure)

    def update(self, params, grads, state, step, group):
        super().update(params, [g * self.taken for g in grads], state, step, group)


class MovesAll(Momentum):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                p.data.mul_(0.99)
        return super().step(closure)


class OneRate(Momentum):
    def update(self, params, grads, state, step, group):
        super().update(params, grads, state, step, group | {"lr": self.defaults["lr"]})


class NoClosure(Momentum):
    def step(self, closure=None):
        super().step(closure)


class AnyRate(Momentum):
    def check(self, group):
        pass


class MovesBeforeItRefuses(Momentum):
    def step(self, closure=None):
        self.param_groups[0]["params"][0].data.mul_(0.5)
        return super().step(closure)


class AbsoluteValue(Momentum):
    def _move(self, params, step, group):
        for p in params:
            p.data.sub_(group["lr"] * p.grad.abs() ** 2 * p.grad.sgn())


class Ascends(Momentum):
    def update(self, params, grads, state, step, group):
        super().update(params, [-g for g in grads], state, step, group)


class SpoilsTheGradient(Momentum):
    def update(self, params, grads, state, step, group):
        super().update(params, grads, state, step, group)
        torch._foreach_zero_(grads)


class Alone(Momentum):
    def __deepcopy__(self, memo):
        return type(self)([p for group in self.param_groups for p in group["params"]], lr=0.05)


class Rises(Cosine):
    def get_lr(self):
        return [base * (0.5 - self.last_epoch / 20) for base in self.base_lrs]


class IgnoresGroups(Cosine):
    def get_lr(self):
        return [super(IgnoresGroups, self).get_lr()[0] for _ in self.base_lrs]


class Wanders(Cosine):
    wandered = 0

    def get_lr(self):
        type(self).wandered += 1
        return [base * (1 + type(self).wandered % 5) for base in self.base_lrs]


class AddsUp(Backprop):
    def estimate(self, batch):
        x, y = batch
        loss = self.loss_fn(self.model(x), y)
        loss.backward()
        return {"loss": loss.detach()}


class HandsOutItsGraph(Backprop):
    def estimate(self, batch):
        self.model.zero_grad()
        loss = self.loss_fn(self.model(batch[0]), batch[1])
        loss.backward()
        return {"loss": loss}


class Frozen(Backprop):
    def step(self, batch):
        return self.estimate(batch)


class StaysInEvaluation(Backprop):
    def predict(self, x):
        self.model.eval()
        return super().predict(x)


class KeepsTheModelAlone(Backprop):
    def state_dict(self):
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])


@pytest.mark.parametrize(
    ("cls", "check", "why"),
    [
        (NormOverAll, training.check_foreach, "the plain loop"),
        (RemembersOutside, training.check_resuming, "resumed in"),
        (MovesAll, training.check_missing_gradients, "without gradients"),
        (OneRate, training.check_groups, "groups"),
        (NoClosure, training.check_closure, "loss is lost"),
        (AnyRate, training.check_refusals, "DID NOT RAISE"),
        (MovesBeforeItRefuses, training.check_refusals, "has moved another"),
        (AbsoluteValue, training.check_complex, "complex"),
        (Ascends, training.check_descent, "is left"),
        (SpoilsTheGradient, training.check_descent, "gradient after the step"),
        (Alone, training.check_optimizer_copies, "a copied optimizer"),
        (Rises, training.check_rates, "rates"),
        (IgnoresGroups, training.check_rates, "at a tenth"),
        (Wanders, training.check_schedule_resuming, "resumed after 0"),
        (AddsUp, training.check_estimate, "estimating twice"),
        (HandsOutItsGraph, training.check_estimate, "loss with its graph"),
        (Frozen, training.check_learning, "has not moved"),
        (StaysInEvaluation, training.check_prediction, "modes have changed"),
        (KeepsTheModelAlone, training.check_learner_resuming, "losses of step"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.__name__,
)
def test_a_broken_trainer_is_found_out(cls, check, why):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=why):
        check(cls)


# -- compilation


class BreaksTheGraph(Good):
    def forward(self, x, mask=None):
        return super().forward(x * (2.0 if x.sum().item() > 0 else 1.0), mask)


class CompilesAgain(Good):
    calls = 0

    def forward(self, x, mask=None):
        self.calls += 1
        return super().forward(x, mask) * self.calls


class OtherWhenCompiled(Good):
    def forward(self, x, mask=None):
        y = super().forward(x, mask)
        return y + 1e-3 if torch.compiler.is_compiling() else y


@pytest.mark.compile
@pytest.mark.parametrize(
    ("cls", "why"), [(BreaksTheGraph, "data-dependent"), (CompilesAgain, "recompiling"), (OtherWhenCompiled, "compiled y")]
)
def test_a_part_that_does_not_compile_is_found_out(cls, why):
    with pytest.raises((AssertionError, RuntimeError), match=f"(?is){why}"):
        checks.check_compilation(Case(cls), backend="aot_eager")


@pytest.mark.compile
def test_a_good_toy_compiles():
    checks.check_compilation(Case(Good), backend="aot_eager")
