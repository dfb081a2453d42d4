"""Channel gates in models: attached by pattern, folded exactly, closed channels cut out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatework import gates, weights
from gatework.core import PartError, losses
from gatework.core.cost import count_flops
from gatework.models import Classifier, Decoder

EXACT = {"rtol": 0, "atol": 1e-12}


def randn(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(make, seed=0):
    torch.manual_seed(seed)
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def close_some(model, share=0.5, seed=3):
    """Some gates shut, the others open."""
    for i, gate in enumerate(m for m in model.modules() if isinstance(m, gates.TrainableGate)):
        with torch.no_grad():
            gate.weight.copy_(torch.where(randn(len(gate.weight), seed=seed + i).argsort() < share * len(gate.weight), -1.0, 1.0))
    return model


def mlp():
    inner = nn.Sequential(nn.Linear(6, 7, bias=False), nn.ReLU())
    return nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Dropout(), inner, nn.Linear(7, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=0), nn.GELU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3),
    )  # fmt: skip


def test_each_side_multiplies_its_channels():
    linear, conv, norm = nn.Linear(3, 4).double(), nn.Conv2d(2, 6, 3, groups=2).double(), seeded(lambda: nn.BatchNorm2d(5))
    x, picture, wide = randn(2, 7, 3), randn(2, 2, 5, 6), randn(2, 5, 3, 3)
    plain = linear(x), conv(picture), norm(wide)
    for module in (linear, conv, norm):
        gates.attach(nn.ModuleList([module]), "0", "feature_selection")
    torch.testing.assert_close(linear(x), plain[0] * linear.channel_gate.values(), **EXACT)
    torch.testing.assert_close(conv(picture), plain[1] * conv.channel_gate.values()[:, None, None], **EXACT)
    torch.testing.assert_close(conv(picture[0]), plain[1][0] * conv.channel_gate.values()[:, None, None], **EXACT)
    torch.testing.assert_close(norm(wide), plain[2] * norm.channel_gate.values()[:, None, None], **EXACT)
    linear, conv = nn.Linear(3, 4).double(), nn.Conv1d(2, 6, 3, groups=2).double()
    for module, given in ((linear, x), (conv, picture[..., 0])):
        other = copy.deepcopy(module)
        gate = gates.attach(nn.ModuleList([module]), "0", "feature_selection", side="input")["0"]
        scale = gate.values() if module is linear else gate.values()[:, None]
        torch.testing.assert_close(module(given), other(given * scale), **EXACT)


def constants():
    """A batch norm and a softplus make something of the zeros, which a convolution without bias has to add."""
    inner = nn.BatchNorm2d(6), nn.Softplus(), nn.Conv2d(6, 4, 3, bias=False)
    return nn.Sequential(nn.Conv2d(2, 6, 1), *inner, nn.Flatten(), nn.Linear(16, 5))


def classifier(backbone, activation):
    return lambda: Classifier((1, 8, 8), 3, backbone, d_model=12, layers=3, activation=activation)


def decoder():
    return Decoder(11, d_model=16, layers=2, heads=2, feedforward="glu, mlp(bias=true)", mixer="attention, gla")


@pytest.mark.parametrize(
    ("make", "pattern", "side", "given"),
    [
        (mlp, "*", "output", randn(4, 5)),
        (mlp, ["0", "4"], "input", randn(4, 5)),
        (convolutions, "*", "output", randn(3, 2, 9, 8)),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, padding=1, padding_mode="reflect")), "*", "input", randn(3, 4, 9)),
        (decoder, ["mixer.o_proj", "feedforward.down"], "output", torch.arange(20).remainder(11).view(2, 10)),
        (decoder, ["feedforward", "q_proj"], "input", torch.arange(20).remainder(11).view(2, 10)),
        (classifier("mlp", "silu"), "*", "output", randn(3, 1, 8, 8)),
        (classifier("convnet", "relu"), "_blocks", "output", randn(3, 1, 8, 8)),
        (lambda: Classifier((1, 8, 8), 3, "vit", d_model=12, layers=2, heads=2), ["*", "head"], "input", randn(3, 1, 8, 8)),
    ],
    ids=["mlp", "mlp-input", "convolutions", "grouped", "decoder", "decoder-input", "classifier-mlp", "classifier-convnet", "vit"],
)
def test_folded_equals_gated(make, pattern, side, given):
    model = seeded(make)
    plain = model(given)
    names = list(model.state_dict())
    made = gates.attach(model, pattern, "feature_selection(scale=3)", side=side)
    for gate in made.values():
        nn.init.normal_(gate.weight)
    gated = model(given)
    assert (gated - plain).abs().max() > 1e-3
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given), gated)
        assert gates.fold(other) == list(made)
        torch.testing.assert_close(other(given), gated, **EXACT)
        assert list(other.state_dict()) == names
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    assert torch.equal(model(given), gated), "folding a copy has changed the original"


def test_folding_keeps_the_parameters_an_optimizer_holds():
    model = seeded(mlp)
    before = list(model.parameters())
    gates.attach(model, "*", "feature_selection")
    gates.fold(model)
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]


CUTS = [
    pytest.param(mlp, ["0", "3.0"], "output", randn(4, 5), id="mlp"),
    pytest.param(mlp, ["3.0", "4"], "input", randn(4, 5), id="mlp-input"),
    pytest.param(lambda: convolutions()[3:], ["4", "8"], "output", randn(3, 6, 8, 8), id="convolutions"),
    pytest.param(convolutions, ["1", "4"], "output", randn(3, 2, 9, 8), id="norm"),
    pytest.param(constants, ["0", "3"], "output", randn(3, 2, 4, 4), id="constants"),
    pytest.param(
        lambda: nn.Sequential(nn.Conv1d(2, 6, 1), nn.Flatten(), nn.SiLU(), nn.Linear(24, 5)),
        "3", "input", randn(3, 2, 4), id="positions",
    ),
    pytest.param(
        lambda: nn.Sequential(nn.Conv2d(2, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding="same", padding_mode="circular")),
        "0", "output", randn(3, 2, 4, 4), id="circular",
    ),
    pytest.param(classifier("mlp", "sigmoid"), "_blocks", "output", randn(3, 1, 8, 8), id="classifier"),
    pytest.param(classifier("convnet", "relu"), "_blocks", "output", randn(3, 1, 8, 8), id="convnet"),
    pytest.param(decoder, "feedforward.down", "input", torch.arange(20).remainder(11).view(2, 10), id="decoder"),
    pytest.param(decoder, "feedforward.up", "output", torch.arange(20).remainder(11).view(2, 10), id="decoder-up"),
    pytest.param(decoder, "feedforward.gate", "output", torch.arange(20).remainder(11).view(2, 10), id="decoder-gate"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "pattern", "side", "given"), CUTS)
@pytest.mark.parametrize("share", [0.5, 1.0, 0.0])
def test_compacted_equals_gated_and_executes_less(make, pattern, side, given, share):
    model = seeded(make)
    made = gates.attach(model, pattern, "trainable_gate", side=side)
    close_some(model, share)
    for gate in made.values():
        if share == 0.5 and len(gate.weight) == 24:  # Four positions of six channels: only whole channels can go, here 1, 3 and 4.
            gate.weight.data.view(6, 4)[:] = torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
            gate.weight.data[[0, 23]] = -1
    gated = model(given)
    with count_flops() as before:
        model(given)
    report = gates.compact(model)
    torch.testing.assert_close(model(given), gated, **EXACT)
    assert not any(isinstance(m, gates.TrainableGate) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with count_flops() as after:
        model(given)
    if share:
        assert report
        assert all(0 < left < before for before, left in report.values())
        assert after.total < before.total
        assert share == 0.5 or all(left == 1 for _, left in report.values())
        named = dict(model.named_modules())
        for name, (_, left) in report.items():
            assert getattr(named[name], "out_features", None) == left or named[name].out_channels == left
    else:
        assert report == {}
        assert after.total == before.total


def test_compacted_flops_are_those_of_the_smaller_layers():
    model = seeded(lambda: Decoder(11, d_model=16, layers=1, heads=2, d_ff=40))
    made = gates.attach(model, "down", "trainable_gate", side="input")
    with torch.no_grad():
        made["depth.blocks.0.feedforward.down"].weight[:25] = -1
    feedforward, x = model.blocks[0].feedforward, randn(7, 16)
    assert gates.compact(model) == {f"depth.blocks.0.feedforward.{name}": (40, 15) for name in ("gate", "up")}
    with count_flops() as count:
        feedforward(x)
    assert count.total == 2 * 7 * 16 * 15 * 3


def test_a_compacted_model_learns_on():
    model = close_some(seeded(lambda: (m := mlp(), gates.attach(m, "0", "trainable_gate"))[0]))
    gates.compact(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = randn(16, 5), randn(16, 3, seed=2)
    before = F.mse_loss(model(x), y)
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    assert F.mse_loss(model(x), y) < before


class Llama(nn.Module):
    """The feed-forward of Llama's kind, by its names."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(4, 9), nn.Linear(4, 9), nn.Linear(9, 4)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_feed_forwards_of_llama_s_kind_are_cut():
    model = seeded(Llama)
    gates.attach(model, "down_proj", "trainable_gate", side="input")
    gated = close_some(model)(randn(5, 4))
    report = gates.compact(model)
    assert {left for _, left in report.values()} == {4}
    torch.testing.assert_close(model(randn(5, 4)), gated, **EXACT)


def test_gates_of_one_call_share_their_target():
    model = seeded(mlp)
    made = gates.attach(model, ["0", "3.0"], "trainable_gate(target=0.25, penalty=2)")
    with torch.no_grad():
        for gate, closed in zip(made.values(), (4, 1), strict=True):
            gate.weight[:closed] = -0.5
    for some in (model, copy.deepcopy(model)):
        some.train()(randn(4, 5))
        said = losses(some)
        assert list(said) == ["0.channel_gate.target"]
        torch.testing.assert_close(said["0.channel_gate.target"].item(), 2 * (0.25 - 5 / 13) ** 2, **EXACT)
        said["0.channel_gate.target"].backward()
        for name in ("0.channel_gate.weight", "3.0.channel_gate.weight"):
            slope = 2 * 2 * (0.25 - 5 / 13) / 13
            grad = dict(some.named_parameters())[name].grad
            torch.testing.assert_close(grad, torch.full_like(grad, slope), **EXACT)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.after(x + self.linear(x))


UNCUT = [
    (Residual, "linear", "output", "linear"),
    (mlp, "4", "output", "4"),  # Nobody reads it in this model.
    (mlp, "0", "input", "0"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), "0", "output", "0"),
    (lambda: nn.Sequential(nn.Linear(4, 4), Residual(), nn.Linear(4, 4)), "0", "output", "0"),
    (lambda: nn.Sequential(nn.Linear(4, 4), nn.MaxPool1d(2, 1), nn.Linear(3, 4)), "0", "output", "0"),
    (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1)), "0", "output", "0"),
    (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=2)), "0", "output", "0"),
    (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Sigmoid(), nn.AvgPool2d(3, padding=1), nn.Conv2d(4, 4, 1)), "0", "output", "0"),
    (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Linear(4, 4)), "0", "output", "0"),  # It reads positions, not channels.
    (lambda: Decoder(5, d_model=8, layers=1, heads=2, feedforward="glu(activation=sigmoid)"), "feedforward.gate", "output", "gate"),
    (lambda: Decoder(5, d_model=8, layers=1, heads=2), "o_proj", "output", "o_proj"),
    (lambda: Classifier((1, 8, 8), 3, d_model=12, layers=2, feedforward="glu"), "_blocks.0", "output", r"_blocks\.0\.1"),
]


@pytest.mark.parametrize(("make", "pattern", "side", "name"), UNCUT, ids=range(len(UNCUT)))
def test_what_cannot_be_cut_is_refused_and_untouched(make, pattern, side, name):
    model = seeded(make)
    gates.attach(model, pattern, "trainable_gate", side=side)
    close_some(model)
    before = copy.deepcopy(model.state_dict())
    sentence = rf"^compact cannot cut .*{name}: its {side} channels do not run between .* gates\.fold keeps"
    with pytest.raises(PartError, match=sentence):
        gates.compact(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    gates.fold(model)


def test_tied_and_parametrized_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    gates.attach(model, "0", "trainable_gate")
    close_some(model)
    weights.apply(model, "2", "ternary")
    with pytest.raises(PartError, match=r"^2 is parametrized, and gates fold into plain weights only"):
        gates.compact(model)
    weights.fold(model)
    model[2].weight = model[0].weight
    for function in (gates.fold, gates.compact):
        with pytest.raises(PartError, match=r"^0 shares its weight with another module, which has no such gate; untie them first"):
            function(model)


def test_wrong_calls_meet_one_sentence():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.MultiheadAttention(4, 2))
    for call, message in [
        (lambda: gates.attach(model, "0", "trainable_gate", side="middle"), "side is output or input, not 'middle'"),
        (lambda: gates.attach(model, "0", gates.TrainableGate(4)), "an instance would be shared"),
        (lambda: gates.attach(model, [], "trainable_gate"), "no pattern is given"),
        (lambda: gates.attach(model, "2.out_proj", "trainable_gate"), r"'2.out_proj' matches no module .*; there are 0"),
        (lambda: gates.attach(nn.ReLU(), "*", "trainable_gate"), "this ReLU has no linear layer, convolution or batch norm"),
        (lambda: gates.attach(model, "0", "topk"), "'topk' is a gate, not a channel_gate"),
        (lambda: gates.fold(model), "there is no channel gate in this Sequential; gates.attach puts them in"),
        (lambda: gates.compact(model), "there is no channel gate"),
    ]:
        with pytest.raises(PartError, match=message):
            call()
    assert not any(m._forward_hooks for m in model.modules())
    gates.attach(model, "0", "trainable_gate")
    with pytest.raises(PartError, match="0 has a gate on its output already"):
        gates.attach(model, ["0"], "feature_selection")
    assert isinstance(gates.attach(model, ["0"], "feature_selection", side="input")["0"], gates.FeatureSelection)
    assert [name for name, _ in model[0].named_children()] == ["channel_gate", "input_gate"]
