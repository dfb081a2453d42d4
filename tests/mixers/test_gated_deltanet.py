"""The gated delta rule's mixer against its equations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatework.core.cost import count_flops
from gatework.mixers import DeltaNet, GatedDeltaNet

D, HEADS = 16, 2


def layer(**settings) -> GatedDeltaNet:
    torch.manual_seed(0)
    return GatedDeltaNet(D, **({"heads": HEADS} | settings)).double()


def inputs(length: int = 21) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def reference(m: GatedDeltaNet, x: torch.Tensor) -> torch.Tensor:
    """Equation 10 of the paper in the form of the module's docstring, one token and one matrix of transition at a time."""
    batch, length, _ = x.shape
    taps = m.conv.weight.shape[1]
    k_width, v_width = m.key_width // m.heads, m.value_width // m.heads
    projected = torch.cat([x.new_zeros(batch, taps - 1, m.conv.weight.shape[0]), x @ m.qkv_proj.weight.T], 1)
    state, eye = x.new_zeros(batch, m.heads, k_width, v_width), torch.eye(k_width, dtype=x.dtype)
    rows = []
    for t in range(length):
        seen = silu((projected[:, t : t + taps] * m.conv.weight.T).sum(1))
        q, k, v = (y.view(batch, m.heads, -1) for y in seen.split([m.key_width, m.key_width, m.value_width], 1))
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
        beta = torch.sigmoid(x[:, t] @ m.b_proj.weight.T) * (2 if m.allow_neg_eigval else 1)
        decay = torch.exp(-m.A_log.exp() * torch.log1p(torch.exp(x[:, t] @ m.a_proj.weight.T + m.dt_bias)))
        transition = eye - torch.einsum("bh,bhk,bhl->bhkl", beta, k, k)
        state = decay[..., None, None] * (transition @ state) + torch.einsum("bh,bhk,bhv->bhkv", beta, k, v)
        o = torch.einsum("bhk,bhkv->bhv", q, state) * k_width**-0.5
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        rows.append((o.flatten(1) * silu(x[:, t] @ m.g_proj.weight.T)) @ m.o_proj.weight.T)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("length", [1, 5, 32, 65])
@pytest.mark.parametrize(
    "settings", [{}, {"expand_k": 0.5, "expand_v": 1.0, "allow_neg_eigval": True}, {"chunk": 4, "conv_width": 2, "heads": 4}]
)
def test_equals_the_equations_with_all_gradients(length, settings):
    m, x = layer(**settings), inputs(length).requires_grad_()
    with torch.no_grad():
        m.norm.weight.uniform_(0.5, 1.5)
        m.dt_bias.normal_()
    got, expected = m(x), reference(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pieces", [[21], [1] * 21, [5, 16], [2, 3, 1, 15]])
def test_pieces_equal_whole(pieces):
    m, x = layer(chunk=8), inputs()
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(21)


def test_without_decay_the_memory_is_that_of_the_plain_rule():
    m, x = layer(), inputs(40)
    plain = DeltaNet(D, heads=HEADS, expand_k=0.75, expand_v=1.5).double()
    with torch.no_grad():
        m.A_log.fill_(-torch.inf)
        plain.load_state_dict({name: value for name, value in m.state_dict().items() if name in plain.state_dict()})
        states = [part.init_state(2) for part in (m, plain)]
        m(x, state=states[0])
        plain(x, state=states[1])
    torch.testing.assert_close(states[0].memory, states[1].memory, rtol=0, atol=1e-12)


def test_fully_closed_decays_leave_the_present_token():
    m, x = layer(conv_width=1), inputs(9)
    torch.nn.init.constant_(m.dt_bias, 1e4)
    together, alone = m(x), m(x.flatten(0, 1)[:, None]).view(2, 9, D)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-11)
    together.sum().backward()
    assert all(p.grad.isfinite().all() for p in m.parameters())


def test_the_decays_start_as_in_the_paper():
    torch.manual_seed(0)
    m = GatedDeltaNet(1024, heads=1024, expand_k=1.0, expand_v=1.0)
    rates, steps = m.A_log.exp(), torch.nn.functional.softplus(m.dt_bias)
    assert rates.min() > 0
    assert rates.max() <= 16
    assert rates.mean().item() == pytest.approx(8, abs=0.5)
    assert steps.min() >= 0.001 / 1.0001
    assert steps.max() <= 0.1 * 1.0001
    assert steps.log10().mean().item() == pytest.approx(-2, abs=0.05)
    assert set(m.no_weight_decay) <= dict(m.named_parameters()).keys()


def test_about_six_weights_per_squared_width():
    m = GatedDeltaNet(256, heads=4)
    assert sum(p.numel() for p in m.parameters()) == pytest.approx(6 * 256**2, rel=0.05)
    assert m.value_width == 2 * m.key_width


def test_keep_skips_the_output_stage():
    m, x = layer(), inputs(32)
    keep = torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        with FlopCounterMode(display=False) as every:
            full = m(x)
        with FlopCounterMode(display=False) as some:
            kept = m(x, keep=keep)
    torch.testing.assert_close(kept[keep], full[keep], rtol=0, atol=1e-12)
    assert every.get_total_flops() - some.get_total_flops() == int((~keep).sum()) * 2 * D * 2 * m.value_width


@pytest.mark.parametrize(("d_model", "heads"), [(16, 2), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8), (256, 4)])
def test_common_widths_fit(d_model, heads):
    m = GatedDeltaNet(d_model, heads=heads)
    assert m(torch.zeros(1, 2, d_model)).shape == (1, 2, d_model)


def test_widths_that_do_not_divide():
    with pytest.raises(ValueError, match="the key width 12 and value width 24 are not divisible by heads 5"):
        GatedDeltaNet(D, heads=5)


def test_flops_of_a_decoded_token_and_of_sequences():
    """A token costs its weights and two reads of each head's memory, by its key and by its query; a sequence grows by what it
    grows."""
    m = layer()
    weights = sum(p.numel() for p in m.parameters() if p.dim() == 2) - m.conv.weight.numel()
    with torch.no_grad():
        with count_flops() as one:
            m(inputs(1), state=m.init_state(2))
        totals = []
        for length in (64, 128, 192):
            with count_flops() as some:
                m(inputs(length))
            totals.append(some.total)
    assert one.total == 2 * 2 * (weights + 2 * m.key_width * m.value_width // HEADS)
    assert totals[2] - totals[1] == totals[1] - totals[0] > 64 * one.total
