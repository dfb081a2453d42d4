"""``generate``: whatever is cached, and however, the tokens are those of running the whole sequence anew for each one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from gatework.core import GateworkError, metrics
from gatework.mixers.base import KVCache
from gatework.models import GateworkForCausalLM
from gatework.models.huggingface import GateworkCache

pytestmark = [pytest.mark.oldest, pytest.mark.usefixtures("quiet_transformers")]

SETTINGS = {
    "attention": {"mixer": "attention(kv_heads=1)"},
    "window": {"mixer": "attention(window=4)"},
    "gla": {"mixer": "gla"},
    "gated_attention": {"mixer": "gated_attention"},
    "hybrid": {"mixer": "gla, attention"},
    "moe": {"feedforward": "moe(experts=4)"},
    "versatile_ffn": {"feedforward": "versatile_ffn(experts=4, init_std=0.02)"},
    "gateskip": {"depth": "gateskip(budget=0.5)", "mixer": "gla, attention"},
    "recursive": {"depth": "recursive(loops=2, rank=2)"},
}
NEW = 7
#: Two prompts of 3 and 6 tokens.
PROMPTS = [[4, 9, 2], [7, 1, 30, 12, 5, 5]]


@pytest.fixture
def model(make, request) -> GateworkForCausalLM:
    made = make(scale=0.5, tie_embeddings=False, **SETTINGS[request.param])  # Tied, a random model repeats its last token.
    if request.param == "gateskip":
        with torch.no_grad(), made.model.depth.calibrating():
            made(torch.randint(31, (8, 24), generator=torch.Generator().manual_seed(2)))
        metrics(made)
    return made


every = pytest.mark.parametrize("model", SETTINGS, indirect=True)


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    return tokens, mask


def steps_of(model: GateworkForCausalLM) -> list[int]:
    """Grows by the number of tokens of each forward pass through the blocks."""
    fed: list[int] = []
    model.model.depth.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].shape[1]))
    return fed


def greedy(model: GateworkForCausalLM, prompt: list[int]) -> list[int]:
    """The most likely continuation of a prompt alone, without ``generate``, cache or mask."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(model.model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@every
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_left_padded_batch_equals_each_prompt_alone_and_uncached(model, cache):
    tokens, mask = padded()
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    assert all(len(set(row)) > 2 for row in expected), "a model that repeats itself tests nothing"
    fed = steps_of(model)
    out = model.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, cache_implementation=cache, pad_token_id=0
    )
    assert out[:, tokens.shape[1] :].tolist() == expected
    assert fed == [tokens.shape[1]] + [1] * (NEW - 1)


@every
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams_equal_uncached(model, cache, monkeypatch):
    tokens, mask = padded()
    settings = {
        "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "num_beams": 3, "num_return_sequences": 2,
        "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True,
    }
    order = []
    reorder = GateworkCache.reorder_cache
    monkeypatch.setattr(GateworkCache, "reorder_cache", lambda self, index: (order.append(index), reorder(self, index))[1])
    out = model.generate(tokens, cache_implementation=cache, **settings)
    whole = model.generate(tokens, use_cache=False, **settings)
    assert torch.equal(out.sequences, whole.sequences)
    torch.testing.assert_close(out.sequences_scores, whole.sequences_scores)
    assert not torch.equal(out.sequences[0], out.sequences[1])
    assert any(not torch.equal(index, torch.arange(6)) for index in order), "no beam changed its place"


@every
def test_sampling_with_a_seed_equals_uncached(model):
    tokens, mask = padded()
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": True, "temperature": 1.5, "top_k": 8, "pad_token_id": 0}
    made = []
    for how in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        torch.manual_seed(5)
        made.append(model.generate(tokens, **settings, **how))
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])
    torch.manual_seed(6)
    assert not torch.equal(made[0], model.generate(tokens, **settings))


@pytest.mark.parametrize("model", ["gateskip"], indirect=True)
def test_gateskip_skips_while_it_generates(model):
    tokens, mask = padded()
    kept = []
    model.model.depth.register_forward_hook(lambda depth, *_: kept.append(metrics(depth)["kept_feedforward"]))
    model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    kept = torch.stack(kept)[1:]  # Of the steps by single tokens.
    assert 0.1 < kept.mean() < 0.9


@pytest.mark.parametrize("model", ["attention", "hybrid"], indirect=True)
def test_a_static_cache_is_written_in_place(model, monkeypatch):
    tokens, mask = padded()
    places = []
    make_room = KVCache.make_room

    def spied(self: KVCache, slots: int) -> None:
        make_room(self, slots)
        places.append((self, self.keys.data_ptr(), slots))

    monkeypatch.setattr(KVCache, "make_room", spied)
    model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, cache_implementation="static", pad_token_id=0)
    attentions = sum(type(block.mixer).__name__ == "Attention" for block in model.model.blocks)
    assert len(places) == attentions, "room is made once"
    for cache, place, slots in places:
        assert slots == tokens.shape[1] + NEW - 1 == cache.length
        assert cache.keys.data_ptr() == place


@pytest.mark.parametrize("model", ["hybrid", "gateskip"], indirect=True)
def test_prompts_fed_in_pieces_and_from_a_kept_cache(model):
    tokens, _ = padded()
    tokens = tokens[1:]
    with torch.no_grad():
        whole = model(tokens).logits
        first = model(tokens[:, :4], use_cache=True)
        cache = copy.deepcopy(first.past_key_values)
        rest = model(tokens[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=0, atol=1e-10)
    assert first.past_key_values.get_seq_length() == 6
    assert cache.get_seq_length() == 4
    expected = model.generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(tokens, past_key_values=cache, max_new_tokens=NEW, do_sample=False), expected)


@pytest.mark.parametrize("model", ["attention", "hybrid"], indirect=True)
def test_cache_operations(model):
    tokens, mask = padded()
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        assert len(cache) == 2
        assert cache.batch_size == cache.max_batch_size == 2
        assert not cache.is_compileable
        assert "seen=6" in repr(cache)
        expected = model(torch.tensor([[3], [4]]), past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(2)
        repeated = model(torch.tensor([[3], [3], [4], [4]]), past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(repeated, expected.repeat_interleave(2, 0), rtol=0, atol=1e-10)
        cache.batch_select_indices(torch.tensor([2]))
        assert cache.batch_size == 1
        torch.testing.assert_close(model(torch.tensor([[4]]), past_key_values=cache).logits, expected[1:], rtol=0, atol=1e-10)
        assert cache.get_seq_length() == 7
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(tokens[1:], past_key_values=cache).logits, model(tokens[1:]).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", ["attention"], indirect=True)
def test_tokens_are_taken_back_from_attention(model):
    tokens, mask = padded()
    with torch.no_grad():
        cache = model(tokens, attention_mask=mask, use_cache=True).past_key_values
        expected = model(torch.tensor([[3], [4]]), past_key_values=copy.deepcopy(cache)).logits
        model(torch.tensor([[8, 8, 8], [9, 9, 9]]), past_key_values=cache)
        cache.crop(-1)
        assert cache.get_seq_length() == 8
        cache.crop(6)
        cache.crop(0)
        assert cache.get_seq_length() == 6
        torch.testing.assert_close(model(torch.tensor([[3], [4]]), past_key_values=cache).logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("model", ["attention"], indirect=True)
def test_lookup_decoding_takes_tokens_back(model):
    tokens = torch.tensor([PROMPTS[1] * 2])
    made = greedy(model, tokens[0].tolist())
    never = next(token for token in range(31) if token not in made)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": never, "pad_token_id": never}
    expected = torch.cat([tokens, torch.tensor([made])], 1)
    fed = steps_of(model)
    assert torch.equal(model.generate(tokens, prompt_lookup_num_tokens=3, **settings), expected)
    assert max(fed[1:]) > 1, "nothing was looked up"


@pytest.mark.parametrize("model", ["hybrid", "window"], indirect=True)
def test_other_mixers_cannot_take_tokens_back(model):
    cache = model(padded()[0], use_cache=True).past_key_values
    cache.crop(0)
    with pytest.raises(GateworkError, match="only attention without a window keeps"):
        cache.crop(-1)


@pytest.mark.parametrize("model", ["attention"], indirect=True)
def test_other_caches_are_refused(model):
    tokens, _ = padded()
    with pytest.raises(GateworkError, match="its own new_cache, not from a DynamicCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(GateworkError, match="cache_implementation is dynamic or static for a gatework model, not 'offloaded'"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="offloaded")
