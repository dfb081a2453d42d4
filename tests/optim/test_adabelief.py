from __future__ import annotations

import copy
import io
import math

import pytest
import torch

from gatework.core import PartError, build
from gatework.optim import AdaBelief

# Problem A: f = 1.5 x^2 from x = 1. Problem B: f = 0.5 sum a x^2, a = (1, 10 | 4), from (1, -2 | 0.5).
VECTORS = {
    "A": {
        "plain": [[0.998888888888889], [0.997720921773212]],
        "rectify": [[0.997], [0.994004736842105]],
        "wd": [[0.998788888888889], [0.997521046293928]],
    },
    "B": {
        "plain": [
            [0.998888888888889, -1.99888888888889, 0.498888888888889],
            [0.997720921773212, -1.99772090290217, 0.497720959877737],
        ],
        "rectify": [[0.999, -1.98, 0.498], [0.99800052631579, -1.96010526315789, 0.496004210526316]],
        "wd": [
            [0.998788888888889, -1.99868888888889, 0.498838888888889],
            [0.997521046293929, -1.99732103740117, 0.497621079441998],
        ],
    },
}
SERIES = {
    False: [0.888945253079249, 0.79492414171073, 0.784612264611666, 0.763052395262205, 0.738319807462384],
    True: [0.888945253079249, 0.822137048338323, 0.812741610055221, 0.798475672428332, 0.786886214096861],
}
OPTIONS = [
    {"rectify": False},
    {"rectify": True},
    {"rectify": True, "degenerated_to_sgd": False},
    {"rectify": False, "amsgrad": True},
    {"rectify": True, "amsgrad": True},
    {"rectify": False, "weight_decay": 0.1},
    {"rectify": True, "weight_decay": 0.01, "decay": "fixed"},
    {"rectify": False, "weight_decay": 0.1, "decay": "l2"},
    {"rectify": True, "betas": (0.5, 0.6), "eps": 1e-8},
    {"rectify": False, "betas": (0.0, 0.99), "eps": 1e-4},
]


def reference(x, gradients, *, lr, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, decay="decoupled", rectify=True,
              degenerated_to_sgd=True, amsgrad=False):  # fmt: skip
    """The equations of the paper, one number at a time."""
    b1, b2 = betas
    m = s = largest = 0.0
    for t, g in enumerate(gradients, 1):
        if decay == "decoupled":
            x = x - lr * weight_decay * x
        elif decay == "fixed":
            x = x - weight_decay * x
        else:
            g = g + weight_decay * x
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        largest = max(largest, s)
        used = largest if amsgrad else s
        m_hat = m / (1 - b1**t)
        if not rectify:
            x = x - lr * m_hat / (math.sqrt(used) / math.sqrt(1 - b2**t) + eps)
            continue
        n_inf = 2 / (1 - b2) - 1
        n = n_inf - 2 * t * b2**t / (1 - b2**t)
        if n >= 5:
            r = math.sqrt((n - 4) * (n - 2) * n_inf / ((n_inf - 4) * (n_inf - 2) * n))
            x = x - lr * m_hat * r * math.sqrt(1 - b2**t) / (math.sqrt(used) + eps)
        elif degenerated_to_sgd:
            x = x - lr * m_hat
    return x


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (1,), (3,), (2, 3), (4, 1, 2), (0,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def feed(params, step, skip=()):
    generator = torch.Generator().manual_seed(100 + step)
    for index, p in enumerate(params):
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = None if index in skip else gradient.to(p.dtype)


def vector(params):
    return torch.cat([p.detach().flatten().double() for p in params])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("case", ["plain", "rectify", "wd"])
@pytest.mark.parametrize("problem", ["A", "B"])
def test_published_vectors(problem, case, foreach):
    if problem == "A":
        starts, curvature = [[1.0]], [[3.0]]
    else:
        starts, curvature = [[1.0, -2.0], [0.5]], [[1.0, 10.0], [4.0]]
    params = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    optimizer = AdaBelief(params, rectify=case == "rectify", weight_decay=0.1 if case == "wd" else 0.0, foreach=foreach)
    for expected in VECTORS[problem][case]:
        for p, a in zip(params, curvature, strict=True):
            p.grad = torch.tensor(a, dtype=torch.float64) * p.detach()
        optimizer.step()
        torch.testing.assert_close(vector(params), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_published_series_that_exercises_the_maximum(amsgrad):
    p = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = AdaBelief([p], lr=0.1, betas=(0.9, 0.5), eps=1e-3, rectify=False, amsgrad=amsgrad)
    for gradient, expected in zip([3, 0.1, -2, 0.5, 0.05], SERIES[amsgrad], strict=True):
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        assert abs(p.item() - expected) < 1e-10


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_equations(options, foreach):
    params = parameters()
    start = vector(params)
    optimizer = AdaBelief(params, lr=0.02, foreach=foreach, **options)
    gradients = []
    for step in range(12):
        feed(params, step)
        gradients.append(torch.cat([p.grad.flatten() for p in params]))
        optimizer.step()
    expected = [reference(x, [g[i].item() for g in gradients], lr=0.02, **options) for i, x in enumerate(start.tolist())]
    torch.testing.assert_close(vector(params), torch.tensor(expected, dtype=torch.float64), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_multi_tensor_equals_the_plain_loop(options):
    runs = []
    for foreach in (True, False):
        params = parameters()
        optimizer = AdaBelief(params, lr=0.02, foreach=foreach, **options)
        for step in range(12):
            feed(params, step, skip={2} if step < 3 else ())
            optimizer.step()
        runs.append(vector(params))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=1e-12)


def test_first_plain_step_is_lr_over_beta1_times_the_sign():
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = AdaBelief([p], lr=0.01, betas=(0.8, 0.999), eps=0.0, rectify=False)
    p.grad = torch.tensor([1e-3, -5.0, 100.0, -1e-2], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(p.detach(), -0.01 / 0.8 * p.grad.sign(), rtol=1e-12, atol=0)


def test_scale_invariant_without_eps_and_steps_grow_under_a_constant_gradient():
    moves = []
    for scale in (1.0, 1e4):
        p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
        optimizer = AdaBelief([p], eps=0.0, rectify=False)
        steps = []
        for _ in range(20):
            before = p.item()
            p.grad = torch.tensor(scale, dtype=torch.float64)
            optimizer.step()
            steps.append(before - p.item())
        moves.append(steps)
    torch.testing.assert_close(torch.tensor(moves[0]), torch.tensor(moves[1]), rtol=1e-10, atol=0)
    assert all(later > earlier for earlier, later in zip(moves[0], moves[0][1:], strict=False))


def test_rectification_starts_at_the_sixth_step():
    """For beta2 = 0.999, n = 4.996 at t = 5; before that the steps are none (or those of SGD)."""
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = AdaBelief([p], degenerated_to_sgd=False)
    moved = []
    for gradient in (1.0, -0.5, 2.0, 0.3, 1.0, 0.7):
        before = p.item()
        p.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        moved.append(p.item() != before)
    assert moved == [False] * 5 + [True]


def test_steps_are_counted_per_parameter():
    """A parameter whose gradients start late goes the way it would have gone alone."""
    late, alone = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    early = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    together, single = AdaBelief([early, late], lr=0.1), AdaBelief([alone], lr=0.1)
    for step in range(10):
        early.grad = torch.full_like(early, 0.3 + step)
        if step >= 4:
            late.grad, alone.grad = (torch.full_like(late, math.sin(step)) for _ in range(2))
            single.step()
        together.step()
    assert torch.equal(late, alone)
    assert together.state[early]["step"] == 10
    assert together.state[late]["step"] == 6


def test_groups_have_their_own_hyper_parameters():
    a, b, alone = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    grouped = AdaBelief([{"params": [a]}, {"params": [b], "lr": 0.3, "rectify": False, "betas": (0.5, 0.9)}], lr=0.1)
    single = AdaBelief([alone], lr=0.3, rectify=False, betas=(0.5, 0.9))
    for step in range(5):
        for p in (a, b, alone):
            p.grad = torch.full_like(p, math.cos(step))
        grouped.step()
        single.step()
    assert torch.equal(b, alone)
    assert not torch.equal(a, b)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_resumes_bit_for_bit(dtype, foreach):
    params = parameters(dtype)
    optimizer = AdaBelief(params, lr=0.05, amsgrad=True, weight_decay=0.1, foreach=foreach)
    for step in range(7):
        feed(params, step, skip={1} if step < 2 else ())
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = AdaBelief(others, lr=1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(7, 14):
        for ps, o in ((params, optimizer), (others, resumed)):
            feed(ps, step)
            o.step()
    for p, other in zip(params, others, strict=True):
        assert torch.equal(p, other)
    for p, other in zip(params, others, strict=True):
        for name, value in optimizer.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[other][name])), name


def test_a_loaded_state_shares_no_memory_with_its_source():
    params = parameters()
    optimizer = AdaBelief(params)
    feed(params, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    other = AdaBelief([torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(optimizer.state_dict())
    feed(other.param_groups[0]["params"], 1)
    other.step()
    for key, state in before["state"].items():
        assert torch.equal(state["exp_avg"], optimizer.state_dict()["state"][key]["exp_avg"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_have_float32_states_and_updates(dtype):
    low = parameters(dtype)
    wide = [torch.nn.Parameter(p.detach().float()) for p in low]
    ours, theirs = AdaBelief(low, lr=0.1, rectify=False), AdaBelief(wide, lr=0.1, rectify=False)
    for step in range(4):
        feed(low, step)
        for p, q in zip(low, wide, strict=True):
            q.data.copy_(p.detach())  # The float32 run starts each step at the rounded values.
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        for p, q in zip(low, wide, strict=True):
            assert torch.equal(p.detach(), q.detach().to(dtype))
            assert torch.equal(ours.state[p]["exp_avg_var"], theirs.state[q]["exp_avg_var"])
            assert ours.state[p]["exp_avg_var"].dtype == torch.float32


@pytest.mark.parametrize("foreach", [True, False])
def test_complex_parameters_are_pairs_of_real_ones(foreach):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
    z, pair = torch.nn.Parameter(torch.view_as_complex(values.clone())), torch.nn.Parameter(values.clone())
    options = {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1, "rectify": False, "foreach": foreach}
    first, second = AdaBelief([z], **options), AdaBelief([pair], **options)
    for step in range(5):
        gradient = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
        lazy = torch.view_as_complex(gradient * torch.tensor([1.0, -1.0])).conj()  # A gradient with the conjugate bit set.
        z.grad = lazy if step % 2 else torch.view_as_complex(gradient.clone())
        pair.grad = gradient
        first.step()
        second.step()
    assert torch.equal(torch.view_as_real(z), pair)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    dense = torch.nn.Parameter(torch.ones(2))
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = AdaBelief([dense, *embedding.parameters()])
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="AdaBelief does not take sparse gradients"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(2))
    assert not optimizer.state


def test_gradients_are_left_alone_and_expanded_ones_work():
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = AdaBelief([p], weight_decay=0.1, decay="l2")
    gradient = torch.tensor(0.5, dtype=torch.float64).expand(3, 2)
    p.grad = gradient
    optimizer.step()
    assert torch.equal(gradient, torch.full((3, 2), 0.5, dtype=torch.float64))
    assert torch.unique(p.detach()).numel() == 1


def test_closure_is_evaluated_with_gradients():
    p = torch.nn.Parameter(torch.ones(()))
    optimizer = AdaBelief([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p**2
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert p.item() == pytest.approx(0.8)  # The first rectified step is one of SGD: 1 - 0.1 * 2.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": math.nan}, "lr must be at least 0, got nan"),
        ({"lr": math.inf}, "lr must be at least 0, got inf"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, r"betas are two numbers, got \(0.9,\)"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"decay": "L2"}, "decay is one of decoupled, fixed, l2, got 'L2'"),
    ],
)
def test_wrong_hyper_parameters_are_refused(options, sentence):
    p = torch.nn.Parameter(torch.ones(1))
    if options.keys() <= {"lr", "eps", "weight_decay"}:  # The types of the others are checked first, where annotations are.
        with pytest.raises(ValueError, match=sentence):
            AdaBelief([p], **options)
    with pytest.raises(ValueError, match=sentence):
        AdaBelief([{"params": [p], **options}])


def test_builds_from_an_expression():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = build("adabelief(betas=(0.9, 0.99), decay=fixed, rectify=False)", "optim", params=[p], lr=0.5)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["decay"], group["rectify"]) == (0.5, (0.9, 0.99), "fixed", False)
    with pytest.raises(PartError, match="adabelief: lr must be at least 0"):
        build("adabelief(lr=-1.0)", "optim", params=[p])
