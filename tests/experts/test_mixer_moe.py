"""Experts by environment, row by row, and the adaptation of contexts to new environments."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from gatework.core import PartError, losses, metrics
from gatework.core.cost import count_flops
from gatework.experts import MixERLayer
from gatework.experts.mixer_moe import adapt
from gatework.models import BACKBONES

SIZES = {"d_in": 2, "d_out": 3, "environments": 5, "experts": 3, "context": 6, "d_ff": 7}


def layer(**settings) -> MixERLayer:
    torch.manual_seed(0)
    made = MixERLayer(**(SIZES | settings)).double()
    with torch.no_grad():
        made.contexts.normal_()
        made.weight.normal_()
        for p in made.experts.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


def batch(rows: int = 20):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
    return x, torch.randint(5, (rows,), generator=generator)


def expert(net, x):
    h = F.silu(net[0].weight @ x + net[0].bias)
    return net[4].weight @ F.silu(net[2].weight @ h + net[2].bias) + net[4].bias


def reference(made, x, environment):
    """G = softmax(W^T [c; 1]), the experts within 1e-6 of the largest, added."""
    rows = []
    for point, n in zip(x, environment.tolist(), strict=True):
        c = made.contexts[n]
        shares = torch.softmax(made.weight.T @ torch.cat([c.detach(), torch.ones(1, dtype=c.dtype)]), 0)
        total = torch.zeros(made.d_out, dtype=c.dtype)
        for e, share in enumerate(shares):
            if share > shares.max() - 1e-6:
                piece = c[2 * e : 2 * e + 2] if made.split_context else c
                total = total + expert(made.experts[e], torch.cat([point, piece]))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_outputs_and_gradients_follow_the_equations(split, ties):
    made = layer(split_context=split)
    x, environment = batch()
    if ties:
        with torch.no_grad():
            made.weight[:, 2] = made.weight[:, 0]
            made.weight[-1, 2] += 1e-7
    routing = made.route(made.contexts)
    assert set((routing.dense() != 0).sum(1).tolist()) == ({1, 2} if ties else {1})
    x.requires_grad_()
    weights = torch.randn(20, 3, dtype=torch.float64)
    wanted = [x, made.contexts, *made.experts.parameters()]
    results = []
    for y in (made(x, environment), reference(made, x, environment)):
        results.append([y, *torch.autograd.grad((y * weights).sum(), wanted, materialize_grads=True)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_the_gate_has_no_gradient_and_is_no_parameter():
    made = layer()
    made(*batch()).sum().backward()
    assert "weight" not in dict(made.named_parameters())
    assert "weight" in made.state_dict()
    made.weight.requires_grad_()
    y = made(*batch())
    assert torch.autograd.grad(y.sum(), made.weight, allow_unused=True) == (None,)
    found = metrics(made)
    shares = torch.softmax(torch.cat([made.contexts, torch.ones(5, 1, dtype=torch.float64)], 1) @ made.weight, 1).mean(0)
    torch.testing.assert_close(found["cv2"].double(), shares.var(correction=0) / shares.mean() ** 2, rtol=1e-6, atol=0)
    assert {"load", "dead", "entropy", "max_violation", "cv2"} == set(found)


def test_one_expert_is_that_expert_for_all():
    made = layer(experts=1)
    x, environment = batch()
    expected = torch.stack([expert(made.experts[0], torch.cat([p, made.contexts[n]])) for p, n in zip(x, environment, strict=True)])
    torch.testing.assert_close(made(x, environment), expected, rtol=0, atol=1e-12)


def test_one_expert_s_cost_per_row():
    x, environment = batch()
    for experts in (1, 3):
        made = layer(experts=experts)
        with torch.no_grad(), count_flops() as count:
            made(x, environment)
        gate = 2 * 5 * 7 * experts
        assert count.total - gate == 2 * 20 * (8 * 7 + 7 * 7 + 7 * 3)


def test_only_one_expert_for_the_table_of_losses():
    made = layer(split_context=True)
    x, environment = batch()
    kept = made.route(made.contexts)
    metrics(made)
    for e in range(3):
        with made.only(e):
            y = made(x, environment)
        rows = [torch.cat([p, made.contexts[n, 2 * e : 2 * e + 2]]) for p, n in zip(x, environment, strict=True)]
        torch.testing.assert_close(y, torch.stack([expert(made.experts[e], row) for row in rows]), rtol=0, atol=1e-12)
    assert not metrics(made)
    assert torch.equal(made.route(made.contexts).experts, kept.experts)


def test_a_gate_by_gradient_weighs_and_learns():
    made = layer(gate="topk(k=1)")
    torch.nn.init.normal_(made.gate.weight)
    x, environment = batch()
    y = made(x, environment)
    assert set(losses(made)) == {"gate.switch", "gate.z_loss"}
    p = torch.softmax(made.contexts @ made.gate.weight.T, 1)
    for row, n, point in zip(y, environment.tolist(), x, strict=True):
        e = p[n].argmax()
        torch.testing.assert_close(row, p[n, e] * expert(made.experts[e], torch.cat([point, made.contexts[n]])), rtol=0, atol=1e-12)
    y.sum().backward()
    assert made.gate.weight.grad.any()


def test_initialisation():
    torch.manual_seed(0)
    made = MixERLayer(2, 3, environments=5, experts=40, context=24)
    assert not made.contexts.any()
    assert made.weight.abs().max() <= 0.2
    assert made.weight.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.05)
    first = made.experts[0].state_dict()
    for other in made.experts[1:]:
        torch.testing.assert_close(dict(other.state_dict()), dict(first), rtol=0, atol=0)
    assert len({id(p) for p in made.experts.parameters()}) == 40 * 6
    assert len(made.route(made.contexts).experts.unique()) == 1


def test_adaptation_learns_contexts_and_nothing_else():
    """New environments that are known ones in another order get contexts that do what the old ones did."""
    torch.manual_seed(0)
    model = BACKBONES["environments"](2, 3, environments=5, experts=3, context=6, d_ff=7).double()
    model.mixer.load_state_dict(layer().state_dict())
    before = copy.deepcopy(model.state_dict())
    order = torch.tensor([3, 0, 4])
    x = torch.randn(60, 3, dtype=torch.float64)
    x[:, 0] = torch.arange(60) % 3
    old = x.clone()
    old[:, 0] = order[torch.arange(60) % 3].double()
    with torch.no_grad():
        y = model(old)
    new = adapt(model, x, y, F.mse_loss, environments=3, steps=300, lr=0.05)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert new.mixer.contexts.shape == (3, 6)
    for name, value in new.state_dict().items():
        assert name == "mixer.contexts" or torch.equal(value, before[name])
    at_start = adapt(model, x, y, F.mse_loss, environments=3, steps=0)
    routing = model.mixer.route(model.mixer.contexts).experts[:, 0]
    means = [torch.zeros(6, dtype=torch.float64)]
    means += [model.mixer.contexts[routing == e].mean(0) for e in range(3) if (routing == e).any()]
    for n in range(3):
        tried = []
        for start in means:
            e = int((torch.cat([start, torch.ones(1, dtype=torch.float64)]) @ model.mixer.weight).argmax())
            rows = x[:, 0] == n
            outputs = torch.stack([expert(model.mixer.experts[e], torch.cat([p, start])) for p in x[rows, 1:]])
            tried.append(F.mse_loss(outputs, y[rows]).item())
        torch.testing.assert_close(at_start.mixer.contexts[n], means[tried.index(min(tried))], rtol=0, atol=0)
    first, last = F.mse_loss(at_start(x), y), F.mse_loss(new(x), y)
    assert last < 0.5 * first
    y = y + 0.3 * torch.randn_like(y)  # No context starts at a minimum, where Adam makes steps of rounding errors.
    plain = adapt(model, x, y, F.mse_loss, environments=3, steps=0).mixer
    optimizer = torch.optim.Adam([plain.contexts], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(reference(plain, x[:, 1:], x[:, 0].long()), y).backward()
        optimizer.step()
    five = adapt(model, x, y, F.mse_loss, environments=3, steps=5, lr=0.05)
    torch.testing.assert_close(five.mixer.contexts, plain.contexts, rtol=0, atol=1e-9)
    with pytest.raises(PartError, match=r"the environments \[3\] have no rows"):
        adapt(model, x, y, F.mse_loss, environments=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 7, "split_context": True}, "a context of 7 cannot be split among 3 experts"),
        ({"experts": 0}, "experts must be at least 1"), ({"environments": 0}, "environments must be at least 1"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        layer(**settings)


def test_wrong_input():
    made = layer()
    x, environment = batch()
    assert made(x[:0], environment[:0]).shape == (0, 3)
    with pytest.raises(PartError, match="environments 0 to 4, and the input is from 1 to 5"):
        made(x, environment.clamp(1) + (environment == 4))
    with pytest.raises(PartError, match=r"x is \(rows, 2\), not \(20, 3\)"):
        made(torch.cat([x, x[:, :1]], 1), environment)
    with pytest.raises(PartError, match="there are the experts 0 to 2, not 3"), made.only(3):
        pass
    model = BACKBONES["environments"](2, 3, environments=5)
    for environments, targets, message in [(0, 4, "got 0, 4 and 4"), (1, 3, "got 1, 4 and 3")]:
        with pytest.raises(PartError, match=f"at least 1 environment and one target per input are due, {message}"):
            adapt(model, torch.zeros(4, 3), torch.zeros(targets, 3), F.mse_loss, environments)
    with pytest.raises(PartError, match=r"an environment's number and 2 values, not the shape \(4, 2\)"):
        BACKBONES["environments"](2, 3, environments=5)(torch.zeros(4, 2))
    with pytest.raises(PartError, match="cannot be split"):
        BACKBONES["environments"](2, 3, environments=5, context=7, split_context=True)
