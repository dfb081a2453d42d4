"""Experts grown out of a trained feed-forward."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError, advance
from gatework.experts import MoE, spawn_experts
from gatework.feedforward import GLU, MLP, VersatileFFN
from gatework.optim import AdamW

D, H = 6, 10


def trained(kind, make=torch.optim.AdamW, **settings):
    torch.manual_seed(0)
    part = kind(D, H, **settings).double()
    other = torch.nn.Linear(D, D).double()
    optimizer = make([*other.parameters(), *part.parameters()], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (part(torch.randn(20, D, dtype=torch.float64)) - 1).square().sum().backward()
        optimizer.step()
    return part, optimizer


@pytest.mark.parametrize("kind", [GLU, MLP])
@pytest.mark.parametrize("gate", ["topk(k=2)", "comet", "dselect_k", "permutation_search"])
def test_whole_clones_reproduce_the_dense_model(kind, gate):
    part, _ = trained(kind, activation="xsilu")
    x = torch.randn(15, D, dtype=torch.float64)
    layer = spawn_experts(part.eval(), experts=4, gate=gate, keep=1.0)
    assert isinstance(layer, MoE)
    assert not layer.training
    torch.testing.assert_close(layer(x), part(x), rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.train()(x), part(x), rtol=0, atol=1e-13)
    layer(x).sum().backward()
    assert layer.w_in.grad.any()


def test_masks_are_independent_and_masked_weights_train_on():
    torch.manual_seed(0)
    part = MLP(60, 80)
    layer = spawn_experts(part, experts=3, keep=0.9)
    kept = layer.w_in != 0
    assert torch.equal(layer.w_in[kept], part.up.weight.expand(3, -1, -1)[kept])
    share = kept.float().mean((1, 2))
    torch.testing.assert_close(share, torch.full((3,), 0.9), rtol=0, atol=0.02)
    both = (kept[0] & kept[1]).float().mean().item()
    assert both == pytest.approx(0.81, abs=0.02)
    assert (layer.w_out != 0).float().mean().item() == pytest.approx(0.9, abs=0.02)
    layer(torch.randn(200, 60)).square().sum().backward()
    assert layer.w_in.grad[~kept].any()


@pytest.mark.parametrize("kind", [GLU, MLP])
@pytest.mark.parametrize("make", [torch.optim.AdamW, AdamW])
def test_every_clone_gets_the_moments(kind, make):
    part, optimizer = trained(kind, make)
    sources = [part.gate.weight, part.up.weight] if kind is GLU else [part.up.weight]
    moments = {name: torch.cat([optimizer.state[p][name] for p in sources]) for name in ("exp_avg", "exp_avg_sq")}
    out = {name: optimizer.state[part.down.weight][name].clone() for name in moments}
    layer = spawn_experts(part, experts=4, keep=0.5, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} >= {id(p) for p in layer.parameters()}
    assert not {id(p) for p in part.parameters()} & {id(p) for p in optimizer.param_groups[0]["params"]}
    assert len(optimizer.param_groups[0]["params"]) == 2 + len(list(layer.parameters()))
    assert all(p not in optimizer.state for p in part.parameters())
    for name in moments:
        assert torch.equal(optimizer.state[layer.w_in][name], moments[name].expand(4, -1, -1))
        assert torch.equal(optimizer.state[layer.w_out][name], out[name].expand(4, -1, -1))
    assert int(optimizer.state[layer.w_in]["step"]) == 3
    before = layer.w_in.detach().clone()
    layer(torch.randn(20, D, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    advance(layer, 1, 10)
    assert (layer.w_in != before).any()
    assert int(optimizer.state[layer.w_in]["step"]) == 4
    assert int(optimizer.state[layer.gate.weight]["step"]) == 1


def test_an_optimizer_that_cannot_hand_on_its_state_is_left_alone():
    part, optimizer = trained(GLU)
    optimizer.state[part.up.weight]["step"] += 1
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    with pytest.raises(PartError, match="'step' cannot be copied"):
        spawn_experts(part, optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
    part, _ = trained(MLP)
    with pytest.raises(PartError, match="does not hold all weights of the feed-forward in one group"):
        spawn_experts(part, optimizer=optimizer)


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        (lambda: VersatileFFN(8), {}, "from a glu or an mlp, not from VersatileFFN"),
        (lambda: torch.nn.Linear(3, 3), {}, "not from Linear"),
        (lambda: MLP(D, bias=True), {}, "bias=false"),
        (lambda: GLU(D, order=1), {}, "order=2"),
        (lambda: GLU(D), {"keep": 0.0}, r"in \(0, 1\], got 0.0"),
        (lambda: GLU(D), {"experts": 2, "gate": "topk(k=3)"}, "between 1 and the number of experts 2"),
    ],
)
def test_wrong_input_meets_one_sentence(part, settings, message):
    with pytest.raises(PartError, match=message):
        spawn_experts(part(), **settings)
