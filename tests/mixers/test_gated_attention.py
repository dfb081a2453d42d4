"""Gated attention against its equation at every position, and against plain attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.core import metrics
from gatework.core.cost import count_flops
from gatework.mixers import Attention, GatedAttention

D, HEADS, KV = 16, 4, 2
WIDTH = D // HEADS

#: Gated heads by position (None: no heads), in the paper's numbering.
POSITIONS = {"g1": HEADS, "g2": KV, "g3": KV, "g4": HEADS, "g5": None}
FORMS = [(p, f) for p in POSITIONS for f in ("elementwise", "headwise") if (p, f) != ("g5", "headwise")]


def layer(cls=GatedAttention, **settings):
    torch.manual_seed(0)
    m = cls(D, **({"heads": HEADS, "kv_heads": KV} | settings)).double()
    for name, p in m.named_parameters():
        if not (settings.get("preserve") and "gate_proj" in name):
            nn.init.uniform_(p, 0.5, 1.5) if "norm" in name else nn.init.normal_(p, std=0.35)
    return m


def plain_twin(m: GatedAttention, **settings) -> Attention:
    plain = layer(Attention, **settings)
    missing, unexpected = plain.load_state_dict(m.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["gate_proj.weight"]
    return plain


def inputs(length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gate_equation(m: GatedAttention, factor: float = 1.0):
    """``what * sigmoid(W_g x_t)``: one row of W_g per channel of ``what``, or per head."""

    def gate(position, what, x_t):
        if position != m.position:
            return what
        logits = m.gate_proj.weight @ x_t
        g = factor / (1 + (-logits).exp())
        return what * (g.view(what.shape) if m.gate_form == "elementwise" else g[:, None])

    return gate


@pytest.mark.parametrize("settings", [{}, {"window": 3, "qk_norm": True}, {"preserve": True}, {"causal": False}], ids=str)
@pytest.mark.parametrize(("position", "gate_form"), FORMS)
def test_equals_the_equation_with_all_gradients(position, gate_form, settings, attention_equations):
    m, x = layer(position=position, gate_form=gate_form, **settings), inputs().requires_grad_()
    if settings.get("preserve"):
        nn.init.normal_(m.gate_proj.weight, std=0.35)
    factor = 2.0 if settings.get("preserve") else 1.0
    got, expected = m(x), attention_equations(m, x, gate=gate_equation(m, factor))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    mine, theirs = torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("position", "gate_form"), [f for f in FORMS if f[0] in ("g1", "g2", "g5")])
def test_zero_gate_weights_give_exactly_half(position, gate_form):
    m, x = layer(position=position, gate_form=gate_form), inputs()
    nn.init.zeros_(m.gate_proj.weight)
    torch.testing.assert_close(m(x), plain_twin(m)(x) / 2, rtol=0, atol=1e-15)


def test_zero_gate_weights_halve_the_scores_of_gated_queries_or_keys():
    x = inputs()
    for position in ("g3", "g4"):
        m = layer(position=position)
        nn.init.zeros_(m.gate_proj.weight)
        plain = plain_twin(m)
        with torch.no_grad():
            plain.q_proj.weight.mul_(0.5)
        torch.testing.assert_close(m(x), plain(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("settings", [{}, {"window": 3}, {"qk_norm": True, "rope": False}], ids=str)
@pytest.mark.parametrize(("position", "gate_form"), FORMS)
def test_open_gates_are_plain_attention(position, gate_form, settings):
    m, x = layer(position=position, gate_form=gate_form, **settings), inputs()
    # A gate has no bias: a channel that is 1 for all tokens stands in for it.
    x[..., 0] = 1.0
    with torch.no_grad():
        m.gate_proj.weight.zero_()[:, 0] = 50.0
    torch.testing.assert_close(m(x), plain_twin(m, **settings)(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("position", "gate_form"), FORMS)
def test_preserving_start_is_plain_attention_bit_for_bit_and_learns(position, gate_form):
    m, x = layer(position=position, gate_form=gate_form, preserve=True), inputs()
    assert not m.gate_proj.weight.any()
    assert torch.equal(m(x), plain_twin(m)(x))
    m(x).square().sum().backward()
    assert m.gate_proj.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("position", ["g1", "g2", "g3", "g4"])
def test_headwise_is_elementwise_with_each_row_repeated(position):
    headwise, elementwise = layer(position=position, gate_form="headwise"), layer(position=position)
    weights = headwise.state_dict()
    weights["gate_proj.weight"] = weights["gate_proj.weight"].repeat_interleave(WIDTH, 0)
    elementwise.load_state_dict(weights)
    torch.testing.assert_close(headwise(inputs()), elementwise(inputs()), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("position", "gate_form"), FORMS)
def test_parameters(position, gate_form):
    extra = sum(p.numel() for p in layer(position=position, gate_form=gate_form).parameters())
    extra -= sum(p.numel() for p in layer(Attention).parameters())
    heads = POSITIONS[position]
    assert extra == D * (D if heads is None else heads * (WIDTH if gate_form == "elementwise" else 1))


def test_the_gate_is_computed_from_its_own_token():
    m, x = layer(), inputs()
    with torch.no_grad():
        m.o_proj.weight.copy_(torch.eye(D))
    torch.testing.assert_close(m(x) / plain_twin(m)(x), torch.sigmoid(x @ m.gate_proj.weight.T), rtol=1e-10, atol=0)


@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 5]])
@pytest.mark.parametrize(("position", "gate_form"), FORMS)
def test_pieces_equal_whole_with_the_cache_of_plain_attention(position, gate_form, pieces):
    m, x = layer(position=position, gate_form=gate_form, window=4), inputs()
    state = m.init_state(2)
    with torch.no_grad():
        got = torch.cat([m(piece, state=state) for piece in x.split(pieces, 1)], 1)
        torch.testing.assert_close(got, m(x), rtol=0, atol=1e-12)
    assert state.nbytes == 2 * m.state_bytes(9) == 2 * layer(Attention, window=4).state_bytes(9)


@pytest.mark.parametrize(("position", "gate_form"), FORMS)
def test_kept_tokens_equal_all_tokens_and_only_their_gates_are_computed(position, gate_form):
    m, x = layer(position=position, gate_form=gate_form), inputs(16)
    keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    with torch.no_grad(), count_flops() as count:
        y = m(x, keep=keep)
    plain = layer(Attention)
    with torch.no_grad(), count_flops() as without:
        plain(x, keep=keep)
    torch.testing.assert_close(y[keep], m(x)[keep], rtol=0, atol=1e-13)
    assert not y[~keep].any()
    # Values and keys are gated for all tokens, everything else for the kept ones.
    gated = keep.numel() if position in ("g2", "g3") else int(keep.sum())
    assert count.total - without.total == gated * 2 * m.gate_proj.weight.numel()


def test_metric_is_the_mean_gate():
    m, x = layer(), inputs()
    m(x)
    found = metrics(m)
    assert set(found) == {"gate"}
    torch.testing.assert_close(found["gate"], torch.sigmoid(x @ m.gate_proj.weight.T).mean().detach(), rtol=0, atol=1e-14)
    assert not found["gate"].requires_grad
    m(x, keep=torch.zeros(2, 9, dtype=torch.bool))
    assert metrics(m) == {}


@pytest.mark.parametrize("position", ["g1", "g3", "g5"])
@pytest.mark.parametrize("kept", [False, True])
def test_metric_counts_the_real_computed_tokens(position, kept):
    m, x = layer(position=position), inputs()
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, :4] = False
    keep = torch.rand(2, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    assert (keep & real).any()
    assert (keep & ~real).any()
    m(x, mask=real, keep=keep if kept else None)
    counted = real & keep if kept and position != "g3" else real
    expected = torch.sigmoid(x @ m.gate_proj.weight.T)[counted].mean().detach()
    torch.testing.assert_close(metrics(m)["gate"], expected, rtol=0, atol=1e-13)


def test_initialisation_is_that_of_the_queries():
    torch.manual_seed(0)
    m = GatedAttention(128, heads=8)
    assert m.gate_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert m.gate_proj.weight.abs().max() > 0.06
    assert m.gate_proj.bias is None
    m(torch.randn(1, 20, 128))
    assert metrics(m)["gate"].item() == pytest.approx(0.5, abs=0.01)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^position g5 is behind the heads: it takes gate_form elementwise$"):
        layer(position="g5", gate_form="headwise")
    with pytest.raises(ValueError, match=r"^d_model 16 is not divisible by heads 3$"):
        layer(heads=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"position": "g6"}, "position must be g1, g2, g3, g4 or g5, got 'g6'"),
     ({"gate_form": "both"}, "gate_form must be elementwise or headwise, got 'both'")],
)
def test_unknown_names(settings, message):
    # The type checks of the test run would refuse these first: ask the constructor itself.
    make = getattr(GatedAttention.__init__, "__wrapped__", GatedAttention.__init__)
    with pytest.raises(ValueError, match=message):
        make(GatedAttention.__new__(GatedAttention), D, **settings)
