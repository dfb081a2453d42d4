"""Measured cost: counted FLOPs against analytic counts, saved and live bytes of known computations, parameters, `profile`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import gatework
from gatework.core import Routing, build, entries, losses, metrics
from gatework.core.cost import (
    active_parameters,
    count_flops,
    count_parameters,
    peak_bytes,
    saved_bytes,
)
from gatework.models import Decoder
from gatework.ops import linear

B, T, D = 2, 128, 32
N = B * T


def flops(call) -> int:
    with count_flops() as count:
        call()
    return count.total


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


# Single operations.

a23, b35, x234, y245 = random(2, 3), random(3, 5), random(2, 3, 4), random(2, 4, 5)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: a23 @ b35, 2 * 2 * 3 * 5),
        (lambda: x234 @ y245, 2 * 2 * 3 * 4 * 5),
        (lambda: x234 @ random(4), 2 * 2 * 3 * 4),
        (lambda: random(4) @ random(4), 2 * 4),
        (lambda: a23 @ random(3), 2 * 2 * 3),
        (lambda: F.linear(x234, random(7, 4)), 2 * 6 * 4 * 7),
        (lambda: F.linear(x234, random(7, 4), random(7)), 2 * 6 * 4 * 7),
        (lambda: torch.einsum("bij,bjk->bik", x234, y245), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.baddbmm(random(2, 3, 5), x234, y245), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.addbmm(random(3, 5), x234, y245), 2 * 2 * 3 * 4 * 5),
        (lambda: random(2, 5).addmm_(a23, b35), 2 * 2 * 3 * 5),
        (lambda: random(2, 3, 5).baddbmm_(x234, y245), 2 * 2 * 3 * 4 * 5),
        (lambda: torch.addmv(random(2), a23, random(3)), 2 * 2 * 3),
        (lambda: torch.linalg.solve_triangular(random(2, 5, 5), random(2, 5, 3), upper=True), 2 * 3 * 5 * 5),
        (lambda: F.conv1d(random(2, 4, 10), random(8, 4, 3)), 2 * 2 * 8 * 8 * 4 * 3),
        (lambda: F.conv1d(random(2, 4, 10), random(4, 1, 3), groups=4), 2 * 2 * 4 * 8 * 3),
        (lambda: F.conv2d(random(2, 4, 6, 6), random(8, 4, 3, 3), padding=1), 2 * 2 * 8 * 36 * 4 * 9),
        # oneDNN's product: whole multiples of its rows, and enough of them.
        (lambda: linear.linear(random(64, 512), random(256, 512)), 2 * 64 * 512 * 256),
        (lambda: nn.LSTM(8, 6)(random(5, 2, 8)), 2 * 10 * 4 * 6 * (8 + 6)),
        (lambda: random(100).exp().softmax(0).cumsum(0).sum(), 0),
    ],
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_operations(call, expected, mode):
    with mode():
        assert flops(call) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(dtype):
    ends = torch.tensor([4, 8, 16], dtype=torch.int32)
    x, w = random(16, 8, dtype=dtype), random(3, 8, 24, dtype=dtype)
    assert flops(lambda: F.grouped_mm(x, w, offs=ends)) == 2 * 16 * 8 * 24  # Each row meets one of the three matrices.
    assert flops(lambda: F.grouped_mm(random(3, 4, 8, dtype=dtype), w)) == 2 * 3 * 4 * 8 * 24
    assert flops(lambda: F.grouped_mm(x.t(), random(16, 24, dtype=dtype), offs=ends)) == 2 * 8 * 16 * 24
    x, w = x.requires_grad_(), w.requires_grad_()
    upstream = random(16, 24, dtype=dtype)
    y = F.grouped_mm(x, w, offs=ends)
    assert flops(lambda: torch.autograd.grad(y, (x, w), upstream)) == 2 * (2 * 16 * 8 * 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_fused_cpu_attention_counts_the_pairs_that_see_each_other(dtype, causal):
    q, k, v = (random(B, 4, T, 8, dtype=dtype).requires_grad_() for _ in range(3))
    whole = 2 * B * 4 * T * T * 8
    product = 2 * B * 4 * sum(range(1, T + 1)) * 8 if causal else whole
    with count_flops() as count:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert set(count.by_op) == {"_scaled_dot_product_flash_attention_for_cpu"}
    assert count.total == 2 * product
    assert flops(lambda: y.backward(random(*y.shape, dtype=dtype))) == 5 * product
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    assert flops(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)) == 2 * whole
    shared = [x[:, :2].detach() for x in (k, v)]
    assert flops(lambda: F.scaled_dot_product_attention(q, *shared, is_causal=causal, enable_gqa=True)) == 2 * product
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        assert flops(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)) == 2 * whole
    assert flops(lambda: y.backward(random(*y.shape, dtype=dtype))) == 4 * whole


def test_causal_attention_over_more_or_fewer_keys_than_queries():
    q, few, many = random(1, 1, 4, 8), random(1, 1, 3, 8), random(1, 1, 6, 8)
    assert flops(lambda: F.scaled_dot_product_attention(q, few, few, is_causal=True)) == 2 * 2 * 8 * (1 + 2 + 3 + 3)
    assert flops(lambda: F.scaled_dot_product_attention(q, many, many, is_causal=True)) == 2 * 2 * 8 * (1 + 2 + 3 + 4)


@pytest.mark.parametrize("training", [False, True])
def test_torch_layers_count_the_same_on_their_fast_path(training):
    attention = 8 * N * D * D + 4 * B * T * T * D
    layer = nn.TransformerEncoderLayer(D, 4, 48, dropout=0.0, batch_first=True).train(training)
    own = nn.MultiheadAttention(D, 4, batch_first=True).train(training)
    x = random(B, T, D)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert flops(lambda: layer(x)) == attention + 4 * N * D * 48
            assert flops(lambda: own(x, x, x, need_weights=False)) == attention


def test_counts_nest_and_name_the_operations():
    with count_flops() as outer:
        a23 @ b35
        with count_flops() as inner:
            x234 @ y245
    assert (outer.by_op, inner.by_op) == ({"mm": 60, "bmm": 240}, {"bmm": 240})
    assert (outer.total, inner.total) == (300, 240)


def test_backward_and_recomputation_are_counted():
    layer, x = nn.Linear(D, 3 * D), random(N, D).requires_grad_()
    once = 2 * N * D * 3 * D
    assert flops(lambda: layer(x).square().sum().backward()) == 3 * once
    assert flops(lambda: layer(x.detach()).square().sum().backward()) == 2 * once  # No gradient for the input.
    tall = nn.Sequential(layer, nn.Tanh())  # The recomputation stops at the last tensor that the backward pass needs.
    assert flops(lambda: checkpoint(tall, x, use_reentrant=False).square().sum().backward()) == 4 * once


# Whole parts: expression, and the FLOPs of one forward pass on (B, T, D).

F_ = 48


def recurrence(heads: int, key: int, value: int, axis: str = "keys", chunk: int = 64, sub: int = 4) -> int:
    """FLOPs of the chunked recurrence, K and V wide heads: by chunk, q k^T and P V, of which the one on the decays' axis is the
    levels of halving (two C/2 x C/2 halves meet, then C/4 x C/4 ...; without decays a plain product), and two products with the
    state."""
    scores, values, block = 2 * chunk * chunk * key, 2 * chunk * chunk * value, chunk
    halved = 0
    while block > sub:
        halved += 2 * (chunk // block) * (block // 2) ** 2
        block //= 2
    scores = halved * key if axis == "keys" else scores
    values = halved * value if axis == "values" else values
    return B * heads * (T // chunk) * (scores + values + 2 * 2 * chunk * key * value)


def both_ways(weights: int, products: int) -> tuple[int, int]:
    """Forward and backward FLOPs: multiply-adds of every token with so many weights, and other products; the gradients of both
    operands of a product cost it twice."""
    forward = 2 * N * weights + products
    return forward, 2 * forward


def state_space(channels: int, state: int, chunk: int = 64) -> int:
    """FLOPs of a system per channel in chunks: the kernel's C x C matrix, and two products with its S numbers of state."""
    return B * (T // chunk) * channels * (2 * chunk * chunk + 4 * chunk * state)


SCORES = 2 * B * (T * (T + 1) // 2) * D  # One product over the pairs that see each other.
PAIRS = 2 * B * T * T * D  # One product over all pairs.
K2, K4 = D // 2 // 4, D // 4  # A head's width, of keys half as wide as the stream and of what is as wide.

#: Part expression, FLOPs forward, FLOPs of the backward pass.
ANALYTIC = {
    "attention": (2 * N * 4 * D * D + 2 * SCORES, 4 * N * 4 * D * D + 5 * SCORES),
    "attention(kv_heads=2)": (2 * N * 3 * D * D + 2 * SCORES, 4 * N * 3 * D * D + 5 * SCORES),
    "gated_attention": (2 * N * 5 * D * D + 2 * SCORES, 4 * N * 5 * D * D + 5 * SCORES),
    "gated_attention(gate_form=headwise)": (2 * N * (4 * D * D + 4 * D) + 2 * SCORES, 4 * N * (4 * D * D + 4 * D) + 5 * SCORES),
    # Blocks of 64: the first sees itself, the second itself and the first.
    "attention(window=64)": (2 * N * 4 * D * D + 4 * B * D * 64 * (64 + 128), 4 * N * 4 * D * D + 10 * B * D * 64 * (64 + 128)),
    "quadrature_attention": (2 * N * 4 * D * D + 2 * PAIRS, 4 * N * 4 * D * D + 5 * PAIRS),
    "gla": both_ways(2 * D * (D // 2) + 3 * D * D + D * 16 + 16 * (D // 2), recurrence(4, K2, K4)),
    "vig": both_ways(2 * D * (D // 2) + 3 * D * D + D * 16 + 16 * D, 2 * recurrence(4, K2, K4)),
    "gsa": both_ways(5 * D * D, recurrence(4, K4, K4, "values") + recurrence(4, K4, K4)),
    # The normaliser is one more value.
    "linear_attention": both_ways(4 * D * D, recurrence(4, K4, K4 + 1, "none")),
    "linear_self_attention": both_ways(2 * D * D, recurrence(1, D, D, "none")),
    # A projection to 2 D behind the systems, of 32 and 64 complex modes.
    "s4d": both_ways(2 * D * D, state_space(D, 64)),
    "s4_ptd": both_ways(2 * D * D, state_space(D, 128)),
    # Into and out of 64 and 128 numbers of state, a gate; a mode maps pairs to pairs, inside of chunks of 32 and across them.
    "s5": both_ways(2 * D * 64 + D * D, 2 * N * 32 * (4 * 32 + 2 * 4)),
    "s5_ptd": both_ways(2 * D * 128 + D * D, 2 * N * 64 * (4 * 32 + 2 * 4)),
    # The steps themselves are element by element.
    "paragru": both_ways(3 * D * D + 3 * D * D // 4, 0),
    "paralstm": both_ways(3 * D * D + 3 * D * D // 4, 0),
    f"mlp(d_ff={F_})": (2 * N * 2 * D * F_, 4 * N * 2 * D * F_),
    f"glu(d_ff={F_})": (2 * N * 3 * D * F_, 4 * N * 3 * D * F_),
    f"moe(d_ff={F_}, experts=4, gate=topk(k=2))": (2 * N * (4 * D + 2 * 3 * D * F_), 4 * N * (4 * D + 2 * 3 * D * F_)),
    f"moe(d_ff={F_}, experts=4, gate=topk(k=1), shared=1, glu=false)": (2 * N * 4 * D * (1 + F_), 4 * N * 4 * D * (1 + F_)),
}


@pytest.mark.parametrize("expression", ANALYTIC)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_parts_count_equals_the_analytic_one(expression, dtype):
    torch.manual_seed(0)
    part = build(expression, None, d_model=D, heads=4).to(dtype)
    x = random(B, T, D, dtype=dtype).requires_grad_()
    forward, backward = ANALYTIC[expression]
    with count_flops() as count:
        y = part(x)
    assert count.total == forward
    with count_flops() as count:
        (y * random(B, T, D, dtype=dtype)).sum().backward()
    assert count.total == backward
    with torch.no_grad():
        assert flops(lambda: part.eval()(x)) == forward
    with torch.inference_mode():
        assert flops(lambda: part(x)) == forward


def test_versatile_ffn_counts_the_loops_and_slices_that_its_tokens_choose():
    torch.manual_seed(0)
    part = build("versatile_ffn(d_ff=48, experts=4, k=2, loops=3)", "feedforward", d_model=D).eval()
    x = 10 * random(B, T, D)
    loops = (x @ part.depth_router.weight.t()).argmax(-1) + 1
    assert set(loops.unique().tolist()) == {1, 2, 3}
    wide = int((loops < 3).sum()) * 2 * (48 // 4) * D  # A slice of hidden units that are there already: its share of W2.
    with torch.no_grad():
        assert flops(lambda: part(x)) == 2 * (N * D * (4 + 3) + int(loops.sum()) * 3 * D * 48 + wide)


def test_every_mixer_and_feedforward_has_its_count_tested():
    """Here, or with the method: a test of its own file that counts FLOPs."""
    here = {expression.partition("(")[0] for expression in ANALYTIC} | {"versatile_ffn"}
    tests = Path(__file__).parents[1]
    for entry in entries():
        if entry.slot in ("mixer", "feedforward") and entry.name not in here:
            text = (tests / entry.cls.__module__.split(".")[1] / f"test_{entry.name}.py").read_text(encoding="utf-8")
            assert "count_flops" in text or "profile(" in text, f"no test compares the FLOPs of {entry.name} with a formula"


def test_what_is_skipped_costs_nothing():
    part = build(f"moe(d_ff={F_}, experts=4, gate=topk(k=2))", "feedforward", d_model=D).eval()
    x, mask = random(B, T, D), torch.arange(T).expand(B, T) < 40
    with torch.no_grad():
        assert flops(lambda: part(x, mask)) == 2 * (N * 4 * D + 2 * 40 * 2 * 3 * D * F_)
        mixer = build("attention", "mixer", d_model=D)
        kept = flops(lambda: mixer(x, keep=mask))
    assert kept == 2 * (N * 2 * D * D + 2 * 40 * 2 * D * D) + 4 * B * 40 * 40 * D


def test_decoding_costs_one_token():
    mixer = build("attention", "mixer", d_model=D).eval()
    with torch.no_grad():
        state = mixer.init_state(B)
        mixer(random(B, 20, D), state=state)
        assert flops(lambda: mixer(random(B, 1, D), state=state)) == 2 * B * 4 * D * D + 4 * B * 21 * D


# Bytes.


def test_saved_bytes_of_known_functions():
    x = random(1000).requires_grad_()
    with saved_bytes() as saved:
        y = x.relu()  # Its own output.
    assert saved.total == 4000
    with saved_bytes() as saved:
        y = build("golu", "activation")(x)  # x, and nothing else.
    assert saved.total == 4000
    with saved_bytes(x) as saved:
        y = build("golu", "activation")(x)
    assert saved.total == 0
    with saved_bytes() as saved:
        y = x * torch.exp(-torch.exp(-x))  # The same, composed: x, both exponentials.
    assert saved.total == 12000
    with saved_bytes() as saved:
        y = x * x * x  # x once, though it is saved three times, and x * x.
    assert saved.total == 8000
    with saved_bytes() as saved, torch.no_grad():
        y = x * x
    assert saved.total == 0
    del y


def test_saved_bytes_leave_the_model_out_and_count_a_view_as_its_storage():
    layer, x = nn.Linear(10, 20), random(50, 10)
    with saved_bytes(layer) as saved:
        layer(x)
    assert saved.total == 50 * 10 * 4
    with saved_bytes(layer) as saved:
        layer(x[:5])
    assert saved.total == 50 * 10 * 4
    with saved_bytes(layer, x) as saved:
        layer(x)
    assert saved.total == 0


def test_a_storage_at_a_dead_ones_address_counts_again():
    x = random(1000).requires_grad_()
    with saved_bytes() as saved:
        for _ in range(3):
            x.relu()
    assert saved.total == 3 * 4000


def test_checkpointing_keeps_the_input_only():
    layers = nn.Sequential(nn.Linear(D, 4 * D), nn.ReLU(), nn.Linear(4 * D, D))
    x = random(N, D).requires_grad_()
    with saved_bytes(layers) as plain:
        layers(x)
    with saved_bytes(layers) as spared:
        checkpoint(layers, x, use_reentrant=False)
    assert plain.total == 4 * N * (D + 4 * D)
    assert spared.total == 4 * N * D


def test_peak_bytes_of_a_known_sequence():
    x = random(1000)
    with peak_bytes(x) as peak:
        a = x + 1  # 4000
        b = a[:10] + 1  # 4040; a view is no memory of its own
        a.add_(1)
        del a  # 40
        c = torch.empty(500, dtype=torch.float64)  # 4040
        c = c.new_zeros(10)  # 4120 before the old one goes
        x.mul_(1)
    assert peak.total == 4120
    assert b.shape == c.shape
    with peak_bytes(x) as peak:
        x.view(10, 100).t()
    assert peak.total == 0


def test_peak_bytes_see_gradients_and_are_repeatable():
    layer, x = nn.Linear(D, D, bias=False), random(N, D)

    def step() -> int:
        layer.weight.grad = None
        with peak_bytes(layer, x) as peak:
            layer(x).backward(torch.ones(N, D))
        return peak.total

    assert step() == step() == 2 * 4 * N * D + 4 * D * D  # The output, its gradient, the weight's.


# Parameters.


def test_parameters_in_total_and_active():
    moe = build("moe(d_ff=48, experts=8, gate=topk(k=2), shared=1)", "feedforward", d_model=D)
    expert, gate = 3 * D * 48, 8 * D
    assert count_parameters(moe) == gate + 9 * expert
    assert active_parameters(moe) == gate + (2 + 1) * expert
    torch.manual_seed(0)
    model = Decoder(50, d_model=D, layers=2, feedforward="moe(d_ff=48, experts=8, gate=topk(k=2))")
    total = 50 * D + 2 * (4 * D * D + 2 * D + gate + 8 * expert) + D  # The head is tied: it counts once.
    assert count_parameters(model) == total
    assert active_parameters(model) == total - 2 * 6 * expert
    model.blocks[1].feedforward = model.blocks[0].feedforward  # Shared by both layers: it counts once.
    assert count_parameters(model) == total - gate - 8 * expert
    assert active_parameters(model) == total - gate - 8 * expert - 6 * expert


def test_active_parameters_are_those_that_get_a_gradient_from_one_token():
    moe = build("moe(d_ff=8, experts=4, gate=topk(k=2), shared=1)", "feedforward", d_model=D)
    moe(random(1, D)).sum().backward()
    stacks = (moe.w_in, moe.w_out, moe.shared_in, moe.shared_out)
    touched = sum(int((p.grad.flatten(1) != 0).any(1).sum()) * p[0].numel() for p in stacks)
    assert active_parameters(moe) == touched + moe.gate.weight.numel()


# profile.


class Counter(nn.Module):
    """A module with a buffer that moves, randomness, and two submodules of known cost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.calls += 1
        return self.second(F.dropout(self.first(x), 0.5)) * scale


def test_profile_measures_one_call():
    module, x = Counter(), random(N, D)
    once = 2 * N * D * 2 * D
    cost = gatework.profile(module, x, repeats=3)
    assert cost.flops == 2 * once
    assert cost.flops_by_op == {"addmm": 2 * once}
    assert cost.flops_by_module == {"": 2 * once, "first": once, "second": once}
    assert cost.parameters == cost.active_parameters == count_parameters(module)
    assert (cost.saved_bytes, cost.backward, cost.repeats) == (0, False, 3)
    assert cost.seconds > 0
    assert cost.peak_bytes >= 4 * N * 3 * D
    both = gatework.profile(module, {"x": x.requires_grad_(), "scale": 2.0}, backward=True, repeats=1)
    assert both.flops == 6 * once
    assert both.flops_by_module == cost.flops_by_module  # Forward only.
    assert both.saved_bytes >= 4 * N * 3 * D
    assert both.peak_bytes > cost.peak_bytes
    assert gatework.profile(module, (x.detach(), 2.0), backward=True, repeats=1).flops == 5 * once


def test_profile_leaves_the_module_as_it_was():
    module, x = Counter(), random(N, D)
    module.first.weight.grad = torch.ones_like(module.first.weight)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    gatework.profile(module, x, backward=True, repeats=2)
    assert torch.equal(torch.rand(3), expected)
    assert module.calls == 0
    assert torch.equal(module.first.weight.grad, torch.ones_like(module.first.weight))
    assert module.second.weight.grad is None
    assert x.grad is None
    moe = build("moe(d_ff=8, experts=4)", "feedforward", d_model=D)
    gatework.profile(moe, x, backward=True, repeats=1)
    assert losses(moe) == metrics(moe) == {}


def test_profile_counts_the_parts_own_losses_in_the_backward_pass():
    gate = build("topk(k=2)", "gate", d_model=D, n_experts=4)

    class OnlyLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = gate

        def forward(self, x):
            routing: Routing = self.gate(x)
            return routing.weights.detach().sum() + 0 * x.sum()

    x = random(N, D).requires_grad_()
    assert gatework.profile(OnlyLoss(), x, backward=True, repeats=1).flops == 3 * 2 * N * D * 4


def test_profile_decodes_from_the_same_state_every_time():
    mixer = build("attention", "mixer", d_model=D).eval()
    with torch.no_grad():
        state = mixer.init_state(B)
        mixer(random(B, 20, D), state=state)
    cost = gatework.profile(mixer, {"x": random(B, 1, D), "state": state}, repeats=4)
    assert cost.flops == 2 * B * 4 * D * D + 4 * B * 21 * D
    assert state.length == 20


def test_profile_refuses_what_cannot_be_measured():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        gatework.profile(nn.Linear(2, 2), random(3, 2), repeats=0)
    with pytest.raises(ValueError, match="nothing to differentiate: no output requires a gradient"):
        gatework.profile(nn.ReLU(), random(3, 2), backward=True)


def test_a_cost_prints_itself():
    cost = gatework.core.cost.Cost(
        flops=1_500_000, seconds=0.0025, peak_bytes=2048, saved_bytes=999, parameters=12_345, active_parameters=100, backward=True,
        flops_by_op={"mm": 500_000, "_bmm": 1_000_000}, repeats=7,
    )
    assert str(cost) == "\n".join(
        [
            "forward and backward",
            "  FLOPs        1.5 M  (bmm 67%, mm 33%)",
            "  time         2.500 ms  (median of 7)",
            "  peak memory  2.05 kB",
            "  saved        999 B for the backward pass",
            "  parameters   12.3 k  (100 active per token)",
        ]
    )
    nothing = gatework.profile(nn.ReLU(), random(3, 2), repeats=1)
    assert "FLOPs        0" in str(nothing)
    assert "saved" not in str(nothing)
