"""Reports, undo, save and load of conversions, one and several, on every layout."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from gatework import surgery
from gatework.core.errors import GateworkError, PartError
from gatework.surgery.checkpoint import JSON, TENSORS

pytestmark = pytest.mark.oldest

CONVERSIONS = {
    "gateskip": [surgery.gateskip],
    "ternary": [surgery.ternary],
    "packed": [surgery.ternary, surgery.pack],
    "both": [surgery.gateskip, lambda model: surgery.ternary(model, pack=True)],
    "both, the other way": [lambda model: surgery.ternary(model, pattern="*proj*", per="row"), surgery.gateskip],
}
PLACES = [
    *(("llama", name) for name in CONVERSIONS), ("gpt2", "both"), ("qwen3", "both"), ("mistral", "both"),
    ("bert", "packed"),
]


def named(model):
    """Everything a model holds, buffers outside the state_dict too."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def converted(model, names):
    return [convert(model) for convert in CONVERSIONS[names]]


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("name", "conversions"), PLACES)
def test_undo_gives_the_very_model_back(name, conversions, tiny, tokens):
    model = tiny(name)
    model.train()
    before = {path: (id(module), type(module)) for path, module in model.named_modules()}
    tensors = {path: (id(tensor), tensor.clone()) for path, tensor in named(model).items()}
    attributes = set(model.__dict__)
    model.eval()
    expected = logits(model, tokens())
    done = converted(model, conversions)
    assert {path: id(module) for path, module in model.named_modules()} != {path: module[0] for path, module in before.items()}
    logits(model, tokens())
    for conversion in reversed(done):
        conversion.undo()
    assert {path: (id(module), type(module)) for path, module in model.named_modules()} == before
    assert {path: id(tensor) for path, tensor in named(model).items()} == {path: tensor[0] for path, tensor in tensors.items()}
    assert all(torch.equal(tensor, tensors[path][1]) for path, tensor in named(model).items())
    assert set(model.__dict__) == attributes
    assert torch.equal(logits(model, tokens()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("name", "conversions"), PLACES)
def test_save_and_load_keep_every_tensor_bitwise(name, conversions, dtype, tiny, tokens, tmp_path):
    model = tiny(name, dtype=dtype)
    converted(model, conversions)
    for tensor in named(model).values():  # Odd values everywhere, as after training.
        if tensor.is_floating_point() and tensor.numel() and tensor.requires_grad:
            tensor.data.add_(torch.randn(tensor.shape).to(tensor.dtype) * 0.1)
    surgery.save(model, tmp_path)
    random = torch.get_rng_state()
    loaded = surgery.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), random)
    assert type(loaded) is type(model)
    assert not loaded.training
    ours, theirs = named(model), named(loaded)
    assert list(ours) == list(theirs)
    for path, tensor in ours.items():
        assert theirs[path].dtype == tensor.dtype, path
        assert torch.equal(theirs[path], tensor), path
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert loaded.config.to_dict() == model.config.to_dict()
    ids = tokens()
    if dtype == torch.bfloat16 or name in ("gpt2", "bert"):  # The RMS norms of the other float64 models are not transformers' own.
        assert str(loaded) == str(model)
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    if name != "bert":
        given = {"max_new_tokens": 5, "do_sample": False}
        assert torch.equal(loaded.generate(ids, **given), model.generate(ids, **given))
    # Once more: what was loaded can be saved.
    surgery.save(loaded, tmp_path)
    assert list(named(surgery.load(tmp_path))) == list(ours)


def test_what_a_report_says(tiny):
    model = tiny("llama", dtype=torch.float32)
    parameters = sum(p.numel() for p in model.parameters())
    conversion = surgery.gateskip(model, budget=0.5)
    gates = 6 * 25
    assert conversion.parameters == (parameters, parameters + gates)
    assert conversion.arguments["budget"] == 0.5
    text = str(conversion)
    assert "3 layers (model.layers.0 .. 2) by GateSkip" in text
    assert f"{gates} parameters of its own" in text
    assert f"{parameters:,} -> {parameters + gates:,}" in text
    packed = surgery.ternary(model, pack=True)
    weights = [block.linears for block in surgery.describe(tiny("llama")).blocks]
    assert sum(map(len, weights)) == 21
    assert "21 weights by ternary ones, a scale per tensor, packed" in str(packed)
    # 5 trits a byte, each row beginning at a new byte, a float16 scale per matrix.
    rows = {"q": (24, 24), "k": (12, 24), "v": (12, 24), "o": (24, 24), "gate": (40, 24), "up": (40, 24), "down": (24, 40)}
    small = 3 * sum(out * -(-width // 5) + 2 for out, width in rows.values())
    large = 3 * sum(out * width * 4 for out, width in rows.values())
    assert packed.stored_bytes[0] - packed.stored_bytes[1] == large - small


def test_conversions_are_undone_last_first_and_once(tiny):
    model = tiny("llama")
    first, second = surgery.gateskip(model), surgery.ternary(model)
    with pytest.raises(PartError, match="undo the later conversions first: ternary"):
        first.undo()
    second.undo()
    first.undo()
    with pytest.raises(PartError, match=r"this conversion \(gateskip\) is not in the model any more"):
        first.undo()


def test_undo_keeps_what_training_made_of_the_models_own_weights(tiny, tokens):
    model = tiny("llama", dtype=torch.float32)
    conversion = surgery.ternary(model)
    surgery.distill(model, None, [tokens()], steps=2)
    trained = model.model.layers[0].mlp.up_proj.parametrizations.weight.original
    conversion.undo()
    assert model.model.layers[0].mlp.up_proj.weight is trained


@pytest.mark.parametrize("pattern", ["no_such_module", ["mlp", "no_such_module"]])
def test_a_pattern_that_matches_nothing_leaves_the_model_alone(pattern, tiny):
    model = tiny("llama")
    before = {path: id(module) for path, module in model.named_modules()}
    with pytest.raises(PartError, match="'no_such_module' matches no weight"):
        surgery.ternary(model, pattern)
    assert {path: id(module) for path, module in model.named_modules()} == before


def test_packing_nothing_and_twice_is_refused(tiny):
    model = tiny("llama")
    with pytest.raises(PartError, match="nothing to pack"):
        surgery.pack(model)
    surgery.ternary(model, pack=True)
    with pytest.raises(PartError, match="parametrized already"):
        surgery.ternary(model)


def test_plain_transformers_neither_writes_nor_reads_a_converted_model(tiny, tmp_path):
    model = tiny("llama")
    conversion = surgery.gateskip(model)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(GateworkError, match=r"save it with gatework\.surgery\.save"):
            one.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    surgery.save(model, tmp_path / "ours")
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with pytest.raises((OSError, ValueError)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
    conversion.undo()
    model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_copy_of_a_converted_model_is_a_model_of_its_own(tiny, tokens):
    model = tiny("llama")
    surgery.gateskip(model)
    surgery.ternary(model)
    other = copy.deepcopy(model)
    ids = tokens()
    expected = logits(model, ids)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(logits(model, ids), expected)
    surgery.pack(other)
    assert "pack" not in [record["name"] for record in model.gatework_conversions]


def test_files_that_cannot_be_loaded_are_named_in_one_sentence(tiny, tmp_path):
    def fails(match):
        with pytest.raises(GateworkError, match=match) as error:
            surgery.load(tmp_path)
        assert "\n" not in str(error.value)

    fails("there is no converted model in .*: no file gatework.json")
    model = tiny("llama")
    surgery.gateskip(model)
    surgery.save(model, tmp_path)
    text, tensors = (tmp_path / JSON).read_text(), (tmp_path / TENSORS).read_bytes()
    about = json.loads(text)

    def write(**changed):
        (tmp_path / JSON).write_text(json.dumps(about | changed))

    write(format=99)
    fails("has the format version 99; this gatework reads version 1")
    (tmp_path / JSON).write_text(text[: len(text) // 2])
    fails("is truncated or not JSON")
    (tmp_path / JSON).write_text("[]")
    fails("is not a model that gatework.surgery saved")
    (tmp_path / JSON).write_text(json.dumps({"format": 1}))
    fails("is incomplete: it lacks attention, class")
    write(**{"class": "os"})
    fails("names 'os', and transformers .* has no such model")
    write(**{"class": "LlamaForCausalLMX"})
    fails("has no such model")
    write(conversions=[{"name": "appendectomy", "arguments": {}}])
    fails("there is no conversion 'appendectomy'; there are depth, gateskip, lizard, pack")
    write(conversions=[{"name": "gateskip", "arguments": {"bugdet": 0.5}}])
    fails("lists a conversion that this gatework does not know")
    write(conversions=[])
    fails("does not fit the model that gatework.json describes")
    write()
    (tmp_path / TENSORS).write_bytes(tensors[: len(tensors) // 2])
    fails("is truncated or not a safetensors file")
    (tmp_path / TENSORS).write_bytes(b"")
    fails("is truncated or not a safetensors file")
    (tmp_path / TENSORS).unlink()
    fails("there is no file gatework.safetensors")
    (tmp_path / TENSORS).write_bytes(tensors)
    surgery.load(tmp_path)
    with pytest.raises(GateworkError, match="cannot be saved in"):
        surgery.save(model, tmp_path / JSON)
    with pytest.raises(GateworkError, match="has no configuration"):
        surgery.save(torch.nn.Linear(2, 2), tmp_path)
