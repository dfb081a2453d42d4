"""Up-cycled feed-forwards: the same model with one loop, the equations with more, undone, saved, decoded, combined, trained."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from gatework import core, surgery
from gatework.core.errors import PartError
from gatework.surgery.versatile_ffn import Branch

pytestmark = pytest.mark.oldest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def logits(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_one_loop_is_the_model_and_undo_gives_it_back(tiny, tokens, family):
    model = tiny(family)
    before = {path: id(module) for path, module in model.named_modules()}
    expected = logits(model, tokens())
    conversion = surgery.versatile_ffn(model, loops=1)
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-11)
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.zero_()
    conversion.undo()
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_every_layer_is_the_equation_over_its_weights(tiny, tokens, layout):
    model = tiny("llama")
    original = copy.deepcopy(model)
    surgery.versatile_ffn(model, experts=4, k=1, loops=2, layout=layout)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda module, given, y, i=i: seen.update({i: (given[0], given[0] + y)}))
    logits(model, tokens())
    for i, layer in enumerate(original.model.layers):
        part, (x, got) = model.model.layers[i].mlp.part, seen[i]
        x, got = x.flatten(0, 1), got.flatten(0, 1)
        dense, norm = layer.mlp, layer.post_attention_layernorm
        hidden = dense.act_fn(dense.gate_proj(norm(x))) * dense.up_proj(norm(x))
        first = x + dense.down_proj(hidden)
        second = first + dense.mlp(norm(first)) if hasattr(dense, "mlp") else first + dense(norm(first))
        chosen = (x @ part.expert_router.weight.T).argmax(1)
        unit = torch.arange(40)
        slice_of = unit // 10 if layout == "contiguous" else unit % 4
        wide = x + dense.down_proj(hidden * (slice_of == chosen[:, None]))
        loops = (x @ part.depth_router.weight.T).argmax(1)[:, None] + 1
        torch.testing.assert_close(got, torch.where(loops == 2, second, (first + wide) / 2), rtol=0, atol=1e-11)
        assert len(loops.unique()) == 2


def test_report_and_settings(tiny):
    model = tiny("llama")
    before = core.cost.count_parameters(model)
    conversion = surgery.versatile_ffn(model)
    assert conversion.parameters == (before, before + 3 * 24 * (8 + 4))
    assert conversion.replaced == ["3 feed-forwards and their norms by versatile_ffn, 864 parameters of routers"]
    assert str(conversion).startswith("versatile_ffn(experts=8, k=2, loops=4, layout='contiguous', balance=5e-05, path='both') on")
    assert "up, down" in str(surgery.describe(model))
    part = model.model.layers[0].mlp.part
    assert (part.experts, part.k, part.loops, part.d_ff) == (8, 2, 4, 40)
    assert not part.training
    surgery.versatile_ffn(train := tiny("llama").train(), path="wide", k=1)
    assert train.model.layers[0].mlp.part.training
    assert train.model.layers[0].mlp.part.depth_router is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_and_loaded_bitwise(tiny, tokens, tmp_path, dtype):
    model = tiny("llama", dtype=dtype)
    surgery.versatile_ffn(model, experts=4, loops=3)
    for module in model.modules():
        core.advance(module, 3, 10)
    surgery.save(model, tmp_path)
    loaded = surgery.load(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tau = loaded.model.layers[0].mlp.part.tau
    assert tau.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert 0.1 < float(tau) < 5
    if dtype == torch.bfloat16:
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_generation_with_a_cache_equals_without(tiny, left_padded):
    model = tiny("llama")
    surgery.versatile_ffn(model)
    ids, mask = left_padded()
    given = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))


@pytest.mark.parametrize("first", ["versatile_ffn", "gateskip"])
def test_beside_other_conversions(tiny, tokens, first):
    model = tiny("llama")
    expected = logits(model, tokens())
    steps = [lambda: surgery.versatile_ffn(model, loops=1), lambda: surgery.gateskip(model, budget=1.0)]
    done = [step() for step in (steps if first == "versatile_ffn" else steps[::-1])]
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-11)
    done.append(surgery.ternary(model, pack=True))
    assert logits(model, tokens()).isfinite().all()
    for conversion in reversed(done):
        conversion.undo()
    assert torch.equal(logits(model, tokens()), expected)


def test_distillation_moves_temperature_and_routers(tiny, tokens):
    model = tiny("llama", dtype=torch.float32)
    surgery.versatile_ffn(model, experts=4, loops=2, balance=0.1)
    part = model.model.layers[1].mlp.part
    routers, weights = part.depth_router.weight.clone(), part.up.weight.clone()
    values = surgery.distill(model, None, [tokens(4, 16)], steps=4, parameters="new", lr=1e-2)
    assert float(part.tau) == pytest.approx(0.1)
    assert not torch.equal(part.depth_router.weight, routers)
    assert torch.equal(part.up.weight, weights)
    values = surgery.distill(model, None, [tokens(4, 16)], steps=12, lr=1e-2)
    assert values[-1] < values[0] - 0.3


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "from_dense takes a gated unit of order 2 without biases, not this GPT2MLP"),
        ("bert", {}, "and the blocks of bert norm the sum"),
        ("llama", {"experts": 7}, "versatile_ffn cannot take over model.layers.0.mlp: d_ff 40 is not divisible by experts 7"),
        ("llama", {"k": 9}, "k must be between 1 and experts 8, got 9"),
    ],
)
def test_what_cannot_be_converted_is_left_as_it_was(tiny, tokens, family, settings, message):
    model = tiny(family)
    expected = logits(model, tokens())
    with pytest.raises(PartError, match=message):
        surgery.versatile_ffn(model, **settings)
    assert torch.equal(logits(model, tokens()), expected)
    assert not any(isinstance(module, Branch) for module in model.modules())


def test_a_second_time_is_refused(tiny):
    model = tiny("llama")
    surgery.versatile_ffn(model)
    with pytest.raises(PartError, match="the feed-forwards are versatile_ffn already: undo that conversion first"):
        surgery.versatile_ffn(model)


@pytest.mark.slow
def test_smollm2(smollm2):
    """192 hidden units a slice; the model itself with one loop, another one with more."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40000, (2, 24), generator=generator)
    expected = logits(smollm2, ids)
    for settings in ({"loops": 1}, {"loops": 2}):
        conversion = surgery.versatile_ffn(smollm2, **settings)
        try:
            assert smollm2.model.layers[0].mlp.part.d_ff // 8 == 192
            difference = (logits(smollm2, ids) - expected).abs().max()
            assert (difference < 1e-3) == (settings["loops"] == 1)
        finally:
            conversion.undo()
    assert torch.equal(logits(smollm2, ids), expected)
    assert isinstance(smollm2, transformers.LlamaForCausalLM)
