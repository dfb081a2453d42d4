"""Fourier attention against its equations, its rank, its periods, and one set of functions for all layers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from gatework.core import PartError, capability
from gatework.core.cost import count_flops
from gatework.mixers import FourierKArAt
from gatework.mixers.fourier_karat import FourierOperator, _Rows, universal

D, N = 6, 5
FORMS = [{"heads": 2, "rank": 3}, {"heads": 1, "rank": 7, "grid_size": 1}, {"heads": 3, "rank": 1, "grid_size": 4}]


def layer(**settings) -> FourierKArAt:
    torch.manual_seed(0)
    m = FourierKArAt(D, N, **settings).double()
    with torch.no_grad():
        for p in (m.q_proj, m.k_proj, m.v_proj, m.o_proj):
            p.weight.normal_(std=0.5)
        m.operator.projection.normal_(std=0.3)
    return m


def inputs(batch: int = 3) -> Tensor:
    return torch.randn(batch, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def equations(m: FourierKArAt, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every function of every score, one by one."""
    width, (a, b, w) = D // m.heads, (m.operator.cosine, m.operator.sine, m.operator.projection)
    grid_size, rank = a.shape[1], a.shape[3]
    rows = []
    for i in range(len(x)):
        real = [j for j in range(N) if mask is None or mask[i, j]]
        outputs = []
        for t in range(N):
            heads = []
            for h in range(m.heads):
                part = slice(h * width, (h + 1) * width)
                q = m.q_proj.weight[part] @ x[i, t]
                phi = [torch.zeros((), dtype=torch.float64) for _ in range(rank)]
                for j in real:
                    s = q @ (m.k_proj.weight[part] @ x[i, j]) / math.sqrt(width)
                    for p in range(rank):
                        for k in range(1, grid_size + 1):
                            phi[p] = phi[p] + a[h, k - 1, j, p] * (k * s).cos() + b[h, k - 1, j, p] * (k * s).sin()
                read = torch.zeros(width, dtype=torch.float64)
                for j in real:
                    attention = sum(w[h, j, p] * phi[p] for p in range(rank))
                    read = read + attention * (m.v_proj.weight[part] @ x[i, j])
                heads.append(read)
            outputs.append(m.o_proj.weight @ torch.cat(heads))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_equals_the_equations_with_all_gradients(settings, masked):
    m, x = layer(**settings), inputs().requires_grad_()
    mask = MASK if masked else None
    where = MASK if masked else torch.ones_like(MASK)
    got, expected = m(x, mask=mask)[where], equations(m, x, mask)[where]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("masked", [False, True])
def test_the_backward_pass_is_the_derivative(masked):
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    coefficients = [torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    real = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]], dtype=torch.float64)[:, None, None] if masked else None
    assert torch.autograd.gradcheck(_Rows.apply, (scores, *coefficients, real))


def test_it_keeps_the_scores_and_no_harmonics():
    operator, kept = FourierOperator(2, 16, 3, 5), []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    scores, values = torch.randn(4, 2, 16, 16, requires_grad=True), torch.randn(4, 2, 16, 8)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        operator(scores, values)
    assert kept.count((4, 2, 16, 16)) == 1


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_the_rank_of_an_attention_matrix_is_at_most_r(rank):
    torch.manual_seed(0)
    operator = FourierOperator(2, 16, rank, 3).double()
    scores, values = torch.randn(3, 2, 16, 16, dtype=torch.float64), torch.randn(3, 2, 16, 4, dtype=torch.float64)
    matrix = operator.matrix(scores)
    assert torch.linalg.matrix_rank(matrix, rtol=1e-9).eq(rank).all()
    torch.testing.assert_close(operator(scores, values), matrix @ values, rtol=0, atol=1e-12)


def test_scores_count_up_to_a_period_and_w_is_linear():
    torch.manual_seed(0)
    operator = FourierOperator(1, 6, 4, 3).double()
    scores, values = torch.randn(2, 1, 6, 6, dtype=torch.float64), torch.randn(2, 1, 6, 4, dtype=torch.float64)
    y = operator(scores, values)
    turns = torch.randint(-3, 4, scores.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(operator(scores + 2 * math.pi * turns.double(), values), y, rtol=0, atol=1e-12)
    assert (operator(scores + 1.0, values) - y).abs().max() > 1e-2
    with torch.no_grad():
        operator.projection.mul_(3)
    torch.testing.assert_close(operator(scores, values), 3 * y, rtol=0, atol=1e-12)


def test_parameters_and_their_start():
    torch.manual_seed(0)
    m = FourierKArAt(32, 50, heads=2, rank=12, grid_size=3)
    assert sum(p.numel() for p in m.operator.parameters()) == 2 * (2 * 50 * 12 * 3 + 50 * 12)
    assert sum(p.numel() for p in m.parameters()) == 4 * 32 * 32 + 2 * 50 * 12 * 7
    for p in (m.operator.cosine, m.operator.sine):
        assert p.std().item() == pytest.approx(1, rel=0.05)
    # Rows of attention have length 1, so heads are as large as their values.
    rows = m.operator.matrix(torch.randn(64, 2, 50, 50)).square().sum(-1)
    assert rows.mean().item() == pytest.approx(1, rel=0.2)


def test_the_products_are_those_of_the_factors():
    m, batch = FourierKArAt(32, 50, heads=2, rank=12, grid_size=3), 4
    with torch.no_grad(), count_flops() as count:
        m(torch.randn(batch, 50, 32))
    projections = 4 * 2 * 50 * 32 * 32
    scores = 2 * 50 * 50 * 32
    rows = 2 * 2 * (2 * 3) * 50 * 50 * 12
    factors = 2 * 2 * 50 * 12 * 32
    assert count.total == batch * (projections + scores + rows + factors)


def test_outputs_that_are_not_kept_are_0():
    m, x = layer(heads=2), inputs()
    torch.testing.assert_close(m(x, keep=MASK), torch.where(MASK[..., None], m(x), 0), rtol=0, atol=0)
    assert m(x[:0]).shape == (0, N, D)


def test_huge_scores_stay_finite():
    m, x = layer(heads=2).float(), (1e3 * inputs().float()).requires_grad_()
    m(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in m.parameters())


class Layers(nn.Module):
    def __init__(self, *layers: FourierKArAt) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for m in self.layers:
            x = x + m(x)
        return x


def test_universal_layers_share_their_functions_and_nothing_else():
    torch.manual_seed(0)
    model = Layers(*(FourierKArAt(D, N, heads=2, rank=3) for _ in range(3))).double()
    for m in model.layers:
        nn.init.normal_(m.q_proj.weight, std=0.5)
    first = copy.deepcopy(model.layers[0].operator)
    before, own = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in first.parameters())
    assert universal(model) == 3
    assert sum(p.numel() for p in model.parameters()) == before - 2 * own
    assert {m.operator for m in model.layers} == {model.layers[0].operator}
    for a, b in zip(model.layers[0].operator.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)
    # Its gradient is the sum of what three layers of their own would have.
    alone = copy.deepcopy(model)
    for m in alone.layers:
        m.operator = copy.deepcopy(m.operator)
    for some in (model, alone):
        some(inputs()).square().sum().backward()
    for name in ("cosine", "sine", "projection"):
        total = sum(getattr(m.operator, name).grad for m in alone.layers)
        torch.testing.assert_close(getattr(model.layers[0].operator, name).grad, total, rtol=0, atol=1e-11)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.layers[2].operator is other.layers[0].operator
    fresh = Layers(*(FourierKArAt(D, N, heads=2, rank=3) for _ in range(3))).double()
    universal(fresh)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(inputs()), model(inputs()), rtol=0, atol=0)


def test_what_cannot_share_says_why():
    with pytest.raises(PartError, match="there is no FourierKArAt layer"):
        universal(nn.Linear(2, 2))
    with pytest.raises(PartError, match="give all the same heads, rank and grid_size"):
        universal(Layers(FourierKArAt(D, N, heads=2), FourierKArAt(D, N, heads=3)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 4}, "d_model 6 is not divisible by heads 4"),
        ({"heads": 2, "rank": 0}, "at least 1, got 5, 0 and 3"),
        ({"heads": 2, "grid_size": 0}, "at least 1, got 5, 12 and 0"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    with pytest.raises(ValueError, match=message):
        FourierKArAt(D, N, **settings)


def test_wrong_calls_meet_one_sentence():
    m, x = layer(heads=2), inputs()
    with pytest.raises(PartError, match="was built for 5 tokens, not 4"):
        m(x[:, 1:])
    with pytest.raises(PartError, match="takes no segments"):
        m(x, segments=torch.zeros(3, N, dtype=torch.long))
    for ask in (lambda: m.init_state(2), lambda: m.state_bytes(3)):
        with pytest.raises(PartError, match="it has no decoding state"):
            ask()
    assert not any(capability(m, name) for name in ("causal", "decodes", "packs", "keeps", "any_length"))


def test_a_classifier_gives_it_its_tokens():
    from gatework.models import Classifier

    model = Classifier((1, 8, 8), 3, backbone="vit", d_model=16, heads=4, mixer="fourier_karat(rank=4)")
    assert [block.mixer.tokens for block in model.blocks] == [16, 16]
    universal(model)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_language_model_refuses_it():
    from gatework.models import Decoder

    with pytest.raises(PartError, match="a language model needs a causal mixer"):
        Decoder(16, d_model=8, layers=1, heads=2, mixer="fourier_karat(tokens=8)")
