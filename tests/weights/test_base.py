"""``apply``, ``fold``, ``pack`` and ``stored_bytes`` over models of this library, of torch and of transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gatework import weights
from gatework.core import PartError
from gatework.core.cost import active_parameters, count_parameters
from gatework.models import Classifier, Decoder

PARTS = ["ternary(per='row')", "stable_rps(ratio=0.5)", "roast(ratio=0.5, tile=(2, 3))"]
every = pytest.mark.parametrize("part", PARTS)


def decoder(**settings) -> Decoder:
    torch.manual_seed(0)
    return Decoder(17, d_model=12, layers=2, heads=2, **settings).eval()


def tokens() -> torch.Tensor:
    return torch.arange(12).view(2, 6)


def refusal(call, *args) -> str:
    with pytest.raises(PartError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def chosen(model: nn.Module, pattern) -> list[str]:
    return list(weights.apply(copy.deepcopy(model), pattern, "ternary").tensors)


FEEDFORWARD = [f"depth.blocks.{i}.feedforward.{name}.weight" for i in (0, 1) for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("blocks.*.feedforward.*", FEEDFORWARD),
        ("feedforward", FEEDFORWARD),
        ("depth.blocks.?.feedforward", FEEDFORWARD),
        ("blocks.0.*", [name for name in FEEDFORWARD if ".0." in name]),
        ("blocks.[1-9].feedforward.down", FEEDFORWARD[5:]),
        ("down.weight", [FEEDFORWARD[2], FEEDFORWARD[5]]),
        (["up", "gate.weight"], [name for name in FEEDFORWARD if "down" not in name]),
        (("embedding", "head"), ["embedding.weight", "head.weight"]),
        ("*", ["embedding.weight", "head.weight", *FEEDFORWARD]),
    ],
)
def test_patterns(pattern, wanted):
    found = chosen(decoder(), pattern)
    assert sorted(name for name in found if "mixer" not in name) == sorted(wanted)


def test_what_counts_as_a_weight():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 3, 4))
            self.bias = nn.Parameter(torch.randn(4))
            self.counts = nn.Parameter(torch.ones(2, 2, dtype=torch.long), requires_grad=False)
            self.register_buffer("table", torch.randn(3, 3))
            self.norm = nn.LayerNorm(4)
            self.conv = nn.Conv2d(1, 2, 3)
            self.attention = nn.MultiheadAttention(4, 2)

    assert sorted(chosen(Model(), "*")) == ["attention.in_proj_weight", "attention.out_proj.weight", "conv.weight", "experts"]
    assert chosen(nn.Linear(3, 4), "weight") == ["weight"]
    assert chosen(nn.Linear(3, 4), "*") == ["weight"]


def test_what_matches_nothing_lists_what_is_near():
    said = refusal(weights.apply, decoder(), "block.*.feedforwad.*", "ternary")
    assert said.startswith("'block.*.feedforwad.*' matches no weight of this Decoder; there are depth.blocks.*.feedforward.")
    assert said.endswith(" and 5 more")
    said = refusal(weights.apply, decoder(), ["feedforward", "mixr"], "ternary")
    assert said.startswith("'mixr' matches no weight of this Decoder; there are ")
    assert refusal(weights.apply, nn.Linear(2, 2), "bias", "ternary") == "'bias' matches no weight of this Linear; there are weight"
    said = "this ReLU has no weights: no floating-point parameter of two axes or more"
    assert refusal(weights.apply, nn.ReLU(), "*", "ternary") == said
    assert refusal(weights.apply, decoder(), "*", "gla").startswith("'gla' is a mixer, not a weight; there are ")
    said = "a weight part is expected, such as 'ternary', not a Tanh"
    assert refusal(weights.apply, decoder(), "*", nn.Tanh()) == said


def test_what_is_done_already_or_not_yet():
    model = decoder()
    assert refusal(weights.fold, model) == "there is nothing to fold: no weight of this Decoder comes from a part"
    said = "there is nothing to pack in this Decoder: call weights.apply(model, pattern, part) first"
    assert refusal(weights.pack, model) == said
    weights.apply(model, "feedforward", "ternary")
    before = repr(model)
    said = "depth.blocks.0.feedforward.gate.weight is parametrized already (Ternary); weights.fold(model) first makes that "
    assert refusal(weights.apply, model, "*", "stable_rps") == said + "permanent"
    weights.apply(model, "mixer", "ternary")  # The rest.
    assert repr(model) != before
    weights.pack(model)
    assert "(TernaryPacked)" in refusal(weights.apply, model, "feedforward", "ternary")
    weights.fold(model)
    weights.apply(model, "feedforward", "ternary")


@every
def test_tied_weights_stay_tied_or_are_refused(part):
    model = decoder()
    before = repr(model)
    for name, other in (("embedding", "head"), ("head", "embedding")):
        said = f"{name}.weight is tied to {other}.weight; name both, or untie them first"
        assert refusal(weights.apply, model, name, part) == said
        assert repr(model) == before
    weights.apply(model, ["embedding", "head"], part)
    stored = model.embedding.parametrizations.weight.original
    assert model.head.parametrizations.weight.original is stored
    assert torch.equal(model.head.weight, model.embedding.weight)
    model(tokens()).sum().backward()
    assert stored.grad.any()
    with torch.no_grad():
        stored.sub_(0.1 * stored.grad)
    assert torch.equal(model.head.weight, model.embedding.weight)
    y = model(tokens())
    packed = copy.deepcopy(model)
    weights.pack(packed)
    assert torch.equal(packed(tokens()), y)
    assert len({id(b) for b in packed.buffers()}) == len(list(packed.buffers()))
    for some in (model, packed):
        weights.fold(some)
        assert some.head.weight is some.embedding.weight
        assert torch.equal(some(tokens()), y)


@every
def test_one_module_in_two_places(part):
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 6))
    report = weights.apply(model, "2", part)  # Known by its second name too.
    assert sorted(report.tensors) == ["0.weight", "2.weight"]
    x = torch.randn(3, 6)
    y = model(x)
    with parametrize.cached():
        assert torch.equal(model(x), y)
    weights.pack(model)
    assert torch.equal(model(x), y)
    weights.fold(model)
    assert model[0] is model[2]
    assert type(layer) is nn.Linear
    assert torch.equal(model(x), y)


def test_reports():
    model = decoder()
    total, size = count_parameters(model), weights.stored_bytes(model)
    report = weights.apply(model, "feedforward", "stable_rps(ratio=0.5)")
    shared = sum(torch.Size(shape).numel() for shape in report.tensors.values())
    assert set(report.tensors) == set(FEEDFORWARD)
    assert report.tensors["depth.blocks.0.feedforward.up.weight"] == tuple(decoder().blocks[0].feedforward.up.weight.shape)
    assert report.parameters == (total, total - shared + shared // 2)
    assert str(report).startswith("6 weights\n  depth.blocks.0.feedforward.gate.weight (32, 12)\n")
    assert str(report).endswith(f"parameters {total:,} -> {count_parameters(model):,}\n" + f"bytes {size:,} -> {report.bytes[1]:,}")
    packed = weights.pack(model)
    places = 6 * (4 + 6 * 8)  # lam and the six settings.
    assert packed.bytes == (report.bytes[1], size - 4 * (shared - shared // 2) + places)
    assert weights.fold(model).bytes == (packed.bytes[1], size)


def test_stored_bytes():
    class Shares(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 3)
            self.b = nn.Linear(4, 3, bias=False)
            self.b.weight = self.a.weight
            self.register_buffer("view", self.a.bias.detach()[1:])
            self.register_buffer("bytes", torch.zeros(7, dtype=torch.uint8), persistent=False)

    assert weights.stored_bytes(Shares()) == 4 * (12 + 3) + 7
    assert weights.stored_bytes(nn.ReLU()) == 0


@every
def test_other_parametrizations_are_left_alone(part):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)), nn.Linear(5, 5))
    weights.apply(model, "1", part)
    assert "parametrized already" in refusal(weights.apply, model, "0", part)
    weights.fold(model)
    assert parametrize.is_parametrized(model[0], "weight")
    assert not parametrize.is_parametrized(model[1])


@every
@pytest.mark.parametrize(
    "settings",
    [
        {"mixer": "gla, attention"},
        {"feedforward": "moe(experts=3, shared=1)", "mixer": "gated_attention"},
        {"feedforward": "versatile_ffn(d_ff=16)", "depth": "gateskip"},
    ],
    ids=["gla", "moe", "versatile_ffn"],
)
def test_inside_a_decoder(part, settings):
    """All forms compute the same, and every parameter is reached."""
    model = decoder(weight=part, **settings)
    model.train()
    loss = model(tokens()).logsumexp(-1).sum()
    loss.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unreached
    model.eval()
    y, drawn = model(tokens()), model.generate(tokens(), 4, temperature=0.0)
    packed, folded = copy.deepcopy(model), copy.deepcopy(model)
    weights.pack(packed)
    weights.fold(folded)
    for other in (packed, folded):
        assert torch.equal(other(tokens()), y)
        assert torch.equal(other.generate(tokens(), 4, temperature=0.0), drawn)
    assert repr(folded) == repr(decoder(**settings))


def test_the_setting_of_the_models():
    plain, ternary = decoder(), decoder(weight="ternary(per='row')")
    assert count_parameters(plain) == count_parameters(ternary)
    names = [name for name, _ in ternary.named_parameters() if "parametrizations" in name]
    matrices = [name for name, p in plain.named_parameters() if p.dim() > 1 and "blocks" in name]
    assert [name.replace("parametrizations.weight.original", "weight") for name in names] == matrices
    shared = decoder(weight="stable_rps(ratio=0.25)")
    n = sum(p.numel() for name, p in plain.named_parameters() if name in matrices)
    assert count_parameters(plain) - count_parameters(shared) == n - n // 4
    assert refusal(lambda: decoder(weight="glu")).startswith("'glu' is a feedforward, not a weight; there are ")
    for backbone in ("mlp", "convnet", "vit"):
        model = Classifier((1, 8, 8), 10, backbone=backbone, d_model=16, weight="ternary")
        assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
        assert not parametrize.is_parametrized(model.head)
        assert any(parametrize.is_parametrized(module) for module in model.blocks.modules())


def test_active_parameters_of_a_mixture_count_what_is_stored():
    plain = decoder(feedforward="moe(experts=4, gate=topk(k=1))")
    assert active_parameters(decoder(feedforward="moe(experts=4, gate=topk(k=1))", weight="ternary")) == active_parameters(plain)
    shared = decoder(feedforward="moe(experts=4, gate=topk(k=1))", weight="stable_rps(ratio=0.25)")
    assert active_parameters(shared) == count_parameters(shared)  # Every expert reads the same array.


@every
def test_torchs_transformer_layer(part):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).double()
    weights.apply(layer, ["self_attn", "linear?"], part)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    y = layer(x)
    packed, folded = copy.deepcopy(layer), copy.deepcopy(layer)
    weights.pack(packed)
    weights.fold(folded)
    for other in (packed, folded):
        torch.testing.assert_close(other(x), y, rtol=1e-12, atol=1e-12)
        with torch.no_grad():  # Torch's fused path reads the weights by itself.
            torch.testing.assert_close(other.eval()(x), y.detach(), rtol=1e-12, atol=1e-12)


@every
def test_a_hugging_face_llama(part):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 19}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).eval()
    report = weights.apply(model, "layers.*", part)
    assert len(report.tensors) == 2 * 7
    assert all(name.startswith("model.layers.") for name in report.tensors)
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    y = model(tokens()).logits
    drawn = model.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    for change in (weights.pack, weights.fold):
        change(model)
        assert torch.equal(model(tokens()).logits, y)
        assert torch.equal(model.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0), drawn)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_frozen_weights_stay_frozen():
    for part in PARTS:
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).requires_grad_(False)
        weights.apply(model, "*", part)
        assert not any(p.requires_grad for p in model.parameters())
        weights.fold(model)
        assert not any(p.requires_grad for p in model.parameters())


def test_everything_works_on_the_meta_device():
    for part in PARTS:
        with torch.device("meta"):
            model = decoder(weight=part)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert count_parameters(model) == count_parameters(decoder(weight=part))


def test_no_pattern_is_refused():
    with pytest.raises(PartError, match=r"no pattern is given; '\*' takes every weight"):
        weights.apply(nn.Linear(2, 2), [], "ternary")
