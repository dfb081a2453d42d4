from __future__ import annotations

import io
import math
from itertools import chain, pairwise

import pytest
import torch

from gatework.core import PartError, build, capability
from gatework.optim import Cosine, DAdaptAdam

#: From the method's specification: (1 or 3 coordinates after steps 1 and 2).
VECTORS = {
    ("A", 0.0): [[0.999996837722673], [0.999992588131652]],
    ("A", 0.1): [[0.999996837722662], [0.999992588131631]],
    ("B", 0.0): [
        [0.99999683772334, -1.99999683772239, 0.49999683772284],
        [0.999992588132953, -1.99999258813092, 0.499992588132328],
    ],
}
OPTIONS = [
    {},
    {"lr": 0.5, "betas": (0.8, 0.95), "eps": 1e-4},
    {"bias_correction": True, "d0": 1e-3},
    {"weight_decay": 0.3, "d0": 1e-2},
    {"weight_decay": 0.3, "decay": "decoupled", "d0": 1e-2},
    {"growth_rate": 1.1, "d0": 1e-2},
    {"betas": (0.0, 0.9), "lr": 3.0},
]


class Reference:
    """The method's equations, one number at a time; a group is a list of coordinates with its own rate."""

    def __init__(self, groups, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decay="l2", bias_correction=False, d0=1e-6,
                 growth_rate=math.inf):  # fmt: skip
        self.groups = groups
        self.betas, self.eps, self.weight_decay, self.decay = betas, eps, weight_decay, decay
        self.bias_correction, self.growth_rate = bias_correction, growth_rate
        self.d, self.n, self.t = d0, 0.0, 0
        self.m, self.v, self.s = ([[0.0] * len(xs) for xs in groups] for _ in range(3))

    def step(self, gradients, rates):
        b1, b2 = self.betas
        q = b2**0.5
        lr = max(rates)
        e = self.d * lr
        if self.bias_correction:
            e *= (1 - b2 ** (self.t + 1)) ** 0.5 / (1 - b1 ** (self.t + 1))
        inner = length = 0.0
        moves = []
        for k, (xs, gs, rate) in enumerate(zip(self.groups, gradients, rates, strict=True)):
            if rate == 0:
                continue
            r = rate / lr
            for i, g in enumerate(gs):
                if g is None:
                    continue
                if self.decay == "l2":
                    g = g + self.weight_decay * xs[i]
                inner += r * e * g * self.s[k][i] / (self.v[k][i] ** 0.5 + self.eps)
                self.m[k][i] = b1 * self.m[k][i] + r * e * (1 - b1) * g
                self.v[k][i] = b2 * self.v[k][i] + (1 - b2) * g * g
                self.s[k][i] = q * self.s[k][i] + e * (1 - q) * g
                length += r * abs(self.s[k][i])
                moves.append((k, i, r))
        if length == 0:
            return
        for k, i, r in moves:
            if self.decay == "decoupled":
                self.groups[k][i] *= 1 - r * e * self.weight_decay
            self.groups[k][i] -= self.m[k][i] / (self.v[k][i] ** 0.5 + self.eps)
        self.n = q * self.n + (1 - q) * inner
        self.d = max(self.d, min(self.n / ((1 - q) * length), self.growth_rate * self.d))
        self.t += 1


def parameters(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(), (3,), (2, 3), (4, 1, 2), (0,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params, step):
    """Mostly of one sign, so that d grows."""
    generator = torch.Generator().manual_seed(100 + step)
    return [(0.5 + torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype) for p in params]


def feed(params, step, skip=()):
    for index, (p, g) in enumerate(zip(params, gradients(params, step), strict=True)):
        p.grad = None if index in skip else g


def vector(params):
    return torch.cat([p.detach().flatten().double() for p in params])


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("problem", "decay"), VECTORS, ids=str)
def test_published_vectors(problem, decay, foreach):
    """f = 1.5 x^2 from 1, and f = (x^2 + 10 y^2 + 4 z^2) / 2 in two tensors; to 1e-13, as the steps are of 1e-6."""
    starts, curvature = ([[1.0]], [[3.0]]) if problem == "A" else ([[1.0, -2.0], [0.5]], [[1.0, 10.0], [4.0]])
    params = [torch.nn.Parameter(torch.tensor(start, dtype=torch.float64)) for start in starts]
    optimizer = DAdaptAdam(params, weight_decay=decay, foreach=foreach)
    for expected in VECTORS[problem, decay]:
        for p, a in zip(params, curvature, strict=True):
            p.grad = torch.tensor(a, dtype=torch.float64) * p.detach()
        optimizer.step()
        torch.testing.assert_close(vector(params), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_equations(options, foreach):
    """Under a schedule with a pause, two groups of different rates of which one joins late, and missing gradients."""
    params = parameters()
    options = dict(options)
    lr = options.pop("lr", 1.0)
    optimizer = DAdaptAdam([{"params": params[:2]}, {"params": params[2:]}], lr=lr, foreach=foreach, **options)
    groups = [[p.detach().flatten().tolist() for p in ps] for ps in (params[:2], params[2:])]
    reference = Reference([list(chain(*group)) for group in groups], **options)
    start = optimizer.param_groups[0]["d"]
    for step in range(40):
        factor = 0.0 if step == 7 else 1 - step / 80
        rates = [lr * factor, 0.0 if step < 4 else lr * factor * (0.3 if step < 20 else 1.0)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        skipped = {2} if step in (5, 6, 11) else set()
        feed(params, step, skipped)
        given = gradients(params, step)
        flat = [[None] * g.numel() if i in skipped else g.flatten().tolist() for i, g in enumerate(given)]
        if max(rates) > 0:
            reference.step([chain(*flat[:2]), chain(*flat[2:])], rates)
        optimizer.step()
    expected = torch.tensor(list(chain(*reference.groups)), dtype=torch.float64)
    torch.testing.assert_close(vector(params), expected, rtol=1e-11, atol=1e-13)
    for group in optimizer.param_groups:
        assert group["d"] == pytest.approx(reference.d, rel=1e-11)
        assert group["numerator"] == pytest.approx(reference.n, rel=1e-9)
        assert group["steps"] == reference.t == 39
    assert reference.d > 1.5 * start, "the comparison says little where d does not grow"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_multi_tensor_equals_the_plain_loop(options):
    runs = []
    for foreach in (True, False):
        params = parameters()
        optimizer = DAdaptAdam(params, foreach=foreach, **options)
        for step in range(12):
            feed(params, step, skip={2} if step < 3 else ())
            optimizer.step()
        runs.append((vector(params), optimizer.param_groups[0]["d"], optimizer.param_groups[0]["numerator"]))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=0, atol=1e-12)
    assert runs[0][1:] == runs[1][1:]


def test_one_group_is_the_same_as_many():
    runs = []
    for grouped in (True, False):
        params = parameters()
        optimizer = DAdaptAdam([{"params": [p]} for p in params] if grouped else params)
        for step in range(30):
            feed(params, step)
            optimizer.step()
        assert len({group["d"] for group in optimizer.param_groups}) == 1
        runs.append(vector(params))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=0)
    assert not capability(DAdaptAdam, "separable")


def test_d_never_falls_and_grows_by_the_growth_rate_at_most():
    params = parameters()
    optimizer = DAdaptAdam(params, growth_rate=1.3)
    seen = [optimizer.param_groups[0]["d"]]
    for step in range(60):
        for p in params:
            p.grad = p.detach() * math.cos(step)  # The gradients change sign: n falls.
        if step < 40:
            feed(params, step)
        optimizer.step()
        seen.append(optimizer.param_groups[0]["d"])
    ratios = [later / earlier for earlier, later in pairwise(seen)]
    assert min(ratios) == 1.0
    assert max(ratios) == pytest.approx(1.3)


@pytest.mark.parametrize("distance", [0.05, 1.0, 30.0])
def test_d_finds_the_distance_to_the_solution(distance):
    """On |x - c| from 0, d ends within five times |c| either way, over three orders of magnitude, from d0 = 1e-6. (The
    bound of the SGD form is 2; the Adam form has none.)"""
    p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = DAdaptAdam([p], betas=(0.9, 0.99))
    for _ in range(400):
        p.grad = torch.sign(p.detach() - distance)
        optimizer.step()
    assert 0.2 * distance < optimizer.param_groups[0]["d"] < 5 * distance
    assert abs(p.item() - distance) < distance


def test_scale_of_the_gradients_does_not_matter_without_eps():
    runs = []
    for scale in (1.0, 1e3):
        params = parameters()
        optimizer = DAdaptAdam(params, eps=1e-30)
        for step in range(25):
            feed(params, step)
            for p in params:
                p.grad *= scale
            optimizer.step()
        runs.append((vector(params), optimizer.param_groups[0]["d"]))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-10, atol=0)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-10)


def test_gradients_of_zero_from_the_start_change_nothing():
    params = parameters()
    optimizer = DAdaptAdam(params, weight_decay=0.1, decay="decoupled")
    before = vector(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(vector(params), before)
    assert (optimizer.param_groups[0]["d"], optimizer.param_groups[0]["numerator"]) == (1e-6, 0.0)
    assert optimizer.param_groups[0]["steps"] == 0


@pytest.mark.parametrize("decay", ["l2", "decoupled"])
def test_a_group_with_rate_0_stays_out_of_everything(decay):
    params, alone = parameters(), parameters()[:3]
    options = {"weight_decay": 0.2, "decay": decay, "d0": 1e-3}
    both = DAdaptAdam([{"params": params[:3]}, {"params": params[3:], "lr": 0.0}], **options)
    single = DAdaptAdam(alone, **options)
    before = vector(params[3:])
    for step in range(10):
        feed(params, step)
        for p, q in zip(alone, params, strict=False):
            p.grad = q.grad.clone()
        both.step()
        single.step()
    assert torch.equal(vector(params[:3]), vector(alone))
    assert torch.equal(vector(params[3:]), before)
    assert both.param_groups[1]["d"] == single.param_groups[0]["d"]
    assert not any(p in both.state for p in params[3:])


def test_a_schedule_scales_the_steps_and_leaves_d_alone():
    """At the schedule's floor of 0 nothing moves any more, and nothing breaks."""
    params = parameters()
    optimizer = DAdaptAdam(params, d0=1e-2)
    schedule = Cosine(optimizer, total_steps=20, floor=0.0)
    for step in range(20):
        feed(params, step)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    before, d = vector(params), optimizer.param_groups[0]["d"]
    for step in range(20, 25):
        feed(params, step)
        optimizer.step()
        schedule.step()
    assert torch.equal(vector(params), before)
    assert optimizer.param_groups[0]["d"] == d > 1e-2


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_resumes_bit_for_bit(dtype, foreach):
    params = parameters(dtype)
    optimizer = DAdaptAdam(params, weight_decay=0.1, bias_correction=True, d0=1e-3, foreach=foreach)
    for step in range(7):
        feed(params, step, skip={1} if step < 2 else ())
        optimizer.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = DAdaptAdam(others, lr=0.7)
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
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, resumed.state[other][name]), name
    for name in ("d", "numerator", "steps"):
        assert optimizer.param_groups[0][name] == resumed.param_groups[0][name]


def test_low_precision_parameters_have_float32_states():
    """d grows as in float32, although the first steps round to nothing in the parameters."""
    low = [torch.nn.Parameter(p.detach()) for p in parameters(torch.bfloat16)]
    wide = [torch.nn.Parameter(p.detach().float()) for p in low]
    ours, theirs = DAdaptAdam(low), DAdaptAdam(wide)
    for step in range(6):
        feed(low, step)
        for p, q in zip(low, wide, strict=True):
            q.data.copy_(p.detach())
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
        assert all(torch.equal(p.detach(), q.detach().bfloat16()) for p, q in zip(low, wide, strict=True))
    assert all(state.dtype == torch.float32 for kept in ours.state.values() for state in kept.values())
    assert ours.param_groups[0]["d"] == theirs.param_groups[0]["d"] > 1e-6


def test_a_group_that_is_added_later_starts_at_the_present_d():
    first, late = parameters(), parameters(seed=1)
    optimizer = DAdaptAdam(first)
    for step in range(20):
        feed(first, step)
        optimizer.step()
    optimizer.add_param_group({"params": late})
    old, new = optimizer.param_groups
    assert new["d"] == old["d"] > 1e-6
    feed(late, 20)
    optimizer.step()
    assert new["d"] == old["d"]
    assert all(p in optimizer.state for p in late[:-1])


def test_a_sparse_gradient_is_refused_before_anything_moves():
    dense, embedding = torch.nn.Parameter(torch.ones(2)), torch.nn.Embedding(4, 2, sparse=True)
    optimizer = DAdaptAdam([dense, *embedding.parameters()])
    dense.grad = torch.ones(2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="DAdaptAdam does not take sparse gradients"):
        optimizer.step()
    assert torch.equal(dense.detach(), torch.ones(2))
    assert not optimizer.state


def test_gradients_are_left_alone():
    p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
    optimizer = DAdaptAdam([p], weight_decay=0.1)
    p.grad = gradient = torch.full((3, 2), 0.5, dtype=torch.float64)
    optimizer.step()
    assert torch.equal(gradient, torch.full((3, 2), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas are two numbers, got \(0.9,\)"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"decay": "fixed"}, "decay is one of l2, decoupled, got 'fixed'"),
        ({"growth_rate": 0.9}, "growth_rate must be at least 1, got 0.9"),
    ],
)
def test_wrong_hyper_parameters_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        DAdaptAdam([{"params": [torch.nn.Parameter(torch.ones(1))], **options}])


def test_what_groups_share_cannot_differ():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    with pytest.raises(ValueError, match=r"all groups share betas: \(0.9, 0.999\), not \(0.5, 0.9\)"):
        DAdaptAdam([{"params": [a]}, {"params": [b], "betas": (0.5, 0.9)}])
    with pytest.raises(ValueError, match=r"d0 must be positive, got 0.0"):
        DAdaptAdam([a], d0=0.0)


def test_builds_from_an_expression():
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = build("dadapt_adam(growth_rate=1.02, decay=decoupled)", "optim", params=[p], lr=1.5)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["growth_rate"], group["decay"], group["d"]) == (1.5, 1.02, "decoupled", 1e-6)
    with pytest.raises(PartError, match="dadapt_adam: d0 must be positive"):
        build("dadapt_adam(d0=0.0)", "optim", params=[p])
