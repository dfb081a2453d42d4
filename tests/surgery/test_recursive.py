"""Pretrained layers that share weights: the same model at full rank, undone bitwise, saved, decoded, combined."""

from __future__ import annotations

import copy
import lzma
from importlib import resources

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from gatework import surgery
from gatework.core.cost import count_parameters
from gatework.core.errors import PartError
from gatework.depth.recursive import LoRALinear

from .conftest import smollm2_folder

pytestmark = pytest.mark.oldest

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def logits(model, ids, **given):
    with torch.no_grad():
        return model(ids, **given).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_with_own_norms_is_the_model(tiny, tokens, family):
    model = tiny(family, num_hidden_layers=6, **({"no_rope_layers": [1, 0] * 3} if family == "smollm3" else {}))
    expected, before = logits(model, tokens()), state(model)
    for loops, init in ((2, "average"), (3, "stepwise")):
        conversion = surgery.recursive(model, loops=loops, rank=100, init=init, share_norms=False)
        torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-9)
        with torch.no_grad():
            for parameter in model.model.layers.parameters():
                parameter.add_(1.0)
        conversion.undo()
        assert torch.equal(logits(model, tokens()), expected)
        torch.testing.assert_close(state(model), before, rtol=0, atol=0)
        conversion = surgery.recursive(model, loops=loops, rank=2, init=init)
        assert (logits(model, tokens()) - expected).abs().max() > 1e-2
        conversion.undo()


@pytest.mark.parametrize("rank", [0, 3])
def test_report(tiny, rank):
    model = tiny("llama", num_hidden_layers=6)
    before = count_parameters(model)
    layer = count_parameters(model.model.layers[0])
    linears = [module for module in model.model.layers[0].modules() if isinstance(module, torch.nn.Linear)]
    conversion = surgery.recursive(model, loops=3, rank=rank)
    update = sum(rank * (linear.in_features + linear.out_features) for linear in linears)
    assert conversion.parameters == (before, before - 4 * layer + 6 * update)
    assert conversion.parameters[1] == count_parameters(model)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert conversion.stored_bytes == tuple(8 * n + buffers for n in conversion.parameters)
    second = f"42 linears by shared ones with updates, {6 * update:,} parameters"
    assert conversion.replaced == ["6 layers by 3 loops over 2", second][: 2 if rank else 1]
    assert str(conversion).startswith(f"recursive(loops=3, rank={rank}, init='average', lora='svd', share_norms=True) on Llama")
    assert len([module for module in model.modules() if isinstance(module, LoRALinear)]) == (42 if rank else 0)
    described = str(surgery.describe(model))
    assert "q_proj, k_proj, v_proj, o_proj" in described
    assert "6 blocks" in described


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 3}, {"rank": 3, "init": "stepwise", "share_norms": False}])
def test_generation_with_a_cache_equals_without(tiny, left_padded, family, settings):
    model = tiny(family, num_hidden_layers=4)
    surgery.recursive(model, **settings)
    ids, mask = left_padded()
    given = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    made = [model.generate(ids, do_sample=False, use_cache=cached, **given) for cached in (True, False)]
    assert torch.equal(*made)
    cache = DynamicCache(config=model.config)
    steps = [logits(model, ids[:1, i : i + 1], past_key_values=cache) for i in range(ids.shape[1])]
    torch.testing.assert_close(torch.cat(steps, 1), logits(model, ids[:1]), rtol=0, atol=1e-10)
    assert len(cache.layers) == 4
    keys = [layer.keys for layer in cache.layers]
    assert all(not torch.equal(keys[0], other) for other in keys[1:])  # Each virtual layer keeps its own.
    beams = [model.generate(ids, num_beams=3, use_cache=cached, do_sample=False, **given) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("settings", [{}, {"rank": 0, "init": "upper"}, {"share_norms": False, "init": "random", "loops": 4}])
def test_saved_and_loaded_bitwise(tiny, tokens, tmp_path, settings):
    model = tiny("llama", num_hidden_layers=4)
    surgery.recursive(model, **({"rank": 3} | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    surgery.save(model, tmp_path)
    loaded = surgery.load(tmp_path)
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)
    for first, other in zip(loaded.model.layers[0].parameters(), model.model.layers[0].parameters(), strict=True):
        assert torch.equal(first, other)
    # The double-precision norms of the test's models are not part of a saved model.
    torch.testing.assert_close(logits(loaded, tokens()), logits(model, tokens()), rtol=0, atol=1e-4)
    assert count_parameters(loaded) == count_parameters(model)
    again = surgery.load(tmp_path)
    assert torch.equal(logits(again, tokens()), logits(loaded, tokens()))


def test_gradient_checkpointing_gives_the_same_gradients(tiny, tokens):
    model = tiny("llama", num_hidden_layers=4)
    surgery.recursive(model, rank=3)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train().zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)
    assert all(grad.any() for grad in found[0].values())


def test_hidden_states_of_every_virtual_layer(tiny, tokens):
    model = tiny("llama", num_hidden_layers=4)
    surgery.recursive(model, rank=3)
    assert len(model(tokens(), output_hidden_states=True).hidden_states) == 5


def test_training_brings_the_loss_back(tiny, tokens):
    teacher = tiny("llama", num_hidden_layers=4)
    student = copy.deepcopy(teacher)
    conversion = surgery.recursive(student, rank=2)
    batches = [tokens(8, 16, seed=seed) for seed in range(4)]
    before = {name: p.clone() for name, p in student.named_parameters()}
    values = surgery.distill(student, teacher, batches, steps=40, lr=5e-3, parameters="new", kl=1.0)
    assert values[-1] < 0.7 * values[0]
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".lora." in name}
    conversion.undo()
    assert torch.equal(logits(student, tokens()), logits(teacher, tokens()))


def test_with_skip_gates_and_ternary_weights(tiny, tokens):
    model = tiny("llama", num_hidden_layers=4)
    plain = logits(model, tokens())
    first = surgery.recursive(model, rank=3)
    shared = logits(model, tokens())
    gates = surgery.gateskip(model)
    torch.testing.assert_close(logits(model, tokens()), shared, rtol=0, atol=1e-9)
    gates.undo()
    ternary = surgery.ternary(model, per="row")
    # The weight of a loop is the ternary weight of the first one, and its update.
    layers = model.model.layers
    for path in ("self_attn.q_proj", "mlp.down_proj"):
        bases = [layers[i].get_submodule(path).base.weight for i in (0, 2)]
        assert torch.equal(*bases)
        assert all(len(row.unique()) <= 3 for row in bases[1])
    assert (logits(model, tokens()) - shared).abs().max() > 1e-3
    ternary.undo()
    assert torch.equal(logits(model, tokens()), shared)
    first.undo()
    assert torch.equal(logits(model, tokens()), plain)


def test_what_is_refused(tiny, tokens):
    model = tiny("llama")
    expected = logits(model, tokens())
    with pytest.raises(PartError, match="the number of layers 3 is not divisible by loops 2"):
        surgery.recursive(model)
    surgery.recursive(model, loops=3)
    with pytest.raises(PartError, match="the layers share their weights already: undo that conversion first"):
        surgery.recursive(model, loops=3)
    model = tiny("llama")
    with pytest.raises(PartError, match="recursive with loops=1 would change nothing: give at least 2"):
        surgery.recursive(model, loops=1)
    with pytest.raises(PartError, match="rank must be at least 0, got -1"):
        surgery.recursive(model, loops=3, rank=-1)
    with pytest.raises(PartError, match=r"there is no nn.Linear in the layers for a low-rank update: give rank=0"):
        surgery.recursive(tiny("gpt2"), loops=3)
    assert torch.equal(logits(model, tokens()), expected)
    assert not hasattr(model, "gatework_conversions")
    gpt = tiny("gpt2")
    conversion = surgery.recursive(gpt, loops=3, rank=0)
    assert conversion.parameters[1] < conversion.parameters[0]
    assert gpt.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 14)


@pytest.mark.slow
def test_updates_of_smollm2_at_full_rank_at_256_and_at_0(smollm2):
    """Full rank gives the model back; less is far from it before any training, and 256 much nearer than strict sharing."""
    folder, file = smollm2_folder()
    text = lzma.decompress((resources.files("gatework") / "data/shakespeare.txt.xz").read_bytes()).decode()[-6000:]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1024].view(4, 256)

    def loss():
        return torch.nn.functional.cross_entropy(logits(smollm2, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    plain = loss()
    conversion = surgery.recursive(smollm2, loops=2, init="average", rank=576, share_norms=False)
    try:
        losses = [loss()]
        for rank in (256, 0):  # Singular values are sorted.
            for module in smollm2.modules():
                if isinstance(module, LoRALinear):
                    module.lora.b.data[:, rank:] = 0
            losses.append(loss())
        assert losses[0] == pytest.approx(plain, abs=1e-3)
        assert losses[0] < losses[1] < losses[2] - 3 < 20
    finally:
        conversion.undo()
    assert loss() == plain
