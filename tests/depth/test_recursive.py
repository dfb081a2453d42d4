"""Recursive against the formulas of its page: sources, SVD updates, sharing; and what makes it a good citizen of a model."""

from __future__ import annotations

import copy
import io
import pickle
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatework.core import advance, losses, metrics
from gatework.core.cost import active_parameters, count_flops, count_parameters
from gatework.core.errors import PartError
from gatework.depth import Recursive, Stack
from gatework.depth.base import Block
from gatework.depth.recursive import LoRALinear, share, sources, svd_lora_init
from gatework.experts import MoE
from gatework.feedforward import GLU, VersatileFFN
from gatework.mixers import Attention, GatedLinearAttention
from gatework.models import Decoder

D = 16
INITS = ("stepwise", "average", "lower", "upper", "random")


def trained(count: int, feedforward=lambda: GLU(D, 24), mixer=lambda: Attention(D, heads=2)) -> list[Block]:
    """Blocks whose every parameter, norm gains too, is its own."""
    torch.manual_seed(0)
    blocks = [Block(mixer(), feedforward(), D).double() for _ in range(count)]
    with torch.no_grad():
        for block in blocks:
            for p in block.parameters():
                p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    return blocks


def inputs(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


# -- what the unique layers start from


def test_sources_by_hand():
    assert sources(6, 2, "stepwise") == [[0], [2], [5]]  # 2.5 rounds to the even 2
    assert sources(8, 2, "stepwise") == [[0], [2], [5], [7]]
    assert sources(10, 5, "stepwise") == [[0], [9]]
    assert sources(4, 4, "stepwise") == [[0]]
    assert sources(6, 2, "average") == [[0, 3], [1, 4], [2, 5]]
    assert sources(6, 3, "average") == [[0, 2, 4], [1, 3, 5]]
    assert sources(6, 2, "lower") == [[0], [1], [2]]
    assert sources(6, 2, "upper") == [[3], [4], [5]]


@pytest.mark.parametrize("loops", [1, 2, 3, 5])
def test_stepwise_is_evenly_spaced_and_rounds_half_to_even(loops):
    for layers in range(loops, 61, loops):
        unique = layers // loops
        exact = [Fraction(j * (layers - 1), max(unique - 1, 1)) for j in range(unique)]
        expected = [[round(place)] for place in exact]
        if (layers, loops) == (30, 2):  # numpy's eighth place is 14.500000000000002.
            assert expected[7] == [14]
            expected[7] = [15]
        assert sources(layers, loops, "stepwise") == expected


def test_random_sources_are_drawn_without_replacement_in_order():
    drawn = set()
    for seed in range(40):
        torch.manual_seed(seed)
        (a,), (b,) = sources(4, 2, "random")
        assert 0 <= a < b < 4
        drawn.add((a, b))
    assert len(drawn) == 6


@pytest.mark.parametrize("init", INITS)
def test_one_loop_is_the_plain_stack(init):
    assert sources(7, 1, init) == [[j] for j in range(7)]
    blocks = trained(3)
    policy = Recursive(blocks, loops=1, init=init).eval()
    assert list(policy.blocks) == blocks
    assert torch.equal(policy(inputs()), Stack(blocks).eval()(inputs()))


# -- the updates


def test_svd_gives_the_best_approximation():
    torch.manual_seed(0)
    for shape in ((7, 5), (5, 7), (6, 6)):
        delta = torch.randn(shape, dtype=torch.float64)
        s = torch.linalg.svdvals(delta)
        for rank in (1, 3, 5, 9):
            a, b = svd_lora_init(delta, rank)
            kept = min(rank, *shape)
            assert a.shape == (kept, shape[1])
            assert b.shape == (shape[0], kept)
            error = (delta - b @ a).square().sum()
            torch.testing.assert_close(error, s[kept:].square().sum(), rtol=1e-11, atol=1e-24)
            # All of S is in B, none in A.
            torch.testing.assert_close(a @ a.T, torch.eye(kept, dtype=torch.float64), rtol=0, atol=1e-12)
            torch.testing.assert_close(b.T @ b, torch.diag(s[:kept].square()), rtol=0, atol=1e-12)


def test_svd_of_half_precision_is_computed_in_single():
    delta = torch.randn(12, 8).bfloat16()
    a, b = svd_lora_init(delta, 8)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(b.float() @ a.float(), delta.float(), rtol=0, atol=0.05)


@pytest.mark.parametrize("tokens", [3, 400])  # beside the linear, and summed into it
@pytest.mark.parametrize("bias", [False, True])
def test_lora_linear_equals_its_equation_with_all_gradients(tokens, bias):
    torch.manual_seed(0)
    linear = nn.Linear(12, 20, bias=bias).double()
    a, b = torch.randn(3, 12, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    layer = LoRALinear(linear, a.clone(), b.clone())
    x = torch.randn(tokens, 12, dtype=torch.float64, requires_grad=True)
    with count_flops() as count:
        y = layer(x)
    assert count.total == 2 * tokens * 12 * 20 + min(2 * tokens * 3 * (12 + 20), 2 * 3 * 12 * 20)
    given = [x, linear.weight, layer.lora.a, layer.lora.b, *([linear.bias] if bias else [])]
    leaves = [value.detach().clone().requires_grad_() for value in given]
    expected = leaves[0] @ leaves[1].T + leaves[0] @ leaves[2].T @ leaves[3].T + (leaves[4] if bias else 0)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-11)
    mine = torch.autograd.grad(y.square().sum(), given)
    theirs = torch.autograd.grad(expected.square().sum(), leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(F.linear(x, layer.weight, layer.bias), y, rtol=0, atol=1e-11)


def test_a_frozen_weight_costs_no_gradient_of_its_size():
    layer = LoRALinear(nn.Linear(64, 64, bias=False).requires_grad_(False), torch.randn(2, 64), torch.randn(64, 2))
    with count_flops() as count:
        layer(torch.randn(500, 64)).sum().backward()
    assert count.total < 2 * 500 * 64 * 64 * 1.3


def test_half_precision_keeps_updates_that_the_sum_would_round_away():
    linear = nn.Linear(8, 8, bias=False).bfloat16()
    nn.init.constant_(linear.weight, 4.0)
    layer = LoRALinear(linear, torch.ones(1, 8).bfloat16(), torch.full((8, 1), 1e-3).bfloat16())
    assert torch.equal(layer.weight, linear.weight)  # 4.001 is no bfloat16.
    x = torch.eye(8).repeat(100, 1).bfloat16() - torch.eye(8).roll(1, 0).repeat(100, 1).bfloat16()
    x[:, 0] += 0.5
    beside = F.linear(F.linear(x, layer.lora.a), layer.lora.b)
    assert torch.equal(layer(x), linear(x) + beside)


# -- sharing


@pytest.mark.parametrize("loops", [2, 3])
@pytest.mark.parametrize("init", INITS)
def test_weights_are_the_shared_ones_plus_the_updates(init, loops):
    blocks = trained(6)
    before, unique, rank = [values(block) for block in blocks], 6 // loops, 3
    torch.manual_seed(3)
    chosen = sources(6, loops, init)
    torch.manual_seed(3)
    policy = Recursive(blocks, loops, rank, init, "svd")
    for i, block in enumerate(policy.blocks):
        j = i % unique
        for name in ("mixer_norm.weight", "feedforward_norm.weight"):
            mean = sum(before[s][name] for s in chosen[j]) / len(chosen[j])
            torch.testing.assert_close(block.get_submodule(name[:-7]).weight, mean, rtol=0, atol=1e-15)
        for path in ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj", "feedforward.up", "feedforward.down"):
            linear, name = block.get_submodule(path), f"{path}.weight"
            mean = sum(before[s][name] for s in chosen[j]) / len(chosen[j])
            torch.testing.assert_close(linear.base.weight, mean, rtol=0, atol=1e-15)
            u, s, vh = torch.linalg.svd(before[i][name] - mean)
            torch.testing.assert_close(linear.lora.b @ linear.lora.a, u[:, :rank] * s[:rank] @ vh[:rank], rtol=0, atol=1e-12)
            torch.testing.assert_close(linear.weight, mean + linear.lora.b @ linear.lora.a, rtol=0, atol=1e-12)
            if [i] == chosen[j]:
                assert not linear.lora.b.any()  # This layer's own weight is the shared one.


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("loops", [2, 3])
def test_full_rank_with_own_norms_is_the_trained_stack(init, loops):
    blocks = trained(6)
    stack = Stack(copy.deepcopy(blocks)).eval()
    expected = stack(inputs(40))
    policy = Recursive(blocks, loops, rank=D, init=init, lora="svd", share_norms=False).eval()
    torch.testing.assert_close(policy(inputs(40)), expected, rtol=0, atol=1e-10)
    shared = Recursive(blocks, loops, rank=D, init=init, lora="svd").eval()
    assert (shared(inputs(40)) - expected).abs().max() > 1e-3
    for block, other in zip(blocks, stack.blocks, strict=True):  # The blocks that were given are as they were.
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), other.parameters(), strict=True))


def test_zero_updates_are_strict_sharing():
    blocks = trained(4)
    zero = Recursive(blocks, rank=5, init="upper").eval()
    strict = Recursive(blocks, rank=0, init="upper").eval()
    looped = Stack([blocks[2], blocks[3], blocks[2], blocks[3]]).eval()
    torch.testing.assert_close(zero(inputs()), looped(inputs()), rtol=0, atol=1e-12)
    torch.testing.assert_close(strict(inputs()), looped(inputs()), rtol=0, atol=1e-12)
    assert not any(isinstance(module, LoRALinear) for module in strict.modules())
    spread = torch.cat([linear.lora.a.flatten() for linear in zero.modules() if isinstance(linear, LoRALinear)]) * D**0.5
    assert spread.abs().max() <= (D / 24) ** -0.5 * (D / D)  # at most 1 / sqrt(in), the least in being D
    assert spread.std() > 0.4


def test_shared_weights_get_the_gradient_of_all_loops():
    blocks, x = trained(4), inputs()
    policy = Recursive(blocks, init="lower", rank=0)
    policy(x).square().sum().backward()
    looped = copy.deepcopy(blocks[:2])
    Stack([*looped, *looped])(x).square().sum().backward()
    for block, other in zip(policy.blocks, looped, strict=False):
        for (name, p), q in zip(block.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("share_norms", [True, False])
def test_number_of_parameters(share_norms):
    blocks, rank = trained(6), 5
    one = count_parameters(blocks[0])
    sizes = [(D, D)] * 4 + [tuple(p.shape) for p in blocks[0].feedforward.parameters()]
    policy = Recursive(blocks, loops=3, rank=rank, share_norms=share_norms)
    expected = 2 * one + 6 * sum(rank * (o + i) for o, i in sizes) + (0 if share_norms else 4 * 2 * D)
    assert count_parameters(policy) == sum(p.numel() for p in policy.state_dict().values()) == expected
    assert active_parameters(policy) == expected
    huge = Recursive(blocks, loops=3, rank=100)
    assert {len(linear.lora.a) for linear in huge.modules() if isinstance(linear, LoRALinear)} == {D}


def test_biases_are_shared_like_norm_gains():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).double() for _ in range(2)]
    with torch.no_grad():
        for layer in layers:
            layer[1].bias.normal_()
    x = torch.randn(3, 4, dtype=torch.float64)
    own = share(layers, 2, rank=4, init="average", lora="svd", share_norms=False)
    for layer, new in zip(layers, own, strict=True):
        torch.testing.assert_close(new(x), layer(x), rtol=0, atol=1e-12)
    both = share(layers, 2, rank=4, init="average", lora="svd")
    for name in ("0.base.bias", "1.weight", "1.bias"):
        path, _, attribute = name.rpartition(".")
        first, second = (getattr(layer.get_submodule(path), attribute) for layer in both)
        assert first is second
        torch.testing.assert_close(first, (layers[0].get_parameter(name.replace("base.", ""))
                                           + layers[1].get_parameter(name.replace("base.", ""))) / 2)


def test_frozen_layers_give_frozen_weights_and_trainable_updates():
    blocks = [block.requires_grad_(False) for block in trained(2)]
    trainable = {".".join(name.split(".")[-2:]) for name, p in Recursive(blocks).named_parameters() if p.requires_grad}
    assert trainable == {"lora.a", "lora.b"}


# -- as a part of a model


def test_patterns_repeat_in_each_loop():
    blocks = trained(1) + trained(1, mixer=lambda: GatedLinearAttention(D, heads=2))
    policy = Recursive([*blocks, *copy.deepcopy(blocks)]).eval()
    x = inputs()
    state = policy.init_state(2)
    with torch.no_grad():
        pieces = torch.cat([policy(piece, state=state) for piece in x.split(1, 1)], 1)
        torch.testing.assert_close(pieces, policy(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * policy.state_bytes(9) == 2 * sum(block.mixer.state_bytes(9) for block in [*blocks, *blocks])
    with pytest.raises(PartError, match=r"0 and 2 cannot share, they differ in mixer \(Attention and GatedLinearAttention\)"):
        Recursive([blocks[0], blocks[0], blocks[1], blocks[1]])


def test_settings_of_a_layer_stay_its_own():
    blocks = trained(2)
    blocks[1].mixer.window = 2
    policy = Recursive(blocks, init="lower", rank=0).eval()
    assert [mixer.window for mixer in policy.mixers] == [None, 2]


@pytest.mark.parametrize("feedforward", [
    lambda: MoE(D, d_ff=8, experts=4, gate="noisy_topk(k=2)", activation="xsilu"), lambda: VersatileFFN(D, 32, experts=4),
], ids=["moe", "versatile_ffn"])
@pytest.mark.parametrize("share_norms", [True, False])
def test_feedforwards_with_losses_buffers_and_weights_outside_of_linears(feedforward, share_norms):
    """The virtual layers are the layers with the shared weights written into each: same outputs, losses, metrics, gradients."""
    blocks, x = trained(4, feedforward), inputs()
    policy = Recursive(blocks, rank=3, init="average", lora="svd", share_norms=share_norms)
    written = copy.deepcopy(blocks)
    with torch.no_grad():
        for block, virtual in zip(written, policy.blocks, strict=True):
            for name, p in block.named_parameters():
                path, _, attribute = name.rpartition(".")
                p.copy_(getattr(virtual.get_submodule(path), attribute))
    stack = Stack(written)
    said = []
    for model in (policy, stack):
        torch.manual_seed(5)
        y = model(x)
        found = losses(model)
        (y.square().sum() + sum(found.values())).backward()
        said.append({"y": y} | found | metrics(model))
    assert said[0].keys() == said[1].keys()
    assert {path.split(".")[1] for path in said[0] if "balance" in path or "importance" in path} == set("0123")
    for name, value in said[0].items():
        torch.testing.assert_close(value, said[1][name], rtol=1e-9, atol=1e-9, msg=name)
    name = "feedforward.w_in" if isinstance(blocks[0].feedforward, MoE) else "feedforward_norm.weight"
    if isinstance(blocks[0].feedforward, MoE):
        together = policy.blocks[1].get_parameter(name).grad
        apart = sum(written[i].get_parameter(name).grad for i in (1, 3))
        torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
        experts = 4 * 3 * 8 * D
        idle = experts // 2
        assert active_parameters(policy) == count_parameters(policy) - 2 * idle
    for model in (policy, stack):
        advance(model, 1, 2)
    for (name, one), other in zip(policy.named_buffers(), stack.buffers(), strict=True):
        assert torch.equal(one, other), name


def test_a_model_trains_decodes_and_is_stored():
    torch.manual_seed(0)
    model = Decoder(vocab_size=17, d_model=D, layers=4, heads=2, depth="recursive(loops=2, rank=2)").double()
    tokens = torch.randint(0, 17, (4, 12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert loss.item() < 1.5
    model.eval()
    made = model.generate(tokens[:, :3], 6, temperature=0.0)
    for length in range(3, 9):
        assert torch.equal(model(made[:, :length])[:, -1].argmax(-1), made[:, length])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert sum(value.numel() for name, value in state.items() if name != "head.weight") == count_parameters(model)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.manual_seed(1)
    other = Decoder(vocab_size=17, d_model=D, layers=4, heads=2, depth="recursive(loops=2, rank=2)").double().eval()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for copied in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(tokens), model(tokens))
        with torch.no_grad():
            for p in copied.parameters():
                p.zero_()
        assert not copied(tokens).any()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_replacing_a_shared_parameter_replaces_it_in_every_loop():
    made = nn.Parameter(torch.zeros(D, D, dtype=torch.float64))
    for rank, path in ((0, "o_proj"), (2, "o_proj.base")):
        policy = Recursive(trained(2), rank=rank)
        first, second = (block.mixer for block in policy.blocks)
        first.get_submodule(path).weight = made
        assert second.get_submodule(path).weight is made
        linear = nn.Linear(D, D, bias=False).double()
        first.set_submodule(path, linear)
        assert second.get_submodule(path).weight is linear.weight
        assert copy.deepcopy(policy).blocks[1].mixer.get_submodule(path).weight is not linear.weight
    empty = Recursive(trained(2)).to("meta").to_empty(device="cpu")
    empty.load_state_dict(Recursive(trained(2)).state_dict(), assign=True)
    assert torch.equal(empty.eval()(inputs()), Recursive(trained(2)).eval()(inputs()))


def test_builds_without_memory_for_its_weights():
    for lora in ("zero", "svd"):
        with torch.device("meta"):
            model = Decoder(vocab_size=17, d_model=D, layers=4, depth=f"recursive(lora={lora}, init=random)")
        assert all(p.is_meta for p in model.parameters())
        real = Decoder(vocab_size=17, d_model=D, layers=4, depth=f"recursive(lora={lora}, init=random)")
        assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}


def test_costs_what_the_stack_costs_and_the_updates():
    blocks, x = trained(4), inputs(1)
    counts = []
    for model in (Stack(blocks), Recursive(blocks, rank=0), Recursive(blocks, rank=3)):
        with torch.no_grad(), count_flops() as count:
            model.eval()(x)
        counts.append(count.total)
    sizes = [tuple(p.shape) for p in blocks[0].parameters() if p.dim() == 2]
    assert counts[0] == counts[1]
    assert counts[2] - counts[0] == 4 * sum(2 * 3 * (o + i) for o, i in sizes) * len(x)


@pytest.mark.parametrize(("settings", "message"), [
    ({"loops": 0}, "loops must be at least 1, got 0"),
    ({"loops": 2}, "the number of layers 3 is not divisible by loops 2"),
    ({"loops": 3, "rank": -1}, "rank must be at least 0, got -1"),
])
def test_what_is_refused(settings, message):
    with pytest.raises(PartError, match=message):
        Recursive(trained(3), **settings)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="needs at least one block"):
        Recursive([])
    with pytest.raises(PartError, match="the number of layers 1 is not divisible by loops 2"):
        Decoder(vocab_size=5, layers=1, depth="recursive")
    with pytest.raises(PartError, match="init must be one of 'stepwise', 'average', 'lower', 'upper', 'random', got 'middle'"):
        Decoder(vocab_size=5, depth="recursive(init=middle)")
    with pytest.raises(PartError, match=r"they differ in feedforward.gate.weight \(\(24, 16\) and \(32, 16\)\)"):
        Recursive(trained(1) + trained(1, lambda: GLU(D, 32)))
    with pytest.raises(PartError, match=r"there is no nn.Linear in the layers for a low-rank update: give rank=0"):
        share([nn.LayerNorm(4), nn.LayerNorm(4)], 2)
    assert len(share([nn.LayerNorm(4), nn.LayerNorm(4)], 2, rank=0)) == 2
