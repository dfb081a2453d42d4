"""Attention replaced by lizard: wiring, the two stages, decoding, undone, saved, refused."""

from __future__ import annotations

import copy

import pytest
import torch

from gatework import core, surgery
from gatework.core.errors import PartError
from gatework.mixers import Lizard
from gatework.mixers.base import rotary_angles
from gatework.surgery.lizard import LizardAttention

pytestmark = pytest.mark.oldest

FAMILIES = ("llama", "qwen2", "mistral")


def logits(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_gated_part_and_sinks_it_is_the_model_and_undo_gives_it_back(tiny, left_padded, monkeypatch, family):
    base = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    model = tiny(family, **({"sliding_window": None} if family == "mistral" else base))
    before = {path: id(module) for path, module in model.named_modules()}
    ids, mask = left_padded()
    real = mask.bool()
    expected = logits(model, ids, attention_mask=mask)
    conversion = surgery.lizard(model, window=64, sinks=0)
    assert not torch.allclose(logits(model, ids, attention_mask=mask)[real], expected[real], atol=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(Lizard, "_past", lambda self, q, *_: torch.zeros_like(q))
        # The model's angles are float32 numbers whatever its dtype.
        patch.setattr("gatework.mixers.lizard.rotary_angles", lambda *given: rotary_angles(*given[:3], torch.float32))
        torch.testing.assert_close(logits(model, ids, attention_mask=mask)[real], expected[real], rtol=0, atol=1e-5)
    conversion.undo()
    assert {path: id(module) for path, module in model.named_modules()} == before
    assert torch.equal(logits(model, ids, attention_mask=mask), expected)


def test_report_and_settings(tiny):
    model = tiny("llama")
    before = core.cost.count_parameters(model)
    conversion = surgery.lizard(model, features=5, window=7, sinks=3)
    added = 3 * (2 * 4 * 6 * 5 + 24 + 4 * 3 + 1)
    assert conversion.parameters == (before, before + added)
    assert conversion.replaced == [f"3 attentions by lizard, {added:,} parameters of features, gates, sinks and alphas"]
    part = model.model.layers[1].self_attn.part
    assert (part.heads, part.kv_heads, part.features, part.window, part.sinks.shape[1]) == (4, 2, 5, 7, 3)
    assert part.q_features.dtype == torch.float64
    assert not part.training
    assert "part.q_proj" in surgery.describe(model).linears[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_without(tiny, left_padded, family):
    model = tiny(family)
    surgery.lizard(model, window=5)
    ids, mask = left_padded()
    given = {"attention_mask": mask, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    assert torch.equal(model.generate(ids, **given), model.generate(ids, use_cache=False, **given))
    beams = given | {"num_beams": 3}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))


def test_the_cache_stops_growing(tiny, tokens):
    model = tiny("llama")
    surgery.lizard(model, window=4)
    with torch.no_grad():
        cache = model(tokens(2, 9), use_cache=True).past_key_values
        sizes = []
        for _ in range(3):
            sizes.append(sum(layer.state.nbytes for layer in cache.layers))
            model(tokens(2, 1), past_key_values=cache)
    assert sizes == 3 * [3 * 2 * model.model.layers[0].self_attn.part.state_bytes(4)]
    assert cache.get_seq_length() == 12


def test_first_stage_sees_the_old_model_and_moves_the_new_parameters_alone(tiny, tokens):
    model = tiny("llama", dtype=torch.float32)
    teacher = copy.deepcopy(model)
    surgery.lizard(model, window=4)
    layers = [layer.self_attn for layer in model.model.layers]
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = tokens(4, 24)
    with surgery.attention_transfer(model):
        model.train()
        torch.testing.assert_close(logits(model, ids, use_cache=False), logits(teacher, ids), rtol=0, atol=1e-5)
        seen = {}
        hooks = [layer.part.register_forward_hook(lambda part, x, y, i=i: seen.update({i: y})) for i, layer in enumerate(layers)]
        inputs = {}
        for i, layer in enumerate(teacher.model.layers):
            layer.self_attn.register_forward_hook(lambda module, x, y, i=i: inputs.update({i: y[0]}))
        model(ids, use_cache=False)
        logits(teacher, ids)
        said = core.losses(model)
        for i in range(3):
            wanted = (seen[i] - inputs[i]).square().mean() / inputs[i].square().mean()
            torch.testing.assert_close(said[f"model.layers.{i}.self_attn.part.transfer"], wanted, rtol=1e-4, atol=0)
            hooks[i].remove()
        model.eval()
        values = surgery.distill(model, None, [ids], steps=30, lr=2e-2, parameters="new")
    assert values[-1] < values[0] - 0.2 * sum(value.item() for value in said.values())
    moved = {name.rpartition("part.")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"q_features", "k_features", "gate_proj.weight", "sinks", "alpha"}
    assert not any(layer.transfer for layer in layers)
    model.eval()(ids)
    assert core.losses(model) == {}


def test_padding_has_no_say_in_the_transfer(tiny, left_padded):
    model = tiny("llama")
    surgery.lizard(model, window=4)
    ids, mask = left_padded()
    said = []
    with surgery.attention_transfer(model):
        model.train()
        for filler in (0, 7):
            model(torch.where(mask.bool(), ids, filler), attention_mask=mask, use_cache=False)
            said.append(core.losses(model))
    torch.testing.assert_close(said[0], said[1])


def test_second_stage(tiny, tokens):
    model = tiny("llama", dtype=torch.float32)
    teacher = copy.deepcopy(model)
    surgery.lizard(model, window=4)
    values = surgery.distill(model, teacher, [tokens(4, 24)], steps=12, lr=1e-2)
    assert values[-1] < values[0] - 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_and_loaded_bitwise(tiny, tokens, tmp_path, dtype):
    model = tiny("llama", dtype=dtype)
    surgery.lizard(model, features=4, window=5, gates="head")
    surgery.save(model, tmp_path)
    loaded = surgery.load(tmp_path)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if dtype == torch.bfloat16:
        assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_beside_other_conversions(tiny, tokens):
    model = tiny("llama")
    expected = logits(model, tokens())
    done = [surgery.lizard(model), surgery.versatile_ffn(model, loops=1), surgery.ternary(model, pack=True)]
    assert logits(model, tokens()).isfinite().all()
    for conversion in reversed(done):
        conversion.undo()
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gpt2", {}, "it has no q_proj"), ("bert", {}, "it has no q_proj"), ("qwen3", {}, "have norms"),
        ("smollm3", {}, "no rotary"),
        ("llama", {"head_dim": 8}, "4 heads of 8 are not as wide as the stream, 24"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "are not the plain ones"),
    ],
)
def test_what_cannot_be_converted_is_left_as_it_was(tiny, tokens, family, settings, message):
    model = tiny(family, **settings)
    expected = logits(model, tokens())
    with pytest.raises(PartError, match=message):
        surgery.lizard(model)
    assert torch.equal(logits(model, tokens()), expected)
    assert not any(isinstance(module, LizardAttention) for module in model.modules())


def test_wrong_calls(tiny, tokens):
    model = tiny("llama")
    with pytest.raises(PartError, match=r"convert it by surgery\.lizard first"), surgery.attention_transfer(model):
        pass
    with pytest.raises(PartError, match="features and window must be at least 1"):
        surgery.lizard(model, window=0)
    old = model(tokens(), use_cache=True).past_key_values
    surgery.lizard(model)
    with pytest.raises(PartError, match="the attention is lizard already"):
        surgery.lizard(model)
    with pytest.raises(PartError, match="its attention has been replaced by another mixer; undo that conversion first"):
        surgery.gateskip(model)
    with pytest.raises(PartError, match="before its conversion"):
        model(tokens(), past_key_values=old)
    with pytest.raises(PartError, match="use_cache=False"), surgery.attention_transfer(model):
        model.train()(tokens(), use_cache=True)
    other = tiny("llama")
    surgery.gateskip(other)
    with pytest.raises(PartError, match="undo that conversion first"):
        surgery.lizard(other)
