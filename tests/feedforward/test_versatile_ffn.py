import copy
import inspect
import math

import pytest
import torch
from torch.nn import functional as F

from gatework import core
from gatework.core import PartError, build
from gatework.feedforward import GLU, MLP, VersatileFFN

D, H = 6, 24


def make(seed=0, spread=20.0, **settings):
    """A part in float64 whose routers are spread out, so that all choices occur."""
    torch.manual_seed(seed)
    m = VersatileFFN(D, **({"d_ff": H, "experts": 4, "k": 2, "loops": 3, "balance": 0.7} | settings)).double()
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(spread)
        m.norm.weight.copy_(torch.rand(D) + 0.5)
    return m


def inputs(*shape, loops=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, D, dtype=torch.float64, generator=generator)
    return x, torch.empty(*shape, loops, dtype=torch.float64).exponential_(generator=generator).log().neg()


def units(m, e):
    """The hidden units of slice e."""
    size = m.d_ff // m.experts
    return [e * size + i if m.layout == "contiguous" else e + i * m.experts for i in range(size)]


def whole(m, x, chosen=None):
    """F of one token, or f with the hidden units ``chosen`` only, from the equations."""
    normed = x / (x.square().mean() + 1e-6).sqrt() * m.norm.weight
    out = 0
    for h in range(m.d_ff) if chosen is None else chosen:
        value, gate = m.up.weight[h] @ normed, m.up.weight[m.d_ff + h] @ normed
        out = out + m.down.weight[:, h] * (value * gate * torch.sigmoid(gate))
    return out


def token(m, x, noise=None):
    """One token from the equations, all loops; noise is None in evaluation. Returns y, n, r and the chosen experts."""
    # A router with one choice is left out.
    r = m.expert_router.weight @ x if m.expert_router is not None else torch.zeros(m.experts, dtype=x.dtype)
    d = m.depth_router.weight @ x if m.depth_router is not None else torch.zeros(m.loops, dtype=x.dtype)
    hot = torch.zeros(m.loops, dtype=x.dtype)
    if noise is None:
        p = hot.index_fill(0, d.argmax(), 1.0)
    else:
        soft = torch.softmax((d + noise) / m.tau, 0)
        p = hot.index_fill(0, soft.argmax(), 1.0) + soft - soft.detach()
    stream, deep = x, 0
    for i in range(m.loops):
        stream = stream + whole(m, stream)
        deep = deep + p[i] * stream
    chosen = sorted(range(m.experts), key=lambda e: (-r[e].item(), e))[: m.k]
    weights = torch.softmax(torch.stack([r[e] for e in chosen]), 0)
    wide = x
    for w, e in zip(weights, chosen, strict=True):
        wide = wide + w * whole(m, x, units(m, e))
    n = sum((i + 1) * p[i] for i in range(m.loops))
    lam = (m.loops - n) / m.loops
    return (1 - lam) * deep + lam * wide, n, r, chosen


def reference(m, x, noise=None, mask=None):
    """All tokens of (N, D): outputs, numbers of loops, balance loss."""
    rows, loops, probs, counts = [], [], [], torch.zeros(m.experts, dtype=x.dtype)
    for i in range(len(x)):
        if mask is not None and not mask[i]:
            rows.append(x[i])
            continue
        y, n, r, chosen = token(m, x[i], None if noise is None else noise[i])
        rows.append(y)
        loops.append(round(n.item()))
        probs.append(torch.softmax(r, 0))
        for e in chosen:
            counts[e] += 1
    balance = m.balance * m.experts * (counts / counts.sum() * torch.stack(probs).mean(0)).sum()
    return torch.stack(rows), loops, balance


def gradients(m, x, objective):
    return torch.autograd.grad(objective, [x, *m.parameters()], retain_graph=True)


@pytest.mark.parametrize(
    "settings",
    [{}, {"layout": "strided"}, {"experts": 8, "k": 1}, {"loops": 1}, {"k": 4}, {"experts": 1, "k": 1}, {"loops": 5, "experts": 2}],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_training_equals_the_equations(settings, masked):
    m = make(**settings)
    m.advance(50, 100)  # tau is then neither its start nor its floor.
    x, noise = inputs(3, 7, loops=m.loops)
    mask = None
    if masked:
        mask = torch.ones(3, 7, dtype=torch.bool)
        mask[0, :3] = mask[2, 5:] = False
    x.requires_grad_()
    y = m(x, mask=mask, noise=noise)
    losses = core.losses(m)
    flat = (x.view(21, D), noise.view(21, -1), None if mask is None else mask.view(21))
    want, loops, balance = reference(m, *flat)
    torch.testing.assert_close(y.view(21, D), want, rtol=1e-12, atol=1e-12)
    if m.expert_router is None:
        assert losses == {}
        losses, balance = {"balance": 0}, 0
    assert set(losses) == {"balance"}
    torch.testing.assert_close(losses["balance"], balance, rtol=1e-13, atol=0)
    if m.loops == 3 and not masked:
        assert set(loops) == {1, 2, 3}
    weight = torch.randn(21, D, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    got = gradients(m, x, (y.view(21, D) * weight).sum() + losses["balance"])
    expected = gradients(m, x, (want * weight).sum() + balance)
    for name, a, b in zip(["x", *dict(m.named_parameters())], got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
    assert (m.expert_router is None) == (m.loops == 1 or m.experts == 1)
    assert (m.depth_router is None) == (m.loops == 1)
    if m.loops > 1:
        assert got[-1].abs().max() > 1e-3  # The depth router learns.


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_packed_evaluation_equals_the_unpacked_equations(layout):
    m = make(layout=layout).eval()
    x, _ = inputs(40)
    x.requires_grad_()
    mask = torch.arange(40) % 5 != 0
    y = m(x, mask=mask)
    want, loops, _ = reference(m, x, mask=mask)
    assert set(loops) == {1, 2, 3}
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(y[~mask], x[~mask])
    assert core.losses(m) == {}
    # Evaluation with a graph: the gradient is that of the fixed choice.
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), [x, m.up.weight, m.down.weight, m.expert_router.weight]),
        torch.autograd.grad(want.square().sum(), [x, m.up.weight, m.down.weight, m.expert_router.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def force_depth(m, depth):
    """Depth logits that choose ``depth`` (one value or one per token) whatever the input."""
    original = type(m)._router_logits

    def logits(x):
        r, d = original(m, x)
        index = (torch.as_tensor(depth).expand(len(x)) - 1)[:, None]
        return r, torch.zeros_like(d).scatter(1, index, 100.0) + 0 * d

    m._router_logits = logits
    return m


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fixed_depth_is_the_fusion_of_n_loops_and_the_slices(n):
    m = force_depth(make(), n).eval()
    x, _ = inputs(9)
    y = m(x)
    for i in range(9):
        stream = x[i]
        for _ in range(n):
            stream = stream + whole(m, stream)
        r = m.expert_router.weight @ x[i]
        w, e = r.topk(2)
        wide = x[i] + sum(v * whole(m, x[i], units(m, j)) for v, j in zip(w.softmax(0), e.tolist(), strict=True))
        torch.testing.assert_close(y[i], n / 3 * stream + (1 - n / 3) * wide, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_slices_are_a_partition_and_sum_to_the_whole(layout):
    m = make(layout=layout)
    assert sorted(h for e in range(4) for h in units(m, e)) == list(range(H))
    x, _ = inputs(1)
    total = 0
    for e, (up, down) in enumerate(zip(m._up_slices(), m._down_slices(), strict=True)):
        rows = units(m, e)
        assert torch.equal(up, m.up.weight[rows + [H + h for h in rows]])
        assert torch.equal(down, m.down.weight[:, rows])
        total = total + whole(m, x[0], rows)
    torch.testing.assert_close(total, whole(m, x[0]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("path", ["both", "deep", "fixed"])
def test_one_loop_is_dense_without_routers(path, training):
    m = make(loops=1, path=path).train(training)
    x, _ = inputs(8)
    want = x + torch.stack([whole(m, v) for v in x])
    torch.testing.assert_close(m(x), want, rtol=1e-12, atol=1e-12)
    assert [name for name, _ in m.named_parameters()] == ["norm.weight", "up.weight", "down.weight"]
    assert core.losses(m) == core.metrics(m) == {}


@pytest.mark.parametrize("training", [True, False])
def test_fixed_loops_are_the_same_for_all_tokens(training):
    m = make(path="fixed").train(training)
    x, _ = inputs(3, 4)
    x.requires_grad_()
    mask = torch.arange(12).view(3, 4) % 5 != 0
    y, want = m(x, mask=mask), x
    for _ in range(3):
        want = want + torch.stack([whole(m, v) for v in want.flatten(0, 1)]).view_as(x)
    want = torch.where(mask[..., None], want, x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(m, x, y.pow(2).sum()), gradients(m, x, want.pow(2).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert [name for name, _ in m.named_parameters()] == ["norm.weight", "up.weight", "down.weight"]
    assert core.losses(m) == core.metrics(m) == {}


def test_one_expert_makes_the_width_path_the_first_loop():
    m = make(experts=1, k=1, path="wide").eval()
    x, _ = inputs(8)
    torch.testing.assert_close(m(x), x + torch.stack([whole(m, v) for v in x]), rtol=1e-12, atol=1e-12)


def test_all_experts_with_equal_logits_are_the_mean():
    m = make(k=4, path="wide").eval()
    with torch.no_grad():
        m.expert_router.weight.zero_()
    x, _ = inputs(8)
    torch.testing.assert_close(m(x), x + torch.stack([whole(m, v) for v in x]) / 4, rtol=1e-12, atol=1e-12)


def test_equal_logits_choose_the_lower_expert_and_the_fewer_loops():
    m = make(k=1).eval()
    with torch.no_grad():
        m.expert_router.weight.zero_()
        m.depth_router.weight.zero_()
    x, _ = inputs(4)
    want = torch.stack([v + whole(m, v) / 3 + whole(m, v, units(m, 0)) * 2 / 3 for v in x])
    torch.testing.assert_close(m(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("training", [True, False])
def test_wide_ablation(layout, training):
    m = make(path="wide", layout=layout).train(training)
    x, _ = inputs(11)
    x.requires_grad_()
    rows = []
    for v in x:
        w, e = (m.expert_router.weight @ v).topk(2)
        rows.append(v + sum(a * whole(m, v, units(m, j)) for a, j in zip(w.softmax(0), e.tolist(), strict=True)))
    want = torch.stack(rows)
    y = m(x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert set(core.losses(m)) == ({"balance"} if training else set())
    for a, b in zip(gradients(m, x, y.pow(2).sum()), gradients(m, x, want.pow(2).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert m.depth_router is None
    assert set(core.metrics(m)) == {"expert_share"}


@pytest.mark.parametrize("training", [True, False])
def test_deep_ablation(training):
    m = make(path="deep").train(training)
    x, noise = inputs(11)
    y = m(x, noise=noise)
    d = x @ m.depth_router.weight.T + (noise if training else 0)
    for i, n in enumerate((d.argmax(1) + 1).tolist()):
        stream = x[i]
        for _ in range(n):
            stream = stream + whole(m, stream)
        torch.testing.assert_close(y[i], stream, rtol=1e-12, atol=1e-12)
    assert m.expert_router is None
    assert core.losses(m) == {}
    assert set(core.metrics(m)) == {"loops", "loop_share"}


def test_training_equals_evaluation_when_the_choice_agrees():
    m = make()
    x, _ = inputs(30)
    y = m(x, noise=torch.zeros(30, 3, dtype=torch.float64))
    torch.testing.assert_close(y, m.eval()(x), rtol=1e-13, atol=1e-13)


def test_a_tokens_output_does_not_depend_on_the_others():
    m = make().eval()
    x, _ = inputs(30)
    torch.testing.assert_close(m(x), torch.cat([m(v[None]) for v in x]), rtol=1e-12, atol=1e-12)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(m(x[order]), m(x)[order], rtol=1e-12, atol=1e-12)


def test_padding_changes_no_real_token_and_no_statistic():
    m = make()
    x, noise = inputs(12)
    alone = m(x, noise=noise)
    balance, metrics = core.losses(m)["balance"], core.metrics(m)
    padded, mask = torch.full((20, D), 1e3, dtype=torch.float64), torch.zeros(20, dtype=torch.bool)
    mask[4:16], padded[4:16] = True, x
    more = torch.zeros(20, 3, dtype=torch.float64)
    more[4:16] = noise
    y = m(padded, mask=mask, noise=more)
    torch.testing.assert_close(y[4:16], alone, rtol=1e-13, atol=1e-13)
    assert torch.equal(y[~mask], padded[~mask])
    torch.testing.assert_close(core.losses(m)["balance"], balance)
    for name, value in core.metrics(m).items():
        torch.testing.assert_close(value, metrics[name])


def test_metrics():
    m = force_depth(make(), [1, 1, 1, 2, 3, 3, 3, 3]).eval()
    x, _ = inputs(8)
    m(x)
    metrics = core.metrics(m)
    assert metrics["loops"].item() == pytest.approx(17 / 8)
    assert metrics["loop_share"].tolist() == pytest.approx([3 / 8, 1 / 8, 4 / 8])
    chosen = (x[:4] @ m.expert_router.weight.T).topk(2).indices.flatten()
    assert metrics["expert_share"].tolist() == pytest.approx((torch.bincount(chosen, minlength=4) / 8).tolist())
    assert not any(value.requires_grad for value in metrics.values())


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the FLOPs of matrix products."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.flops += 2 * a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["both", "deep"])
def test_skipped_work_is_not_run_in_evaluation(path):
    depth = torch.tensor([1] * 5 + [2] * 7 + [3] * 4)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    m = force_depth(make(path=path), depth).eval()
    with Products() as count, torch.no_grad():
        m(inputs(16)[0])
    full = 2 * 3 * H * D
    routers = 2 * D * 16 * (3 + (4 if path == "both" else 0))
    slices = (16 - 4) * 2 / 4 * full / 3 if path == "both" else 0
    assert count.flops == depth.sum() * full + slices + routers


def test_skipped_work_is_not_run_in_the_wide_ablation():
    m = make(path="wide").eval()
    with Products() as count, torch.no_grad():
        m(inputs(16)[0])
    assert count.flops == 16 * (2 / 4 * 2 * 3 * H * D + 2 * D * 4)


def test_training_runs_all_loops_forward_and_n_loops_backward():
    depth = torch.tensor([1] * 5 + [2] * 7 + [3] * 4)
    m = force_depth(make(), depth)
    x, _ = inputs(16)
    x.requires_grad_()
    full, routers, slices = 2 * 3 * H * D, 2 * D * 16 * 7, 16 * 2 / 4 * 2 * H * D
    with Products() as count:
        y = m(x, noise=torch.zeros(16, 3, dtype=torch.float64))
    assert count.flops == 16 * 3 * full + slices + routers
    with Products() as count:
        y.sum().backward()
    assert count.flops == 2 * (depth.sum() * full + slices + routers)
    count_dense = 2 * 3 * 16 * full
    assert count.flops < count_dense


@pytest.mark.parametrize("training", [True, False])
def test_fixed_loops_cost_what_they_say(training):
    m = make(path="fixed").train(training)
    with Products() as count, torch.no_grad():
        m(inputs(16)[0])
    assert count.flops == 16 * 3 * 2 * 3 * H * D


def test_parameters_that_a_token_uses():
    dense, routers = 3 * H * D + D, D * (4 + 3)
    assert make().active_parameters() == dense + routers
    assert make(path="deep").active_parameters() == dense + 3 * D
    assert make(path="fixed").active_parameters() == dense
    assert make(path="wide", k=1).active_parameters() == D + 3 * H * D // 4 + 4 * D


def test_parameters_are_those_of_a_glu_a_norm_and_two_small_routers():
    m = VersatileFFN(32, d_ff=96)
    glu = sum(p.numel() for p in GLU(32, d_ff=96).parameters())
    assert sum(p.numel() for p in m.parameters()) == glu + 32 + 32 * (8 + 4)
    assert [name for name, _ in m.named_parameters()] == [
        "norm.weight", "up.weight", "down.weight", "expert_router.weight", "depth_router.weight",
    ]


@pytest.mark.parametrize(("width", "init_std", "std"), [(256, 0.02, 0.02), (256, None, 0.0375), (1024, None, 0.02)])
def test_initialisation(width, init_std, std):
    torch.manual_seed(0)
    m = VersatileFFN(width, init_std=init_std)
    # A normal cut at 3 standard deviations keeps 0.98658 of the spread.
    for layer in (m.up, m.down):
        assert layer.weight.std().item() == pytest.approx(std * 0.98658, rel=0.01)
    for layer in (m.up, m.down, m.expert_router, m.depth_router):
        assert 2 * std < layer.weight.abs().max() <= 3 * std
    assert torch.equal(m.norm.weight, torch.ones(width))


def test_defaults_fit_any_number_of_experts():
    assert VersatileFFN(128).d_ff == 344
    assert VersatileFFN(128, experts=6).d_ff == 360
    assert VersatileFFN(128, path="wide").loops == 4


def test_temperature_follows_the_schedule():
    m = VersatileFFN(8)
    assert m.tau.item() == 5.0
    assert m.capabilities["compiles"] is not True
    core.advance(m, 480, 1000)
    assert m.tau.item() == pytest.approx(math.sqrt(5.0 * 0.1))
    for step in (960, 961, 1000, 2000):
        core.advance(m, step, 1000)
        assert m.tau.item() == pytest.approx(0.1)
    # The paper's own schedule reaches its floor after about 24,450 steps: 96% of 25,468.
    core.advance(m, 10_000, 25_468)
    assert m.tau.item() == pytest.approx(5.0 * 0.99984**10_000, rel=2e-3)


def test_temperature_is_saved_and_changes_the_gradient_only():
    m = VersatileFFN(8, d_ff=16)
    m.advance(30, 100)
    other = VersatileFFN(8, d_ff=16)
    other.load_state_dict(m.state_dict())
    assert torch.equal(other.tau, m.tau)
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    y = m(x, noise=noise)
    (before,) = torch.autograd.grad(y.square().sum(), m.depth_router.weight)
    m.advance(90, 100)
    z = m(x, noise=noise)
    assert torch.equal(y, z)
    (after,) = torch.autograd.grad(z.square().sum(), m.depth_router.weight)
    assert not torch.allclose(before, after)


def test_noise_is_drawn_from_the_default_generator():
    m, x = make(), inputs(40)[0]
    torch.manual_seed(0)
    first = m(x)
    second = m(x)
    torch.manual_seed(0)
    assert torch.equal(m(x), first)
    assert not torch.equal(first, second)


def test_one_hot_in_float32_is_exact():
    # With p = 0.9999999 a token of full depth would still be mixed with the width path.
    m = force_depth(make().float(), 3)
    x, noise = (t.float() for t in inputs(50))
    y = m(x, noise=noise)
    deep = x
    for _ in range(3):
        deep = deep + m.down(F.silu((h := m.up(m.norm(deep)))[:, H:]) * h[:, :H])
    torch.testing.assert_close(y, deep, rtol=0, atol=0)


def test_checkpointing_counts_once_and_gives_the_same_gradients():
    m = make()
    x, _ = inputs(15)
    x.requires_grad_()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(7)
        y = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False) if checkpointed else m(x)
        loss = y.square().sum() + core.losses(m)["balance"]
        results.append(torch.autograd.grad(loss, [x, *m.parameters()]))
        assert core.losses(m) == {}
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_and_half_precision(training):
    m = make().float().train(training)
    x, noise = (t.float() for t in inputs(2, 9))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m(x, noise=noise)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
    half = copy.deepcopy(m).bfloat16()
    assert half(x.bfloat16(), noise=noise).dtype == torch.bfloat16


def test_routers_stay_in_float32_under_autocast():
    m = make().float().eval()
    x = inputs(64)[0].float()
    chosen = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            m(x)
        chosen.append(core.metrics(m)["loop_share"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            assert m._router_logits(x)[0].dtype == torch.float32
    assert torch.equal(*chosen)


def test_empty_and_all_padding_inputs():
    m = make()
    assert m(torch.empty(0, 4, D, dtype=torch.float64)).shape == (0, 4, D)
    x, _ = inputs(2, 3)
    assert torch.equal(m(x, mask=torch.zeros(2, 3, dtype=torch.bool)), x)
    assert core.losses(m) == {}


def test_no_stale_side_outputs_after_a_batch_of_padding():
    m, x = make(), inputs(4)[0]
    m(x)
    m(x, mask=torch.zeros(4, dtype=torch.bool))
    assert core.losses(m) == {}
    assert core.metrics(m) == {}


def test_second_derivative_is_refused():
    m = make()
    x, noise = inputs(5)
    x.requires_grad_()
    (g,) = torch.autograd.grad(m(x, noise=noise).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        g.sum().backward()


class LlamaMLP(torch.nn.Module):
    """As in transformers, by name."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = (torch.nn.Linear(D, H, bias=bias) for _ in range(2))
        self.down_proj, self.act_fn = torch.nn.Linear(H, D, bias=bias), torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("make_dense", [lambda: GLU(D, d_ff=H, activation="xgelu"), LlamaMLP])
def test_from_dense_keeps_the_function_for_one_loop(make_dense):
    torch.manual_seed(0)
    dense, norm = make_dense().double(), torch.nn.RMSNorm(D, eps=1e-2).double()
    norm.weight.data.uniform_(0.5, 1.5)
    x, _ = inputs(7)
    for loops, path in ((1, "both"), (2, "fixed")):
        m = VersatileFFN.from_dense(dense, norm, experts=4, loops=loops, path=path)
        want = x
        for _ in range(loops):
            want = want + dense(norm(want))
        torch.testing.assert_close(m(x), want, rtol=1e-12, atol=1e-12)
    assert m.tau.dtype == torch.float64
    before = dense(x)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    assert torch.equal(dense(x), before)  # All weights are copies.
    routed = VersatileFFN.from_dense(dense, norm, experts=4)
    assert routed.depth_router.weight.shape == (4, D)
    assert torch.equal(routed.norm.weight, norm.weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: (GLU(D, d_ff=H, bias=True),), "from_dense takes a gated unit of order 2 without biases, not this GLU"),
        (lambda: (GLU(D, d_ff=H, order=1),), "from_dense takes a gated unit of order 2 without biases, not this GLU"),
        (lambda: (LlamaMLP(bias=True),), "from_dense takes a gated unit of order 2 without biases, not this LlamaMLP"),
        (lambda: (MLP(D),), "from_dense takes a gated unit of order 2 without biases, not this MLP"),
        (lambda: (GLU(D, d_ff=H), torch.nn.LayerNorm(D)), "from_dense takes an RMS norm with an eps, not this LayerNorm"),
        (lambda: (GLU(D, d_ff=20),), "d_ff 20 is not divisible by experts 8"),
    ],
)
def test_from_dense_says_what_it_cannot_take(given, message):
    with pytest.raises(ValueError, match=message):
        VersatileFFN.from_dense(*given())


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("versatile_ffn(d_ff=130)", "d_ff 130 is not divisible by experts 8"),
        ("versatile_ffn(k=9)", "k must be between 1 and experts 8, got 9"),
        ("versatile_ffn(k=0)", "k must be between 1 and experts 8, got 0"),
        ("versatile_ffn(loops=0)", "experts and loops must be at least 1, got 8 and 0"),
        ("versatile_ffn(tau_floor=6.0)", "temperatures need 0 < tau_floor <= tau_start, got 6.0 and 5.0"),
        ("versatile_ffn(path=long)", "path must be one of 'both', 'wide', 'deep', 'fixed', got 'long'"),
    ],
)
def test_wrong_arguments(expression, message):
    with pytest.raises(PartError, match=message):
        build(expression, "feedforward", d_model=16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"init_std": 0.0}, "init_std must be positive, got 0.0"),
        ({"layout": "striped"}, "layout must be 'contiguous' or 'strided', got 'striped'"),
        ({"path": "long"}, "path must be 'both', 'wide', 'deep' or 'fixed', got 'long'"),
    ],
)
def test_wrong_arguments_of_the_class(settings, message):
    init = inspect.unwrap(VersatileFFN.__init__)  # The annotation check of the test run comes before the class's own.
    with pytest.raises(ValueError, match=message):
        init(VersatileFFN.__new__(VersatileFFN), **({"d_model": 16} | settings))


def test_wrong_inputs_meet_one_sentence():
    m, (x, noise) = make(), inputs(2, 3)
    forward = inspect.unwrap(VersatileFFN.forward)
    for given, message in [
        ((x[..., 1:],), rf"this layer was built for width {D}, not for inputs of shape \(2, 3, {D - 1}\)"),
        ((x, torch.ones(2, 2, dtype=torch.bool)), r"mask has shape \(2, 3\) for these inputs, not \(2, 2\)"),
        ((x, torch.ones(6, dtype=torch.bool)), r"mask has shape \(2, 3\) for these inputs, not \(6,\)"),
        ((x, None, noise[..., 1:]), r"noise has shape \(2, 3, 3\) for these inputs, not \(2, 3, 2\)"),
    ]:
        with pytest.raises(PartError, match=message):
            forward(m, *given)


def test_other_activations():
    assert type(build("versatile_ffn(activation=golu)", "feedforward", d_model=8).activation).__name__ == "GoLU"
