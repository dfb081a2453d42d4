"""Saving and loading: every tensor bitwise equal, what is missing starts as a new part does, one sentence for what is wrong."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from gatework.core import GateworkError, PartError
from gatework.models import GateworkConfig, GateworkForCausalLM

pytestmark = [pytest.mark.oldest, pytest.mark.usefixtures("quiet_transformers")]

SETTINGS = {
    "plain": {},
    "untied": {"tie_embeddings": False, "mixer": "attention(qk_norm=true)", "feedforward": "glu(bias=true)"},
    "gates": {"mixer": "gla, gated_attention", "depth": "gateskip(budget=0.5)"},
    "moe": {"feedforward": "moe(experts=4, shared=1, gate=topk(balance=loss_free)), moe(experts=4, gate=noisy_topk)"},
    "versatile": {"feedforward": "versatile_ffn(experts=4)", "depth": "gateskip(gate_form=mlp, shared=true)"},
    "recursive": {"depth": "recursive(loops=2, rank=2)", "mixer": "gla"},
    "ternary": {"weight": "ternary", "feedforward": "moe(experts=4)"},
}
#: Buffers that stay in float32 whatever the model's dtype is.
EXACT = ("budgets", "progress", "quantiles", "loss_free.bias")


def odd(model: GateworkForCausalLM) -> GateworkForCausalLM:
    """Fill every tensor with numbers that no constructor gives."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            values = 3 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(values if tensor.is_floating_point() else values.abs() * 100 + 1)
    return model


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_tensor_comes_back_bitwise(make, tmp_path, settings, dtype):
    model = odd(make(dtype, **settings))
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        GateworkForCausalLM.from_pretrained(tmp_path, dtype=dtype),
    ):
        assert type(loaded) is GateworkForCausalLM
        assert not loaded.training
        same(model.state_dict(), loaded.state_dict())
        assert (loaded.model.head.weight is loaded.model.embedding.weight) == loaded.config.tie_embeddings
        apart = {"dtype": None, "_name_or_path": None, "transformers_version": None}
        assert loaded.config.to_dict() | apart == model.config.to_dict() | apart
        tokens = torch.arange(12)[None]
        torch.manual_seed(0)
        before = model(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, before)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_another_dtype_on_loading_is_a_cast(make, tmp_path, settings):
    model = odd(make(torch.float32, **settings))
    model.save_pretrained(tmp_path)
    loaded = GateworkForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    exact = [name for name, _ in model.named_buffers() if name.endswith(EXACT)]
    for name, tensor in model.state_dict().items():
        cast = tensor.is_floating_point() and name not in exact
        assert loaded[name].dtype == (torch.bfloat16 if cast else tensor.dtype), name
    same(model.to(torch.bfloat16).state_dict(), loaded)


def test_initialising_again_changes_nothing(make, tmp_path):
    odd(make(torch.float32, **SETTINGS["gates"])).save_pretrained(tmp_path)
    model = GateworkForCausalLM.from_pretrained(tmp_path).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    same(before, model.state_dict())


def test_a_new_model_starts_as_its_decoder_does():
    config = GateworkConfig(vocab_size=31, d_model=16, depth="gateskip", feedforward="moe(experts=4)", mixer="gla, attention")
    torch.manual_seed(7)
    expected = config.build().state_dict()
    torch.manual_seed(7)
    same(expected, AutoModelForCausalLM.from_config(config).model.state_dict())


def test_a_model_made_without_memory_starts_as_its_decoder_does():
    config = GateworkConfig(vocab_size=31, d_model=16, depth="gateskip", feedforward="moe(experts=4, gate=topk(balance=loss_free))")
    with torch.device("meta"):
        model = GateworkForCausalLM(config)
    model.to_empty(device="cpu").init_weights()
    starts_as_new(model, list(model.state_dict()))


def test_shards_come_back(make, tmp_path):
    model = odd(make(torch.float32, **SETTINGS["gates"]))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    same(model.state_dict(), GateworkForCausalLM.from_pretrained(tmp_path).state_dict())


def starts_as_new(model: GateworkForCausalLM, names: list[str]) -> None:
    """These tensors are distributed as a new model's: constants equal, random ones as wide."""
    torch.manual_seed(11)
    new = {f"model.{name}": tensor for name, tensor in model.config.build().state_dict().items()}
    for name in names:
        tensor, expected = model.state_dict()[name], new[name]
        assert tensor.dtype == expected.dtype
        if expected.numel() < 2 or expected.float().std() == 0 or not expected.isfinite().all():
            assert torch.equal(tensor, expected), name
        else:
            assert tensor.isfinite().all(), name
            assert 0.7 < tensor.std() / expected.std() < 1.4, name


def test_missing_tensors_start_as_a_new_part_does(make, tmp_path):
    settings = SETTINGS["gates"] | {"d_model": 64, "feedforward": "moe(experts=4, gate=topk(balance=loss_free)), versatile_ffn"}
    model = odd(make(torch.float32, **settings))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    missing = [name for name in held if not name.endswith(("norm.weight", "o_proj.weight"))]
    kept = {name: tensor for name, tensor in held.items() if name not in missing}
    assert 3 < len(kept) < len(missing)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = GateworkForCausalLM.from_pretrained(tmp_path)
    same(kept, {name: tensor for name, tensor in loaded.state_dict().items() if name in kept})
    starts_as_new(loaded, missing)
    assert loaded.model.head.weight is loaded.model.embedding.weight


def test_one_missing_gate_leaves_its_neighbours_alone(make, tmp_path):
    model = odd(make(torch.float32, **SETTINGS["gates"]))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    name = "model.depth.gates.1.mixer.out.bias"
    del held[name]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = GateworkForCausalLM.from_pretrained(tmp_path).state_dict()
    assert torch.equal(loaded.pop(name), torch.full((16,), 5.0))
    expected = model.state_dict()
    del expected[name]
    same(expected, loaded)


def test_a_truncated_checkpoint_meets_one_sentence(make, tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Exception, match="deserializing header") as caught:
        GateworkForCausalLM.from_pretrained(tmp_path)
    assert str(caught.value).count("\n") == 0


def test_nothing_is_unpickled(make, tmp_path):
    model = make(torch.float32)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for cls in (GateworkForCausalLM, AutoModelForCausalLM):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            cls.from_pretrained(tmp_path)


def test_a_checkpoint_of_another_format_meets_one_sentence(make, tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    assert held["format"] == 1
    path.write_text(json.dumps(held | {"format": 2}), encoding="utf-8")
    for cls in (GateworkForCausalLM, AutoModelForCausalLM, AutoConfig):
        with pytest.raises(GateworkError, match="this checkpoint has format 2, and this gatework reads 1"):
            cls.from_pretrained(tmp_path)


def test_a_checkpoint_with_an_unknown_part_meets_the_registry(make, tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(held | {"mixer": "glaa"}), encoding="utf-8")
    with pytest.raises(PartError, match="no mixer 'glaa'; did you mean 'gla'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_sizes_are_refused(make, tmp_path):
    make(torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    held = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(held | {"d_ff": 32}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        GateworkForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("weight", ["stable_rps", "roast"])
def test_weights_that_share_an_array_are_refused(weight):
    with pytest.raises(GateworkError, match=f"weight={weight} keeps one array for many weights"):
        GateworkForCausalLM(GateworkConfig(d_model=64, weight=weight))
