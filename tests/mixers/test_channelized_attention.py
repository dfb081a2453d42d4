"""Attention with projections structured by head: against its matrices, its independence, and plain attention."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatework.core.cost import count_flops
from gatework.mixers import Attention, ChannelizedAttention
from gatework.mixers.channelized_attention import MIXINGS, ChannelProjection, amplify

D, HEADS = 12, 3
P = D // HEADS
FORMS = [{"mixing": mixing} for mixing in MIXINGS] + [
    {"mixing": "independent", "o": "kronecker"},
    {"mixing": "dense", "v": "independent"},
    {"q": "independent", "k": "dense", "v": "kronecker", "o": "independent", "rope": False, "causal": False},
]


def layer(**settings) -> ChannelizedAttention:
    torch.manual_seed(0)
    m = ChannelizedAttention(D, HEADS, **settings).double().eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.35 * torch.randn_like(p))
    return m


def inputs(length: int = 7) -> Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def matrix(projection: nn.Module) -> Tensor:
    """(out, in), block by block."""
    if isinstance(projection, nn.Linear):
        return projection.weight
    rows = []
    for g in range(HEADS):
        row = []
        for h in range(HEADS):
            m = float(g == h) if projection.mixing is None else projection.mixing[g, h]
            row.append(m * projection.weight[h])
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0)


class Plain:
    """What the equations of attention need, with the projections as matrices."""

    def __init__(self, m: ChannelizedAttention) -> None:
        self.d_model, self.heads, self.kv_heads, self.window = D, HEADS, HEADS, None
        self.rope, self.rope_base, self.causal, self.q_norm, self.k_norm = m.rope, m.rope_base, m.causal, None, None
        for name in ("q", "k", "v", "o"):
            linear = type("Matrix", (), {"weight": matrix(getattr(m, f"{name}_proj"))})
            setattr(self, f"{name}_proj", linear)


def normed(m: ChannelizedAttention, x: Tensor) -> Tensor:
    if set(m.mixings.values()) == {"dense"}:
        return x
    channels = x.unflatten(-1, (HEADS, P))
    return (channels / (channels.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten(-2)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_equals_the_equations_with_all_gradients(settings, attention_equations):
    m, x = layer(**settings), inputs().requires_grad_()
    got, expected = m(x), attention_equations(Plain(m), normed(m, x))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mixes", [False, True])
def test_a_projection_is_its_kronecker_matrix(mixes):
    torch.manual_seed(0)
    p = ChannelProjection(HEADS, P, mixes).double()
    if mixes:
        nn.init.normal_(p.mixing)
    torch.testing.assert_close(p.dense(), matrix(p), rtol=0, atol=1e-14)
    for shape in ((D,), (5, D), (2, 0, D), (2, 3, 4, D)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(p(x), x @ matrix(p).T, rtol=0, atol=1e-13)
    assert torch.equal(p(inputs()[:, ::2]), p(inputs()[:, ::2].contiguous()))


def test_mixing_by_the_identity_is_independence_and_blocks_of_the_identity_are_scalars_alone():
    torch.manual_seed(0)
    mixed, alone = ChannelProjection(HEADS, P, True).double(), ChannelProjection(HEADS, P, False).double()
    alone.weight = mixed.weight
    torch.testing.assert_close(mixed(inputs()), alone(inputs()), rtol=0, atol=1e-15)
    with torch.no_grad():
        mixed.mixing.normal_()
        mixed.weight.copy_(torch.eye(P))
    wanted = torch.einsum("gh,bthp->btgp", mixed.mixing, inputs().unflatten(-1, (HEADS, P))).flatten(2)
    torch.testing.assert_close(mixed(inputs()), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_independent_heads_know_their_own_channel_only(settings):
    m, x = layer(**settings), inputs(4)[:1]
    jacobian = torch.autograd.functional.jacobian(m, x).abs()[0, :, :, 0]
    crossing = torch.zeros(HEADS, HEADS, dtype=torch.bool)
    for g, h in itertools.product(range(HEADS), repeat=2):
        crossing[g, h] = bool(jacobian[:, g * P : (g + 1) * P, :, h * P : (h + 1) * P].max() > 0)
    independent = settings == {"mixing": "independent"}
    assert torch.equal(crossing, torch.eye(HEADS, dtype=torch.bool) if independent else torch.ones(HEADS, HEADS).bool())


def test_the_scale_of_a_channel_is_its_heads_own_business_through_the_norm_of_the_block_too():
    m, x = layer(mixing="independent"), inputs()
    scaled = x.clone()
    scaled[..., :P] *= 10
    before, after = (m(F.rms_norm(some, (D,))) for some in (x, scaled))
    # The norm over the whole width shrinks the other channels; the norms by channel undo it up to their eps.
    torch.testing.assert_close(after, before, rtol=0, atol=1e-3)
    assert (F.rms_norm(scaled, (D,))[..., P:] - F.rms_norm(x, (D,))[..., P:]).abs().max() > 0.5


@pytest.mark.parametrize("rope", [False, True])
def test_all_dense_is_plain_attention(rope):
    m = layer(mixing="dense", rope=rope)
    plain = Attention(D, HEADS, rope=rope).double()
    plain.load_state_dict(m.state_dict())
    assert torch.equal(m(inputs()), plain(inputs()))


def test_amplification_multiplies_the_logits_in_evaluation():
    m, x = layer(mixing="kronecker"), inputs()
    soft = m(x)
    assert amplify(nn.Sequential(m, nn.Linear(2, 2)), 4.0) == 1
    sharp = m(x)
    with torch.no_grad():
        m.q_proj.weight.mul_(4)
    assert amplify(m, 1.0) == 1
    torch.testing.assert_close(m(x), sharp, rtol=0, atol=1e-12)
    assert (sharp - soft).abs().max() > 1e-2
    m.train().amplification = 16
    trained = m(x)
    m.amplification = 1.0
    assert torch.equal(trained, m(x))
    # Decoding is amplified too.
    m.eval().amplification = 8
    state = m.init_state(2)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([m(some, state=state) for some in x.split([3, 1, 3], 1)], 1), m(x), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="the factor must be positive, got 0"):
        amplify(m, 0.0)


@pytest.mark.parametrize(("mixing", "size"), [("independent", D * P), ("kronecker", D * P + HEADS**2), ("dense", D * D)])
def test_parameters_and_products_per_projection(mixing, size):
    m = ChannelizedAttention(D, HEADS, mixing=mixing, rope=False)
    assert sum(p.numel() for p in m.parameters()) == 4 * size
    per_token = {"independent": D * P, "kronecker": D * (P + HEADS), "dense": D * D}[mixing]
    with torch.no_grad(), count_flops() as count:
        m.q_proj(torch.randn(5, D))
    assert count.total == 2 * 5 * per_token


def test_its_start():
    torch.manual_seed(0)
    m = ChannelizedAttention(64, 4, q="dense", o="independent")
    assert torch.equal(m.k_proj.mixing, torch.eye(4))
    assert m.o_proj.mixing is None
    x = torch.randn(500, 64)
    sizes = [getattr(m, f"{name}_proj")(x).std().item() for name in "qkvo"]
    assert sizes == pytest.approx([0.02 * math.sqrt(64)] * 4, rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 5}, "d_model 12 is not divisible by heads 5"),
        ({"mixing": "mixed"}, "the mixing of q must be independent, kronecker or dense, got 'mixed'"),
        ({"v": "none"}, "the mixing of v must be"),
        ({"amplification": 0.0}, "amplification must be positive, got 0.0"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    init = inspect.unwrap(ChannelizedAttention.__init__)  # The annotation check of the test run comes before the class's own.
    with pytest.raises(ValueError, match=message):
        init(ChannelizedAttention.__new__(ChannelizedAttention), D, **({"heads": HEADS} | settings))
