"""What every part shares: side outputs, capabilities, schedules, decoding states, the sight of recomputation."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gatework.core import (
    CAPABILITIES,
    DepthState,
    FeedForward,
    No,
    SequenceMixer,
    State,
    advance,
    build,
    capability,
    entries,
    in_backward,
    losses,
    metrics,
)
from gatework.mixers import Attention
from gatework.models import Decoder


class Talker(FeedForward):
    """A feed-forward that leaves a loss and a metric and has a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("progress", torch.zeros(()))
        self.backwards: list[bool] = []

    def forward(self, x, mask=None):
        self.backwards.append(in_backward())
        y = (self.weight * x).tanh()
        self.losses = {"size": y.square().mean()} if self.training else {}
        self.metrics = {"mean": y.detach().mean()}
        return y

    def advance(self, step, total_steps):
        self.progress.fill_(step / total_steps)


def model() -> nn.Sequential:
    return nn.Sequential(Talker(), nn.Sequential(Talker(), nn.Tanh()))


X = torch.linspace(-1, 1, 12).view(3, 4)


def test_side_outputs_are_handed_out_once_by_path():
    net = model()
    net(X)
    taken = losses(net)
    assert list(taken) == ["0.size", "1.0.size"]
    assert losses(net) == {}
    said = metrics(net)
    assert list(said) == ["0.mean", "1.0.mean"]
    assert metrics(net) == {}
    assert all(value.requires_grad for value in taken.values())
    assert not any(value.requires_grad for value in said.values())
    sum(taken.values()).backward()
    assert net[0].weight.grad != 0
    net.eval()(X)
    assert losses(net) == {}
    assert list(metrics(net)) == ["0.mean", "1.0.mean"]


def test_a_part_that_the_next_pass_skips_offers_nothing_stale():
    net = model()
    net(X)
    losses(net)
    net[0](X)
    assert list(losses(net)) == ["0.size"]


def test_a_part_alone_and_a_shared_part_are_named_once():
    part = Talker()
    part(X)
    assert list(losses(part)) == ["size"]
    shared = nn.Sequential(part, part)
    shared(X)
    assert list(losses(shared)) == ["0.size"]


def test_foreign_attributes_called_losses_are_left_alone():
    class Foreign(nn.Module):
        losses = {"mine": 1}

        def forward(self, x):
            return x

    net = nn.Sequential(Foreign(), Talker())
    net(X)
    assert list(losses(net)) == ["1.size"]
    assert net[0].losses == {"mine": 1}


def test_copies_and_pickles_start_without_side_outputs():
    net = model()
    net(X)
    buffer = io.BytesIO()
    torch.save(net[0], buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), nn.Sequential(torch.load(buffer, weights_only=False))):
        assert losses(other) == metrics(other) == {}
        assert torch.equal(other[0].weight, net[0].weight)
        assert torch.equal(other[0](X), net[0](X))
        assert "size" in other[0].losses
    net(X)
    assert len(losses(net)) == 2  # The original keeps its own.


class Precise(Talker):
    """Keeps one of its two buffers exact."""

    exact = ("bias",)

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tensor([1 / 3, 1 + 2**-20]))


def test_exact_buffers_keep_their_precision_in_half_precision():
    net = nn.Sequential(Precise())
    part, before = net[0], net[0].bias.clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        net.to(dtype)
        assert (part.bias.dtype, part.progress.dtype, part.weight.dtype) == (torch.float32, dtype, dtype)
        assert torch.equal(part.bias, before)
    assert net.double()[0].bias.dtype == torch.float64
    net.half()
    assert part.bias.dtype == torch.float32
    assert torch.equal(part.bias, before)
    assert "bias" in dict(part.named_buffers())
    assert net.to("meta")[0].bias.is_meta
    assert net.to_empty(device="cpu").half()[0].bias.dtype == torch.float32


def test_capabilities_answer_for_classes_and_instances_with_reasons():
    assert capability(Attention, "causal") is True
    assert capability(Attention(8), "causal") is True
    answer = capability(build("moe(experts=2)", "feedforward", d_model=8), "compiles")
    assert not answer
    assert str(answer) == "no: tokens are sorted by expert, and the lengths of the segments are data"
    assert capability(Talker, "causal") == No("Talker has no such notion")
    assert not capability(nn.Linear(2, 2), "causal")
    with pytest.raises(KeyError, match="no capability 'flies'; there are causal, decodes"):
        capability(Attention, "flies")


def test_every_declared_capability_is_known_and_every_no_has_a_reason():
    for entry in entries():
        for name, answer in getattr(entry.cls, "capabilities", {}).items():
            assert name in CAPABILITIES, entry.name
            assert answer is True or (isinstance(answer, No) and len(answer.reason) > 10), entry.name


def test_advance_moves_every_schedule_and_state_dict_keeps_it():
    net = model()
    advance(net, 3, 12)
    assert net[0].progress == net[1][0].progress == 0.25
    other = model()
    other.load_state_dict(net.state_dict())
    assert other[1][0].progress == 0.25


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_told_from_the_forward_pass(reentrant):
    part, x = Talker(), X.clone().requires_grad_()
    y = checkpoint(part, x, use_reentrant=reentrant)
    assert part.backwards == [False]
    y.sum().backward()
    assert part.backwards == [False, True]
    part(x)
    assert part.backwards == [False, True, False]


def test_statistics_count_each_token_once_under_checkpointing():
    def chosen(run):
        torch.manual_seed(0)
        gate = build("topk(k=2, balance=loss_free)", "gate", d_model=4, n_experts=4)
        routing = run(gate, X.clone().requires_grad_())
        routing.sum().backward()
        return gate.balance.loss_free.counts.clone()

    plain = chosen(lambda gate, x: gate(x).weights)
    assert plain.sum() == 3 * 2
    assert torch.equal(chosen(lambda gate, x: checkpoint(lambda t: gate(t).weights, x, use_reentrant=False)), plain)


@dataclass
class Inner(State):
    memory: torch.Tensor


@dataclass
class Outer(State):
    inner: Inner
    rows: list
    extra: torch.Tensor | None = None
    length: int = 0


def outer() -> Outer:
    rows = torch.arange(3)
    return Outer(Inner(rows[:, None].double().expand(3, 2).clone()), [rows.float(), None, Inner(rows.long() + 10)], None, 7)


def test_states_reorder_all_that_is_nested_in_them():
    state = outer()
    state.reorder(torch.tensor([2, 0, 2, 1]))
    assert state.inner.memory.tolist() == [[2, 2], [0, 0], [2, 2], [1, 1]]
    assert state.rows[0].tolist() == [2, 0, 2, 1]
    assert state.rows[1] is None
    assert state.rows[2].memory.tolist() == [12, 10, 12, 11]
    assert (state.extra, state.length) == (None, 7)
    state.reorder(torch.tensor([], dtype=torch.long))
    assert state.inner.memory.shape == (0, 2)


def test_states_count_all_that_is_nested_in_them():
    state = outer()
    assert state.nbytes == 3 * 2 * 8 + 3 * 4 + 3 * 8
    state.extra = torch.zeros(5, dtype=torch.bfloat16)
    assert state.nbytes == 3 * 2 * 8 + 3 * 4 + 3 * 8 + 10
    assert DepthState([state, outer()]).nbytes == 2 * (48 + 12 + 24) + 10


@pytest.mark.parametrize("mixer", [entry.name for entry in entries("mixer") if capability(entry.cls, "decodes")])
def test_reordered_rows_decode_as_if_they_had_been_fed_in_that_order(mixer):
    torch.manual_seed(0)
    net = Decoder(11, d_model=16, layers=2, heads=2, mixer=mixer).double().eval()
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 0, 1])
    state = net.init_state(3)
    net(tokens[:, :4], state=state)
    state.reorder(order)
    rest = net(tokens[order, 4:], state=state)
    torch.testing.assert_close(rest, net(tokens[order])[:, 4:], rtol=0, atol=1e-10)


def test_a_part_without_all_of_its_contract_cannot_be_built():
    class Half(SequenceMixer):
        def forward(self, x, state=None, mask=None, segments=None, keep=None):
            return x

    with pytest.raises(TypeError, match=r"abstract class Half .* init_state.* state_bytes"):
        Half()
