"""What ``describe`` finds in every layout, and what it says of those that it does not know."""

from __future__ import annotations

import pytest
import transformers
from torch import nn

from gatework import surgery
from gatework.core.errors import PartError

pytestmark = pytest.mark.oldest

EXPECTED = {
    # family: blocks, attention, feed-forward, embedding, final norm, head, linear maps of a block
    "llama": ("model.layers", "self_attn", ("mlp",), "model.embed_tokens", "model.norm", "lm_head", 7),
    "mistral": ("model.layers", "self_attn", ("mlp",), "model.embed_tokens", "model.norm", "lm_head", 7),
    "qwen2": ("model.layers", "self_attn", ("mlp",), "model.embed_tokens", "model.norm", "lm_head", 7),
    "qwen3": ("model.layers", "self_attn", ("mlp",), "model.embed_tokens", "model.norm", "lm_head", 7),
    "smollm3": ("model.layers", "self_attn", ("mlp",), "model.embed_tokens", "model.norm", "lm_head", 7),
    "gpt2": ("transformer.h", "attn", ("mlp",), "transformer.wte", "transformer.ln_f", "lm_head", 4),
    "bert": ("bert.encoder.layer", "attention", ("intermediate", "output"), "bert.embeddings.word_embeddings", None,
             "cls.predictions.decoder", 6),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_parts_of_every_layout_are_found(name, tiny):
    model = tiny(name)
    layout = surgery.describe(model)
    blocks, attention, feedforward, embedding, final_norm, head, linears = EXPECTED[name]
    assert (layout.family, layout.model, layout.blocks_path, len(layout.blocks)) == (name, type(model).__name__, blocks, 3)
    assert (layout.embedding, layout.final_norm, layout.head) == (embedding, final_norm, head)
    assert layout.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert layout.pre_norm == (name != "bert")
    assert layout.parameters == sum(p.numel() for p in model.parameters())
    for i, block in enumerate(layout.blocks):
        assert block.path == f"{blocks}.{i}"
        assert block.attention == f"{blocks}.{i}.{attention}"
        assert block.feedforward == tuple(f"{blocks}.{i}.{part}" for part in feedforward)
        assert len(block.linears) == linears
        for path in (block.mixer_norm, block.feedforward_norm, *block.linears):
            assert model.get_submodule(path) is not None
    assert layout.blocks[0].window == (6 if name == "mistral" else None)
    assert (layout.blocks[0].heads, layout.blocks[0].kv_heads) == (4, 4 if name in ("gpt2", "bert") else 2)
    assert layout.blocks[0].head_width == (8 if name == "qwen3" else 6)
    text = str(layout)
    assert max(map(len, text.splitlines())) <= 80
    for word in (name, attention, embedding, "post-norm" if name == "bert" else "pre-norm"):
        assert word in text


def test_other_heads_and_none(tiny):
    config = tiny("llama").config
    assert surgery.describe(transformers.LlamaModel(config)).head is None
    assert surgery.describe(transformers.LlamaModel(config)).blocks_path == "layers"
    assert surgery.describe(transformers.LlamaForSequenceClassification(config)).head == "score"


def test_a_converted_model_is_described_too(tiny):
    model = tiny("qwen2")
    surgery.gateskip(model)
    layout = surgery.describe(model)
    assert layout.policy == "GateSkip"
    assert "run by" in str(layout)
    assert len(layout.linears) == 21
    assert all(isinstance(model.get_submodule(path), nn.Linear) for path in layout.linears)


def test_unknown_layouts_are_refused_in_one_sentence(tiny):
    with pytest.raises(PartError, match="the layout of Linear, which has no Hugging Face configuration; it knows llama, mi"):
        surgery.describe(nn.Linear(2, 2))
    other = transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, ffn_dim=8, num_attention_heads=1, max_position_embeddings=8,
        word_embed_proj_dim=8,
    ))
    with pytest.raises(PartError, match="model_type 'opt'") as error:
        surgery.describe(other)
    assert "\n" not in str(error.value)
    broken = tiny("llama")
    del broken.model.layers[1].mlp
    with pytest.raises(PartError, match=r"says it is a llama, but has no module model\.layers\.1\.mlp"):
        surgery.describe(broken)
    broken.model.layers = nn.ModuleList()
    with pytest.raises(PartError, match="is empty"):
        surgery.describe(broken)
