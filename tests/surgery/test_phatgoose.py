"""Adapters of peft: gates trained beside them, routed token by token, undone, saved, refused."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from gatework import surgery
from gatework.core import GateworkError, PartError
from gatework.experts import Phatgoose
from gatework.surgery.phatgoose import GATES

pytestmark = [
    pytest.mark.oldest,
    # peft asks for the old name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
MODULES = ["q_proj", "v_proj", "down_proj"]


def adapted(model, seed=0, modules=None, **settings):
    """A PeftModel around a copy of the model, with factors as if trained."""
    config = LoraConfig(**({"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": modules or MODULES} | settings))
    made = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, p in made.named_parameters():
        if "lora_" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    return made.eval()


def gated(peft_model, seed=0):
    gates = surgery.PhatgooseGates(peft_model)
    generator = torch.Generator().manual_seed(100 + seed)
    for vector in gates.vectors:
        vector.data.copy_(torch.randn(vector.shape, generator=generator, dtype=torch.float64))
    return gates


def saved(model, folder, seed=0, **settings):
    """An adapter with gates in a folder; the PeftModel without gates."""
    made = adapted(model, seed, **settings)
    gates = gated(made, seed)
    made.save_pretrained(folder)
    gates.save(folder)
    gates.undo()
    return made


def logits(model, ids, **given):
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


def traced(model, paths, ids):
    """By path the input and output of modules in one forward pass, and the model's logits."""
    seen, hooks = {}, []
    for path in paths:
        def keep(module, given, output, path=path):
            seen[path] = given[0].detach(), output.detach()
        hooks.append(model.get_submodule(path).register_forward_hook(keep))
    out = logits(model, ids)
    for hook in hooks:
        hook.remove()
    return seen, out


def test_gates_scale_each_update_and_only_they_train(tiny, tokens, tmp_path):
    model = adapted(tiny("llama"), lora_dropout=0.5)
    before, trained = logits(model, tokens()), {name: p.requires_grad for name, p in model.named_parameters()}
    names = list(model.state_dict())
    gates = surgery.PhatgooseGates(model)
    assert len(gates.sites) == len(gates.vectors) == 9
    half = copy.deepcopy(adapted(tiny("llama")))
    for name, p in half.named_parameters():
        if "lora_B" in name:
            p.data *= 0.5
    torch.testing.assert_close(logits(model, tokens()), logits(half, tokens()), rtol=0, atol=1e-12)  # Exactly 1/2 at the start.

    for vector, other in zip(gates.vectors, gated(adapted(tiny("llama"))).vectors, strict=True):
        vector.data = other.data.clone()
    paths = [f"base_model.model.{path}" for path in gates.sites]
    seen, expected = traced(model, paths, tokens())
    for path, vector in zip(paths, gates.vectors, strict=True):
        u, y = seen[path]
        layer = model.get_submodule(path)
        delta = u @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * 5 / 3
        gate = 1 / (1 + torch.exp(-(u * vector).sum(-1, keepdim=True)))
        torch.testing.assert_close(y, u @ layer.base_layer.weight.T + gate * delta, rtol=0, atol=1e-12)
    assert torch.equal(logits(model.train(), tokens()), expected)  # No dropout while the gates are there.

    def loss():  # The model's own is computed in float32.
        return nn.functional.cross_entropy(model(input_ids=tokens()).logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())

    loss().backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(vector.grad.any() for vector in gates.vectors)
    step, at = 1e-6, gates.vectors[4]
    rise = []
    for sign in (1, -1):
        at.data[3] += sign * step
        rise.append(loss().item())
        at.data[3] -= sign * step
    assert at.grad[3].item() == pytest.approx((rise[0] - rise[1]) / (2 * step), rel=1e-5)

    model.eval().save_pretrained(tmp_path)
    gates.save(tmp_path)
    assert list(load_file(tmp_path / GATES)) == sorted(gates.sites)
    other = surgery.PhatgooseGates(PeftModel.from_pretrained(tiny("llama"), tmp_path).eval())
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(gates.vectors, other.vectors, strict=True))
    gates.undo()
    gates.undo()
    assert torch.equal(logits(model, tokens()), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert list(model.state_dict()) == names
    assert not torch.equal(logits(model.train(), tokens()), before)  # Dropout again.


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_adapter_is_the_peft_model(tiny, tokens, left_padded, tmp_path, family):
    model = tiny(family)
    modules = ["c_attn", "c_proj"] if family == "gpt2" else "all-linear"
    peft_model = saved(model, tmp_path, modules=modules, fan_in_fan_out=family == "gpt2")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model, tokens())
    conversion = surgery.phatgoose(model, {"only": tmp_path}, k=1)
    expected = logits(peft_model, tokens())
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits(model, tokens()), expected, rtol=0, atol=1e-10)
    ids, mask = left_padded()
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **settings), peft_model.generate(input_ids=ids, **settings))
    conversion.undo()
    assert torch.equal(logits(model, tokens()), before)
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())
    assert list(model.state_dict()) == list(plain)


def test_adapters_of_any_rank_and_scale_are_routed_as_in_the_equations(tiny, tokens, left_padded, tmp_path):
    """Four adapters of different ranks, scales and patterns; the deltas are peft's own."""
    model = tiny("llama")
    settings = [
        {}, {"r": 5, "use_rslora": True}, {"rank_pattern": {"down_proj": 1}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
        {"r": 2, "lora_alpha": 1},
    ]
    folders = {name: tmp_path / name for name in "abcd"}
    pefts = [saved(model, folders[name], seed, **some) for seed, (name, some) in enumerate(zip("abcd", settings, strict=True))]
    conversion = surgery.phatgoose(model, folders)
    assert conversion.arguments["adapters"] == list("abcd")
    assert len(conversion.arguments["layers"]) == 3
    assert conversion.arguments["rank"] == 5
    assert "9 linear layers" in str(conversion)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Phatgoose)}
    assert len(layers) == 9
    seen, expected = traced(model, layers, tokens())
    vectors = [load_file(folders[name] / GATES) for name in "abcd"]
    for path, layer in layers.items():
        u, y = seen[path]
        width = u.shape[-1]
        updates = [made.base_model.model.get_submodule(path)(u) - layer.base(u) for made in pefts]
        ln = [(t - t.mean(-1, keepdim=True)) / (t.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
              for t in (u, torch.stack([some[path] for some in vectors]))]
        scores = ln[0] @ ln[1].T / math.sqrt(width)
        kept = scores >= scores.sort(-1).values[..., -2:-1]
        assert bool((kept.sum(-1) == 2).all())
        weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        want = layer.base(u) + sum(weights[..., z, None] * update for z, update in enumerate(updates))
        torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
        assert not any(p.requires_grad for p in (layer.a, layer.b, layer.v))

    ids, mask = left_padded()
    greedy = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    written = model.generate(ids, use_cache=False, **greedy)
    assert torch.equal(model.generate(ids, **greedy), written)
    assert torch.equal(model.generate(ids, num_beams=1, cache_implementation="static", **greedy), written)
    alone = logits(model, ids[1:2, 2:])[0]  # The rotary angles of other places differ: they are computed in float32.
    torch.testing.assert_close(alone, logits(model, ids, attention_mask=mask)[1, 2:], rtol=0, atol=1e-5)
    surgery.save(model, tmp_path / "whole")
    again = surgery.load(tmp_path / "whole")
    assert again.gatework_conversions[0]["arguments"]["adapters"] == list("abcd")
    assert (logits(again, tokens()) - expected).abs().max() < 1e-3  # The loaded one's norms are not the exact ones.
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(GateworkError, match=r"save it with gatework\.surgery\.save"):
        model.save_pretrained(tmp_path / "plain")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")  # The base model is a single GGUF file.
def test_on_smollm2_one_adapter_of_four_times_the_same_is_the_peft_model(smollm2, tmp_path):
    """Four equal adapters with different gates: whatever is chosen, the update is the same."""
    ids = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30]])
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    model = get_peft_model(smollm2, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    folders = {f"copy{i}": tmp_path / str(i) for i in range(4)}
    try:
        generator = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data.normal_(std=0.02, generator=generator)
        for seed, folder in enumerate(folders.values()):
            gates = gated(model, seed)
            model.save_pretrained(folder)
            gates.save(folder)
            gates.undo()
        expected, written = logits(model.eval(), ids), model.generate(input_ids=ids, **greedy)
    finally:
        smollm2 = model.unload()
    before = logits(smollm2, ids)
    conversion = surgery.phatgoose(smollm2, folders)
    try:
        assert (expected - before).abs().max() > 0.5
        torch.testing.assert_close(logits(smollm2, ids), expected, rtol=0, atol=1e-3)
        assert torch.equal(smollm2.generate(input_ids=ids, **greedy), written)
    finally:
        conversion.undo()
    assert torch.equal(logits(smollm2, ids), before)


def test_some_layers_of_a_kind_are_named_one_by_one(tiny, tokens, tmp_path):
    model = tiny("llama")
    peft_model = saved(model, tmp_path, layers_to_transform=[0, 2])
    conversion = surgery.phatgoose(model, {"only": tmp_path}, k=1)
    assert len(conversion.arguments["layers"]) == 6
    torch.testing.assert_close(logits(model, tokens()), logits(peft_model, tokens()), rtol=0, atol=1e-10)


def test_wrong_adapters_meet_one_sentence(tiny, tmp_path):
    model = tiny("llama")
    a, b = tmp_path / "a", tmp_path / "b"
    made = saved(model, a)
    saved(model, b, 1)

    def edit(folder, **changes):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    def refused(match, adapters=None, error=PartError, k=2, on=None):
        with pytest.raises(error, match=match) as caught:
            surgery.phatgoose(on or model, {"a": a, "b": b} if adapters is None else adapters, k)
        assert "\n" not in str(caught.value)
        assert not hasattr(model, "gatework_conversions")

    refused("k must be between 1 and the number of adapters 2, got 3", k=3)
    refused("k must be between 1 and the number of adapters 0", adapters={})
    refused(r"the base model itself is converted, without adapters: call unload\(\)", on=made)
    edit(a, base_model_name_or_path="one/model")
    edit(b, base_model_name_or_path="another/model")
    refused("adapters of different base models: 'a' is for 'one/model', 'b' for 'another/model'")
    edit(b, base_model_name_or_path="one/model")
    model.name_or_path = "third/model"
    refused("the adapters are for 'one/model', and this model is 'third/model'")
    model.name_or_path = "one/model"
    surgery.phatgoose(model, {"a": a, "b": b}).undo()
    model.name_or_path = ""
    refused("is for another base model: model.layers.0.mlp.down_proj maps 40 to 32 channels here, 40 to 24 there",
            on=tiny("llama", hidden_size=32))
    refused(r"is for another base model: this one has no linear layer model\.layers\.2", on=tiny("llama", num_hidden_layers=2))
    refused("there is no adapter_config.json of the adapter 'x'", {"x": tmp_path / "nowhere"}, GateworkError, 1)

    few = tmp_path / "few"
    saved(model, few, modules=["q_proj"])
    refused("'a' and 'few' are on different layers: only one of them is on model.layers.0.mlp.down_proj", {"a": a, "few": few})
    for settings, said in (({"use_dora": True}, "use_dora=True"), ({"bias": "all"}, "bias='all'"),
                           ({"modules_to_save": ["norm"]}, "modules_to_save")):
        odd = adapted(model, **settings)
        odd.save_pretrained(tmp_path / "odd")
        refused(f"the adapter 'x' has {said}.*: only plain LoRA", {"x": tmp_path / "odd"}, k=1)
        with pytest.raises(PartError, match="only plain LoRA"):
            surgery.PhatgooseGates(odd)

    (few / GATES).unlink()
    refused("the adapter 'few' has no gates", {"few": few}, GateworkError, 1)
    zero = adapted(model, modules=["q_proj"])
    surgery.PhatgooseGates(zero).save(few)
    refused("the gates of the adapter 'few' are all 0: train them first", {"few": few}, k=1)
    (b / GATES).write_bytes((a / GATES).read_bytes())
    refused("were trained beside another adapter than 'b'", error=GateworkError)
    save_file({}, b / GATES, {"format": "9"})
    refused("has the format version 9; this gatework reads version 1", error=GateworkError)
    (b / GATES).write_bytes(b"no")
    refused("is truncated or not a safetensors file", error=GateworkError)
    with pytest.raises(GateworkError, match="is another one than these gates were made for"):
        surgery.PhatgooseGates(adapted(model, 7)).save(a)
    with pytest.raises(PartError, match="stand beside the adapters of a PeftModel, and this is a Linear"):
        surgery.PhatgooseGates(nn.Linear(2, 2))
    with pytest.raises(PartError, match="has no adapter 'other'; there are default"):
        surgery.PhatgooseGates(made, "other")
