import pytest
import torch

from gatework.ops.estimators import (
    gumbel_noise,
    gumbel_softmax,
    reinmax,
    ste_bernoulli,
    ste_round,
    ste_sign,
    straight_through,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_straight_through_has_exactly_the_hard_value_and_the_soft_gradient(dtype):
    soft = torch.rand(1000, generator=seeded()).to(dtype).requires_grad_()
    hard = torch.where(soft.detach() > 0.5, 1.0, -0.0).to(dtype)
    y = straight_through(hard, soft)
    assert y.dtype == dtype
    assert torch.equal(y, hard)
    assert torch.equal(y.signbit(), hard.signbit())
    weight = torch.randn(1000, generator=seeded(1)).to(dtype)
    y.backward(weight)
    assert torch.equal(soft.grad, weight)


def test_the_usual_expression_is_not_exact():
    soft, hard = torch.rand(1000, generator=seeded()), torch.ones(1000)
    assert not torch.equal(hard + soft - soft, hard)
    assert torch.equal(straight_through(hard, soft), hard)


def test_straight_through_takes_any_hard_dtype_and_gives_it_no_gradient():
    soft = torch.rand(4, requires_grad=True)
    assert straight_through(torch.tensor([True, False, True, True]), soft).tolist() == [1, 0, 1, 1]
    hard = torch.ones(4, requires_grad=True)
    straight_through(hard, soft).sum().backward()
    assert hard.grad is None
    assert straight_through(torch.full((4,), float("inf")), soft).isinf().all()


def test_straight_through_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"hard has shape \(3,\), soft \(4,\); they must be equal"):
        straight_through(torch.ones(3), torch.ones(4))


def test_straight_through_copies():
    hard = torch.ones(3)
    straight_through(hard, torch.zeros(3)).mul_(2)
    assert torch.equal(hard, torch.ones(3))


def test_straight_through_differentiates_twice():
    # y = x^2 + (hard - x^2): the second derivative of sum(y^3) is that of 3 hard^2 * 2x, taken through the same rule.
    x = torch.tensor([1.5, -2.0], dtype=torch.float64, requires_grad=True)
    y = straight_through(torch.tensor([2.0, 4.0], dtype=torch.float64), x.square())
    (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    assert torch.equal(first, 3 * torch.tensor([4.0, 16.0]) * 2 * x)
    (second,) = torch.autograd.grad(first.sum(), x)
    hard = torch.tensor([2.0, 4.0], dtype=torch.float64)
    assert torch.equal(second, 6 * hard * (2 * x) * (2 * x) + 3 * hard.square() * 2)


def test_ste_round():
    x = torch.tensor([-1.5, -0.4, 0.5, 1.5, 2.5, 1e9 + 0.3], requires_grad=True)
    y = ste_round(x)
    assert y.tolist() == [-2, 0, 0, 2, 2, 1e9]
    y.backward(torch.arange(6.0))
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 5]


def test_ste_sign():
    x = torch.tensor([-2.0, -1.0, -0.0, 0.0, 0.3, 1.0, 1.5], requires_grad=True)
    y = ste_sign(x)
    assert y.tolist() == [-1, -1, 1, 1, 1, 1, 1]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    for clip, want in ((0.5, [0, 0, 1, 1, 1, 0, 0]), (None, [1] * 7)):
        (grad,) = torch.autograd.grad(ste_sign(x, clip).sum(), x)
        assert grad.tolist() == want


def test_ste_bernoulli_with_given_noise():
    probs = torch.tensor([0.0, 0.3, 0.3, 1.0], requires_grad=True)
    y = ste_bernoulli(probs, noise=torch.tensor([0.0, 0.29, 0.3, 0.999]))
    assert y.tolist() == [0, 1, 0, 1]
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert probs.grad.tolist() == [1, 2, 3, 4]


def test_ste_bernoulli_frequency_and_seed():
    probs = torch.full((200_000,), 0.3)
    y = ste_bernoulli(probs, generator=seeded())
    assert abs(y.mean().item() - 0.3) < 4 * (0.21 / 200_000) ** 0.5
    assert torch.equal(y, ste_bernoulli(probs, generator=seeded()))


def test_gumbel_noise_has_the_moments_of_the_distribution():
    g = gumbel_noise(torch.empty(400_000, dtype=torch.bfloat16), seeded())
    assert g.dtype == torch.float32
    assert g.isfinite().all()
    assert abs(g.mean().item() - 0.5772157) < 4 * (1.6449 / 400_000) ** 0.5
    assert abs(g.var().item() - 1.6449341) < 0.02
    assert gumbel_noise(torch.empty(3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
def test_gumbel_softmax_equals_the_formula(hard, tau):
    logits = torch.randn(6, 4, dtype=torch.float64, generator=seeded()).requires_grad_()
    noise = torch.randn(6, 4, dtype=torch.float64, generator=seeded(1))
    weight = torch.randn(6, 4, dtype=torch.float64, generator=seeded(2))
    y = gumbel_softmax(logits, tau, hard=hard, noise=noise)
    (y * weight).sum().backward()
    e = torch.exp((logits.detach() + noise) / tau)
    p = e / e.sum(1, keepdim=True)
    want = torch.eye(4, dtype=torch.float64)[p.argmax(1)] if hard else p
    torch.testing.assert_close(y.detach(), want, rtol=0 if hard else 1e-13, atol=0 if hard else 1e-15)
    # The Jacobian of a softmax, row by row: (diag(p) - p p^T) / tau.
    for n in range(6):
        jacobian = (torch.diag(p[n]) - torch.outer(p[n], p[n])) / tau
        torch.testing.assert_close(logits.grad[n], jacobian @ weight[n], rtol=1e-11, atol=1e-14)


def test_gumbel_softmax_samples_the_categorical_at_any_temperature():
    logits = torch.tensor([0.0, 1.0, -0.5])
    for tau in (0.1, 5.0):
        y = gumbel_softmax(logits.expand(200_000, 3), tau, hard=True, generator=seeded())
        torch.testing.assert_close(y.mean(0), logits.softmax(0), rtol=0, atol=0.005)


def test_gumbel_softmax_of_equal_scores_takes_the_first():
    y = gumbel_softmax(torch.zeros(2, 3), hard=True, noise=torch.zeros(2, 3))
    assert y.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert gumbel_softmax(torch.zeros(2, 3), hard=True, dim=0, noise=torch.zeros(2, 3)).tolist() == [[1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gumbel_softmax_is_exactly_one_hot_in_half_precision(dtype):
    y = gumbel_softmax(torch.randn(500, 5, generator=seeded()).to(dtype), 0.7, hard=True, generator=seeded())
    assert y.dtype == dtype
    assert ((y == 0).sum(1) == 4).all()
    assert ((y == 1).sum(1) == 1).all()


def expected_gradient(estimator, logits, objective):
    """The exact expectation over the sample: each category forced by noise, weighted by its probability."""
    total = torch.zeros_like(logits)
    for k, p in enumerate(logits.softmax(0)):
        v = logits.clone().requires_grad_()
        sample = estimator(v, torch.zeros_like(logits).index_fill_(0, torch.tensor(k), 100.0))
        assert torch.equal(sample.detach(), torch.eye(len(logits), dtype=logits.dtype)[k])
        (grad,) = torch.autograd.grad(objective(sample), v)
        total += p * grad
    return total


def test_reinmax_is_exact_for_quadratic_functions_and_straight_through_only_for_linear_ones():
    logits = torch.randn(4, dtype=torch.float64, generator=seeded())
    matrix = torch.randn(4, 4, dtype=torch.float64, generator=seeded(1))
    vector = torch.randn(4, dtype=torch.float64, generator=seeded(2))

    def true_gradient(objective):
        p = logits.clone().requires_grad_()
        values = torch.stack([objective(row) for row in torch.eye(4, dtype=torch.float64)])
        return torch.autograd.grad((p.softmax(0) * values).sum(), p)[0]

    def plain(v, noise):
        p = v.softmax(0)
        return straight_through(torch.eye(4, dtype=v.dtype)[(v + noise).argmax()], p)

    def quadratic(d):
        return d @ matrix @ d + vector @ d

    def linear(d):
        return vector @ d

    def second_order(v, noise):
        return reinmax(v, noise=noise)

    cases = [(second_order, linear, True), (second_order, quadratic, True), (plain, linear, True), (plain, quadratic, False)]
    for estimator, objective, exact in cases:
        difference = (expected_gradient(estimator, logits, objective) - true_gradient(objective)).abs().max()
        assert (difference < 1e-14) == exact


def test_reinmax_samples_with_its_own_noise():
    y = reinmax(torch.tensor([0.0, 1.0, -0.5]).expand(100_000, 3), generator=seeded())
    torch.testing.assert_close(y.mean(0), torch.tensor([0.0, 1.0, -0.5]).softmax(0), rtol=0, atol=0.006)


@pytest.mark.compile
def test_compiled_equals_eager():
    def f(x, noise):
        return gumbel_softmax(x, 0.5, hard=True, noise=noise).square() * x + ste_round(x) + ste_sign(x)

    x, noise = torch.randn(16, 4), torch.randn(16, 4)
    grads = []
    for g in (f, torch.compile(f, fullgraph=True)):
        v = x.clone().requires_grad_()
        y = g(v, noise)
        grads.append((y.detach(), torch.autograd.grad(y.sum(), v)[0]))
    torch.testing.assert_close(*grads)
