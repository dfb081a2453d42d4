"""Linear attention against its equations."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gatework.core import PartError, capability
from gatework.mixers import GatedLinearAttention, LinearAttention

D, HEADS = 16, 2
K = D // HEADS


def layer(**settings) -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(D, **({"heads": HEADS} | settings)).double()


def inputs(length: int = 21) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def reference(m: LinearAttention, x: torch.Tensor, allowed: torch.Tensor | None = None) -> torch.Tensor:
    """All pairs: weights phi(q_t) . phi(k_s) for s <= t (or where ``allowed``), divided by their sum."""
    def phi(y):
        return {"elu": torch.where(y > 0, y + 1, y.clamp(max=0).exp()), "relu": y * (y > 0), "identity": y}[m.feature_map]

    def heads(y):
        return y.view(*x.shape[:2], HEADS, K).transpose(1, 2)

    q, k = (phi(heads(x @ w.T)) for w in (m.q_proj.weight, m.k_proj.weight))
    if allowed is None:
        allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if m.causal else torch.tensor(True)
    weights = (q @ k.mT) * allowed
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6) if m.normalize else weights * K**-0.5
    o = weights @ heads(x @ m.v_proj.weight.T)
    if m.norm is not None:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.norm.weight
        gate = x @ m.g_proj.weight.T
        o = o * heads(gate * torch.sigmoid(gate))
    return o.transpose(1, 2).flatten(2) @ m.o_proj.weight.T


SETTINGS = [
    {}, {"feature_map": "relu"}, {"feature_map": "identity"}, {"feature_map": "relu", "normalize": False},
    {"feature_map": "identity", "gate": True}, {"gate": True, "chunk": 8},
]


@pytest.mark.parametrize("length", [1, 5, 64, 65])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_the_equations_with_all_gradients(settings, causal, length):
    m, x = layer(causal=causal, **settings), inputs(length).requires_grad_()
    if m.norm is not None:
        with torch.no_grad():
            m.norm.weight.uniform_(0.5, 1.5)
    got, expected = m(x), reference(m, x)
    # Where all of relu's keys are 0 the floor alone divides.
    scale = float(expected.detach().abs().max().clamp(min=1))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10 * scale)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * float(b.abs().max().clamp(min=1)))


def test_is_gated_linear_attention_that_forgets_nothing():
    m, x = layer(feature_map="identity", gate=True), inputs(70)
    gla = GatedLinearAttention(D, heads=HEADS, expand_k=1.0).double()
    gla.load_state_dict(m.state_dict(), strict=False)
    torch.nn.init.constant_(gla.decay_out.bias, 1e4)
    torch.testing.assert_close(gla(x), m(x), rtol=0, atol=1e-12)


def test_normalised_outputs_are_averages_of_values():
    m, x = layer(), inputs()
    with torch.no_grad():
        m.o_proj.weight.copy_(torch.eye(D))
        values = m.v_proj(x)
        y = m(x)
    torch.testing.assert_close(y[:, 0], values[:, 0], rtol=0, atol=1e-5)
    for t in range(21):
        seen = values[:, : t + 1]
        assert (y[:, t] <= seen.amax(1) + 1e-5).all()
        assert (y[:, t] >= seen.amin(1) - 1e-5).all()


def test_one_step_of_gradient_descent_on_linear_regression():
    """With the identity, tokens (x, y) and a query (x, 0): the prediction after one step from 0 (von Oswald et al., 2023)."""
    m = LinearAttention(4, heads=1, feature_map="identity", causal=False).double()
    with torch.no_grad():
        for linear, kept in ((m.q_proj, [1, 1, 1, 0]), (m.k_proj, [1, 1, 1, 0]), (m.v_proj, [0, 0, 0, 1]), (m.o_proj, [1] * 4)):
            linear.weight.copy_(torch.diag(torch.tensor(kept, dtype=torch.float64)))
    examples = torch.randn(5, 9, 3, dtype=torch.float64)
    targets, query = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    tokens = torch.cat([torch.cat([examples, targets[..., None]], -1), torch.cat([query, query.new_zeros(5, 1)], -1)[:, None]], 1)
    weights = torch.einsum("bn,bnd->bd", targets, examples)  # The negative gradient of half the summed squared errors at 0.
    torch.testing.assert_close(m(tokens)[:, -1, 3], (weights * query).sum(-1) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"feature_map": "identity"}])
@pytest.mark.parametrize("pieces", [[21], [1] * 21, [5, 16], [2, 3, 1, 15]])
def test_pieces_equal_whole(pieces, settings):
    m, x = layer(chunk=8, **settings), inputs()
    state, outputs = m.init_state(2), []
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            outputs.append(m(piece, state=state))
        torch.testing.assert_close(torch.cat(outputs, 1), m(x), rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(21)


@pytest.mark.parametrize("causal", [True, False])
def test_segments_and_padding(causal):
    m, x = layer(causal=causal), inputs(9)
    segments, mask = torch.tensor([[3] * 4 + [1] * 5, [0] * 9]), torch.ones(2, 9, dtype=torch.bool)
    mask[0, 2], mask[1, :3], mask[1, 7:] = False, False, False
    order = torch.ones(9, 9, dtype=torch.bool).tril() if causal else torch.ones(9, 9, dtype=torch.bool)
    allowed = (segments[:, :, None] == segments[:, None, :]) & mask[:, None, :] & order
    got = m(x, mask=mask, segments=segments)
    torch.testing.assert_close(got[mask], reference(m, x, allowed[:, None])[mask], rtol=0, atol=1e-11)
    assert got.isfinite().all()


def test_both_sides_cannot_be_decoded():
    m = layer(causal=False)
    assert not capability(m, "causal")
    assert not capability(m, "decodes")
    assert capability(m, "packs")
    with pytest.raises(PartError, match="sees later tokens"):
        m(inputs(3), state=m.init_state(2))


@pytest.mark.parametrize("causal", [True, False])
def test_keep_skips_projections(causal):
    m, x = layer(causal=causal, gate=True), inputs(32)
    keep = torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad():
        full = m(x)
        with FlopCounterMode(display=False) as counter:
            kept = m(x, keep=keep)
        with FlopCounterMode(display=False) as every:
            m(x)
    torch.testing.assert_close(kept, full * keep[..., None], rtol=0, atol=1e-12)
    assert every.get_total_flops() - counter.get_total_flops() == int((~keep).sum()) * 3 * 2 * D * D


def test_no_tokens():
    for causal in (True, False):
        assert layer(causal=causal)(inputs(0)).shape == (2, 0, D)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "not divisible by heads 3"),
        ({"feature_map": "identity", "normalize": True}, "takes normalize false"),
        ({"chunk": 48}, "power of two"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)
