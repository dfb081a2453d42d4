from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatework.core import PartError, metrics
from gatework.core.cost import count_flops
from gatework.gates import BlockSparsityGate


class Net(nn.Module):
    """A convolution, a norm, two linear layers: tensors of many sizes, in both groups."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 7, 3, padding=1)
        self.norm = nn.LayerNorm(7 * 16)
        self.first = nn.Linear(7 * 16, 11)
        self.second = nn.Linear(11, 3, bias=False)

    def forward(self, x):
        h = torch.tanh(self.conv(x)).flatten(1)
        return self.second(torch.tanh(self.first(self.norm(h))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net().double()


def gate_for(model, seed=1, **options):
    torch.manual_seed(seed)
    gate = BlockSparsityGate(model, (2, 4, 4), **options).double()
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return gate


def batch(rows=6, seed=2):
    return torch.randn(rows, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# The specification, slowly


def cut(model, splits):
    """[(name, first element, last element + 1, linear)] of all blocks."""
    blocks = []
    for name, p in model.named_parameters():
        n = p.numel()
        size = math.ceil(n / min(splits, n))
        linear = name.startswith(("first", "second"))
        blocks += [(name, start, min(start + size, n), linear) for start in range(0, n, size)]
    return blocks


def slow_scores(gate, x, head=0):
    """Switch norm, linear map, batch norm, sigmoid, mean, from the training batch's statistics, element by element."""
    x = x.numpy()
    count, channels = x.shape[:2]
    flat = x.reshape(count, channels, -1)
    length = flat.shape[2]
    mixture = [np.exp(w.detach().numpy()) / np.exp(w.detach().numpy()).sum() for w in (gate.norm.mean_weight, gate.norm.var_weight)]
    normed = np.empty_like(flat)
    means = [[flat[b, c].sum() / length for c in range(channels)] for b in range(count)]
    variances = [[((flat[b, c] - means[b][c]) ** 2).sum() / (length - 1) for c in range(channels)] for b in range(count)]
    squares = [[variances[b][c] + means[b][c] ** 2 for c in range(channels)] for b in range(count)]
    for b in range(count):
        for c in range(channels):
            layer = sum(means[b]) / channels
            layer_variance = sum(squares[b]) / channels - layer**2
            of_batch = sum(m[c] for m in means) / count
            batch_variance = sum(s[c] for s in squares) / count - of_batch**2
            mean = np.dot(mixture[0], [means[b][c], layer, of_batch])
            variance = np.dot(mixture[1], [variances[b][c], layer_variance, batch_variance])
            normed[b, c] = (flat[b, c] - mean) / math.sqrt(variance + 1e-5)
    net_ = gate.heads[head]
    weight, scale, shift = (t.detach().numpy() for t in (net_.weight, net_.scale, net_.shift))
    logits = normed.reshape(count, -1) @ weight.T
    a = []
    for j in range(logits.shape[1]):
        column = logits[:, j]
        m = column.sum() / count
        v = ((column - m) ** 2).sum() / count
        z = (column - m) / math.sqrt(v + 1e-5) * scale[j] + shift[j]
        a.append((1 / (1 + np.exp(-z))).sum() / count)
    return a


def slow_kept(blocks, a, s, splits, selection="blocks", size_prior=True):
    """How many leading elements of each block are kept."""
    least = min(max(1 / splits, 0.1), s)
    size = [end - start for _, start, end, _ in blocks]
    kept = [0] * len(blocks)
    for linear in (True, False):
        group = [i for i, b in enumerate(blocks) if b[3] == linear]
        total = sum(size[i] for i in group)
        if selection == "fractions":
            left = total * (s - least)
            share = {i: least for i in group}
            for i in sorted(group, key=lambda i: a[i] / size[i], reverse=True):
                take = min(left, (1 - least) * size[i])
                share[i] += take / size[i]
                left -= take
            for i in group:
                kept[i] = round(share[i] * size[i])
            continue
        left = round(total * (s - least))
        value = {}
        for i in group:
            if blocks[i][1] == 0:
                kept[i] = size[i]
            else:
                value[i] = int(np.around(10 * ((a[i] + size[i] / total) / 2 if size_prior else a[i])))
        for v in range(10, -1, -1):
            for i in sorted(value):
                if value[i] == v and size[i] <= left:
                    left -= size[i]
                    kept[i] = size[i]
    return kept


def slow_weights(model, blocks, kept, factor):
    used = {name: torch.zeros(p.numel(), dtype=p.dtype) for name, p in model.named_parameters()}
    given = dict(model.named_parameters())
    for (name, start, _, _), count, f in zip(blocks, kept, factor, strict=True):
        for i in range(start, start + count):
            used[name][i] = given[name].flatten()[i] * f
    return {name: used[name].view(given[name].shape) for name in used}


SETTINGS = [
    {"budget": 0.5},
    {"budget": 0.3, "size_prior": False},
    {"budget": 0.9, "splits": 3},
    {"budget": 0.15},
    {"budget": 0.5, "splits": 12},
    {"budget": 0.5, "selection": "fractions"},
    {"budget": 0.25, "selection": "fractions", "splits": 7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_scores_selection_weights_output_and_gradients_against_the_specification(settings):
    model, twin, x = net(), net(), batch()
    gate = gate_for(model, **settings)
    s, splits = settings["budget"], settings.get("splits", 5)
    least = min(max(1 / splits, 0.1), s)
    blocks = cut(model, splits)
    expected = [max(value, least) for value in slow_scores(gate, x)]
    scores = gate.scores(x)
    torch.testing.assert_close(scores.detach(), torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-12)
    assert scores.min() >= least
    assert scores.max() <= 1
    rest = {name: value for name, value in settings.items() if name in ("selection", "size_prior")}
    kept = slow_kept(blocks, scores[0].tolist(), s, splits, **rest)
    assert gate.select(scores).tolist() == kept
    assert any(k < end - start for k, (_, start, end, _) in zip(kept, blocks, strict=True))

    a = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    used = slow_weights(twin, blocks, kept, a)
    y = torch.func.functional_call(twin, used, (x,))
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (y * weights).sum().backward()
    found = gate(model, x)
    given = {name: value.detach() for name, value in gate.weights(model, scores).items()}
    torch.testing.assert_close(given, {name: value.detach() for name, value in used.items()}, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.detach(), y.detach(), rtol=0, atol=1e-11)
    (found * weights).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")
        flat = p.grad.flatten()
        for (owner, start, end, _), count in zip(blocks, kept, strict=True):
            if owner == name:
                assert (flat[start + count : end] == 0).all(), "a masked element has a gradient"
    # The gate net's gradient is that of the scores, sent on.
    others = gate_for(model, **settings)
    others.scores(x).backward(torch.where(others.scores(x).detach() > least, a.grad, 0.0))
    for p, q in zip(gate.parameters(), others.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-10)


def test_the_gradient_of_the_scores_is_that_of_differences():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    gate = BlockSparsityGate(model, (2, 4)).double().requires_grad_(False)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    names = ["heads.0.weight", "heads.0.scale", "heads.0.shift", "norm.mean_weight", "norm.var_weight"]
    values = [gate.get_parameter(name).clone().requires_grad_() for name in names]

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = gate

        def forward(self, x):
            return self.gate.scores(x)

    def scores(*values):
        return torch.func.functional_call(Scores(), {f"gate.{n}": v for n, v in zip(names, values, strict=True)}, (x,))

    assert torch.autograd.gradcheck(scores, values)


def test_the_whole_budget_is_the_model_times_its_gates():
    model, x = net(), batch()
    for selection in ("blocks", "fractions"):
        gate = gate_for(model, budget=1.0, selection=selection)
        scores = gate.scores(x)
        assert gate.report(scores) == dict.fromkeys(gate.report(scores), 1.0)
        used = slow_weights(model, cut(model, 5), [end - start for _, start, end, _ in cut(model, 5)], scores[0])
        torch.testing.assert_close(gate(model, x), torch.func.functional_call(model, used, (x,)), rtol=0, atol=1e-12)
    open_ = torch.ones(1, len(gate.sizes), dtype=torch.float64)
    assert torch.equal(gate(model, x, open_), model(x)), "gates of 1 are the plain model"


@pytest.mark.parametrize("budget", [0.2, 0.37, 0.5, 0.8])
def test_the_selection_keeps_to_the_budget_of_each_group_and_grows_with_it(budget):
    model = net()
    for seed in range(5):
        scores = torch.rand(1, 29 + 100, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        gate = BlockSparsityGate(model, (2, 4, 4), budget=budget)
        scores = scores[:, : len(gate.sizes)]
        kept = gate.select(scores)
        for linear in (True, False):
            tensors = [t for t in gate.tensors if t.linear == linear]
            first = sum(int(gate.sizes[t.begin]) for t in tensors)
            total = sum(int(gate.sizes[t.begin : t.end].sum()) for t in tensors)
            assert sum(int(kept[t.begin : t.end].sum()) for t in tensors) <= first + round(total * (budget - 0.2))
            assert all(kept[t.begin] == gate.sizes[t.begin] for t in tensors)
    # Blocks of equal sizes: what a small capacity takes, a larger one takes too.
    model = nn.Linear(10, 10, bias=False)
    scores = torch.rand(1, 10, generator=torch.Generator().manual_seed(9))
    chosen = [set(BlockSparsityGate(model, (10,), budget=b, splits=10).select(scores).nonzero().flatten().tolist())
              for b in (0.1, 0.3, budget, 1.0)]
    assert chosen[0] <= chosen[1]
    assert chosen[0] <= chosen[2] <= chosen[3]
    assert len(chosen[2]) == 1 + round(100 * (budget - 0.1)) // 10
    # Values are whole numbers: of equal ones the first come first.
    tied = BlockSparsityGate(model, (10,), budget=0.35, splits=10, size_prior=False)
    assert tied.select(torch.full((1, 10), 0.52)).nonzero().flatten().tolist() == [0, 1, 2]
    assert tied.select(torch.linspace(0.5, 0.549, 10)[None]).nonzero().flatten().tolist() == [0, 1, 2]


def test_a_second_net_multiplies_and_the_first_learns_through_the_mask():
    model, x = net(), batch()
    gate = gate_for(model, transform=True)
    a = torch.tensor(slow_scores(gate, x)).clamp(min=0.2).requires_grad_()
    t = torch.tensor(slow_scores(gate, x, head=1), requires_grad=True)
    torch.testing.assert_close(gate.scores(x).detach(), torch.stack([a, t]).detach(), rtol=0, atol=1e-12)
    blocks = cut(model, 5)
    kept = slow_kept(blocks, a.tolist(), 0.5, 5)
    y = torch.func.functional_call(model, slow_weights(model, blocks, kept, t * (1 + a - a.detach())), (x,))
    grads = torch.autograd.grad(y.square().sum(), [a, t])
    given = torch.stack([a, t]).detach().requires_grad_()
    found = gate(model, x, given)
    torch.testing.assert_close(found.detach(), y.detach(), rtol=0, atol=1e-11)
    (grad,) = torch.autograd.grad(found.square().sum(), given)
    torch.testing.assert_close(grad, torch.stack(grads), rtol=0, atol=1e-11)
    assert grad[0].any()


def test_masked_rows_are_not_computed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 50), nn.ReLU(), nn.Linear(50, 40, bias=False))
    gate = BlockSparsityGate(model, (2, 4, 4), budget=0.4, size_prior=False)
    scores = torch.full((1, len(gate.sizes)), 0.9)
    kept = gate.select(scores)
    rows = [int(kept[t.begin : t.end].sum()) // (t.shape[1] if len(t.shape) > 1 else 1) for t in gate.tensors if len(t.shape) > 1]
    assert rows == [30, 8]  # Of 730 elements two more blocks of 320 fit, then of the bias 10 each; no other block of 400.
    x = batch(8).float()
    with count_flops() as count:
        y = gate(model, x, scores)
    assert count.total == 2 * 8 * (32 * 30 + 50 * 8)
    with count_flops() as dense:
        model(x)
    assert dense.total == 2 * 8 * (32 * 50 + 50 * 40)
    with count_flops() as both:
        gate(model, x, scores).sum().backward()
    # Backward: the weights' gradients of both, the inputs' of the second.
    assert both.total == count.total + 2 * 8 * (32 * 30 + 50 * 8 + 50 * 8)
    assert (y[:, 8:] == 0).all(), "a masked row without a bias holds 0"
    convolution = nn.Conv1d(3, 20, 3)
    gate = BlockSparsityGate(convolution, (3, 10), budget=0.4)
    with count_flops() as count:
        gate(convolution, torch.randn(4, 3, 10), torch.full((1, len(gate.sizes)), 0.9))
    assert count.total == 2 * 4 * 8 * 8 * 9
    # Groups tie output channels to inputs: computed in full, and right.
    grouped = nn.Conv2d(4, 8, 3, groups=2)
    gate = BlockSparsityGate(grouped, (4, 5, 5), budget=0.4)
    scores = torch.full((1, len(gate.sizes)), 0.9)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(gate(grouped, x, scores), torch.func.functional_call(grouped, gate.weights(grouped, scores), (x,)))


def test_layers_whose_weights_are_all_masked_hold_their_bias():
    model = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Conv1d(3, 40, 3), nn.Flatten(), nn.Linear(320, 4)).double()
    gate = BlockSparsityGate(model, (1, 10), budget=0.3, selection="fractions")
    scores = torch.full((1, len(gate.sizes)), 0.5, dtype=torch.float64)
    scores[0, :3], scores[0, 3:6] = 1e-3, 1.0  # The first convolution and its bias: blocks of one element, all or nothing.
    assert gate.select(scores)[:6].tolist() == [0, 0, 0, 1, 1, 1]
    x = torch.randn(2, 1, 10, dtype=torch.float64)
    found, wanted = gate(model, x, scores), torch.func.functional_call(model, gate.weights(model, scores), (x,))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    leaves = list(model.parameters())
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_evaluation_uses_running_statistics_and_so_does_a_batch_of_one():
    model = net()
    gate = gate_for(model)
    for seed in range(60):
        gate.scores(batch(32, seed=seed))
    single = batch(1, seed=99)
    before = {name: buffer.clone() for name, buffer in gate.named_buffers()}
    trained = gate.scores(single)
    assert all(torch.equal(buffer, before[name]) for name, buffer in gate.named_buffers()), "one example is no statistic"
    gate.eval()
    assert torch.equal(gate.scores(single), trained)
    # In evaluation a client's scores are the mean over its examples, however they are batched (where nothing is clipped).
    x = batch(10, seed=5)
    apart = torch.stack([torch.sigmoid(gate.heads[0](gate.norm(row.flatten(2)).flatten(1)))[0] for row in x.split(1)]).mean(0)
    torch.testing.assert_close(gate.scores(x)[0], apart.clamp(min=0.2), rtol=0, atol=1e-12)
    # The running statistics are those of the stream: means near 0, logits' near theirs.
    assert gate.norm.running_mean.abs().max() < 0.1
    assert (gate.norm.running_var - 1).abs().max() < 0.15
    y = gate(model, x)
    kept = gate.select(gate.scores(x))
    assert metrics(gate)["density"] == kept.sum() / gate.sizes.sum()
    assert gate.report(gate.scores(x))["total"] == pytest.approx(float(kept.sum() / gate.sizes.sum()), rel=1e-6)
    assert torch.equal(y, gate(model, x, gate.scores(x)))


def test_wrong_use_meets_one_sentence():
    model = net()
    for options, sentence in [
        ({"budget": 0.0}, "budget is a share"), ({"budget": 1.1}, "budget is a share"), ({"splits": 1}, "splits at least 2"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            BlockSparsityGate(model, (2, 4, 4), **options)
    with pytest.raises(ValueError, match="no parameters"):
        BlockSparsityGate(nn.ReLU(), (3,))
    with pytest.raises(ValueError, match="input_shape is the shape of one input"):
        BlockSparsityGate(model, ())
    gate = BlockSparsityGate(model, (2, 4, 4))
    with pytest.raises(PartError, match="not those of the model that the gate was built for"):
        gate(nn.Linear(3, 3), batch())
    many = len(gate.sizes)
    for wrong in (torch.ones(1, many - 1), torch.ones(1, many + 1), torch.ones(2, many)):
        with pytest.raises(PartError, match=rf"scores have shape \(1, {many}\) \(heads, blocks\), not \({len(wrong)}, "):
            gate(model, batch(), wrong.double())
    with pytest.raises(PartError, match=r"scores have shape \(2, "):
        BlockSparsityGate(model, (2, 4, 4), transform=True)(model, batch(), torch.ones(1, many, dtype=torch.float64))
    for wrong in (batch()[:, :1], batch(0)):
        with pytest.raises(PartError, match=r"inputs of shape \(2, 4, 4\)"):
            gate(model, wrong)
    assert F.linear(torch.ones(1, 2), torch.ones(3, 2)).shape == (1, 3)  # Outside, linear maps are left alone.
