"""The plain stack is its blocks in a loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.core import losses
from gatework.core.contracts import DepthState
from gatework.core.cost import count_flops
from gatework.depth import GateSkip, Stack
from gatework.depth.base import Block
from gatework.experts import MoE
from gatework.feedforward import GLU, VersatileFFN
from gatework.mixers import Attention, GatedLinearAttention

D = 16


def blocks() -> list[Block]:
    """A pattern of mixers and feed-forwards: one with losses, one that owns its residual."""
    torch.manual_seed(0)
    parts = [
        (Attention(D, heads=2, window=4), MoE(D, d_ff=8, experts=4)),
        (GatedLinearAttention(D, heads=2), GLU(D, 24)),
        (Attention(D, heads=4, kv_heads=2), VersatileFFN(D, 32, experts=4)),
    ]
    made = [Block(mixer, feedforward, D).double() for mixer, feedforward in parts]
    for block in made:
        for p in block.parameters():
            nn.init.normal_(p, std=0.3)
    return made


def inputs(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def loop(layers, x, **given):
    for block in layers:
        x = x + block.mixer(rms_norm(x, block.mixer_norm.weight), **given)
        mask = given.get("mask")
        if block.feedforward.owns_residual:
            x = block.feedforward(x, mask=mask)
        else:
            x = x + block.feedforward(rms_norm(x, block.feedforward_norm.weight), mask=mask)
    return x


MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9], dtype=torch.bool)
SEGMENTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])


@pytest.mark.parametrize("given", [{}, {"mask": MASK}, {"segments": SEGMENTS}], ids=lambda given: "".join(given) or "plain")
def test_equals_the_blocks_in_a_loop_with_all_gradients(given):
    layers, x = blocks(), inputs().requires_grad_()
    stack = Stack(layers).eval()
    got, expected = stack(x, **given), loop(layers, x, **given)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    leaves = [x, *stack.parameters()]
    mine = torch.autograd.grad(got.square().sum(), leaves, materialize_grads=True)
    theirs = torch.autograd.grad(expected.square().sum(), leaves, materialize_grads=True)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_branches_add_up_to_the_block():
    x = inputs()
    for block in blocks():
        block.eval()
        after = x + block.mix(x)
        torch.testing.assert_close(after + block.transform(after), block(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5]])
def test_pieces_equal_whole(pieces):
    stack, x = Stack(blocks()).eval(), inputs()
    state = stack.init_state(2)
    with torch.no_grad():
        got = torch.cat([stack(piece, state=state) for piece in x.split(pieces, 1)], 1)
        torch.testing.assert_close(got, stack(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * stack.state_bytes(9) == 2 * sum(mixer.state_bytes(9) for mixer in stack.mixers)


def test_reordering_the_state_reorders_every_layer():
    stack, x = Stack(blocks()).eval(), inputs()
    state, order = stack.init_state(2), torch.tensor([1, 0, 1])
    with torch.no_grad():
        stack(x[:, :5], state=state)
        state.reorder(order)
        torch.testing.assert_close(stack(x[order, 5:], state=state), stack(x)[order, 5:], rtol=0, atol=1e-11)


def test_the_blocks_losses_are_handed_out_once_by_path():
    torch.manual_seed(0)
    stack = Stack(blocks())
    stack(inputs())
    found = losses(stack)
    assert found
    assert {path.split(".")[1] for path in found} == {"0", "2"}
    assert losses(stack) == {}


def test_costs_what_its_blocks_cost():
    layers, x = blocks(), inputs()
    stack = Stack(layers).eval()
    with torch.no_grad(), count_flops() as together:
        stack(x)
    with torch.no_grad(), count_flops() as apart:
        loop(layers, x)
    assert together.total == apart.total > 0


def test_keeps_a_module_list_as_it_is():
    made = nn.ModuleList(blocks())
    stack = Stack(made)
    assert stack.blocks is made
    assert list(stack.state_dict()) == [f"blocks.{name}" for name in made.state_dict()]


@pytest.mark.parametrize("policy", [Stack, lambda blocks: GateSkip(blocks, D).double()], ids=["stack", "gateskip"])
def test_what_is_refused(policy):
    with pytest.raises(ValueError, match="needs at least one block"):
        policy([])
    made = policy(blocks())
    with pytest.raises(ValueError, match="continues from its own init_state, not from a KVCache"):
        made(inputs(), state=made.init_state(2).layers[0])
    with pytest.raises(ValueError, match="the state has 2 layers, but there are 3 blocks"):
        made(inputs(), state=DepthState(made.init_state(2).layers[:2]))
