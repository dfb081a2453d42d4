"""Two streams: each against its sum of branches, together the plain stack."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

from gatework.core import losses, metrics
from gatework.depth import DualStream, Stack
from gatework.depth.base import Block
from gatework.experts import MoE
from gatework.feedforward import GLU, CrateISTA
from gatework.mixers import Attention, ChannelizedAttention, GatedLinearAttention

D = 16


def blocks() -> list[Block]:
    """Several mixers, a feed-forward with losses and one that owns its residual."""
    torch.manual_seed(0)
    parts = [
        (Attention(D, heads=2), MoE(D, d_ff=8, experts=4)),
        (GatedLinearAttention(D, heads=2), CrateISTA(D)),
        (ChannelizedAttention(D, heads=4), GLU(D, 24)),
    ]
    made = [Block(mixer, feedforward, D).double() for mixer, feedforward in parts]
    for block in made:
        for p in block.parameters():
            nn.init.normal_(p, std=0.3)
    return made


def inputs(length: int = 9) -> Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], dtype=torch.bool)
SEGMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])


@pytest.mark.parametrize("given", [{}, {"mask": MASK}, {"segments": SEGMENTS}], ids=lambda given: "".join(given) or "plain")
def test_the_sum_is_the_plain_stack_with_all_gradients(given):
    made, x = blocks(), inputs().requires_grad_()
    dual, stack = DualStream(made), Stack(made)
    results = []
    for policy in (dual, stack):
        y = policy(x, **given)
        where = given.get("mask", torch.ones(2, 9, dtype=torch.bool))
        said = losses(policy)
        total = (y[where] ** 3).sum() + sum(said.values())
        results.append([y[where], *said.values(), *torch.autograd.grad(total, [x, *stack.parameters()])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-10)


def test_dense_projections_and_two_streams_are_a_standard_transformer():
    torch.manual_seed(0)
    ours = [Block(ChannelizedAttention(D, heads=4, mixing="dense"), GLU(D, 24), D).double() for _ in range(3)]
    plain = [Block(Attention(D, heads=4), GLU(D, 24), D).double() for _ in range(3)]
    dual, stack = DualStream(ours), Stack(plain)
    for p in dual.parameters():
        nn.init.normal_(p, std=0.3)
    stack.load_state_dict(dual.state_dict())
    x = inputs().requires_grad_()
    y, wanted = dual(x), stack(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(
        torch.autograd.grad(y, [x, *dual.parameters()], upstream), torch.autograd.grad(wanted, [x, *stack.parameters()], upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_each_branch_writes_to_its_own_stream():
    made, x = blocks(), inputs()
    token, context = DualStream(made).eval().streams(x)
    stream, mixed, transformed = x, x, torch.zeros_like(x)
    for block in made:
        added = block.mix(stream)
        stream, mixed = stream + added, mixed + added
        added = block.transform(stream)
        stream, transformed = stream + added, transformed + added
    torch.testing.assert_close(token, mixed, rtol=0, atol=1e-12)
    torch.testing.assert_close(context, transformed, rtol=0, atol=1e-12)
    for block in made:
        block.transform = lambda x, mask=None: torch.zeros_like(x)
    assert not DualStream(made).eval().streams(x)[1].any()


def test_evaluation_can_leave_a_stream_out_and_training_never_does():
    made, x = blocks(), inputs()
    token, context = DualStream(made).eval().streams(x)
    for read, wanted in (("both", token + context), ("token", token), ("context", context)):
        policy = DualStream(made, read=read)
        assert torch.equal(policy.eval()(x), wanted)
        assert torch.equal(policy.train()(x), DualStream(made).train()(x))


@pytest.mark.parametrize("read", ["both", "token", "context"])
def test_pieces_equal_whole(read):
    policy, x = DualStream(blocks(), read=read).eval(), inputs()
    state = policy.init_state(2)
    with torch.no_grad():
        got = torch.cat([policy(some, state=state) for some in x.split([3, 1, 1, 4], 1)], 1)
        torch.testing.assert_close(got, policy(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * policy.state_bytes(9)


def test_checkpointing_gives_the_same_gradients():
    results = []
    for recompute in (False, True):
        policy, x = DualStream(blocks()), inputs().requires_grad_()
        policy.gradient_checkpointing = recompute
        y = policy(x)
        said, seen = losses(policy), metrics(policy)
        ((y**3).sum() + sum(said.values())).backward()
        results.append([x.grad, *(p.grad for p in policy.parameters()), *seen.values()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_the_sizes_of_the_streams_are_metrics():
    policy, x = DualStream(blocks()).eval(), inputs()
    for mask in (None, MASK):
        where = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask
        token, context = policy.streams(x, mask=mask)
        policy(x, mask=mask)
        said = metrics(policy)
        assert said["token"].item() == pytest.approx(token[where].square().mean().sqrt().item())
        assert said["context"].item() == pytest.approx(context[where].square().mean().sqrt().item())


def test_an_unknown_stream_is_refused():
    init = inspect.unwrap(DualStream.__init__)  # The annotation check of the test run comes before the class's own.
    with pytest.raises(ValueError, match="read must be both, token or context, got 'none'"):
        init(DualStream.__new__(DualStream), blocks(), read="none")
