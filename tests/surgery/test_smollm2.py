"""Conversions of the real SmolLM2-135M."""

from __future__ import annotations

import copy

import pytest
import torch

from gatework import core, surgery

IDS = torch.tensor([[504, 3575, 282, 4649, 314, 7042, 30, 378, 3575, 282], [2, 2, 2, 504, 2644, 282, 260, 905, 314, 504]])
MASK = torch.tensor([[1] * 10, [0] * 3 + [1] * 7])
GREEDY = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False}


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits[MASK.bool()]


def test_skip_gates_keep_the_function_and_undo_gives_the_model_back_bitwise(smollm2):
    layout = surgery.describe(smollm2)
    assert (layout.family, len(layout.blocks), layout.width, layout.tied) == ("llama", 30, 576, True)
    assert (layout.blocks[0].heads, layout.blocks[0].kv_heads, layout.blocks[0].head_width) == (9, 3, 64)
    before = {name: tensor.clone() for name, tensor in smollm2.state_dict().items()}
    expected, written = logits(smollm2), smollm2.generate(IDS, **GREEDY)
    conversion = surgery.gateskip(smollm2, budget=0.75)
    try:
        assert conversion.parameters == (134_515_008, 134_515_008 + 60 * 577)
        difference = float((logits(smollm2) - expected).abs().max())
        assert difference < 1e-3  # Rounding: the logits reach 30 in size.
        assert torch.equal(smollm2.generate(IDS, **GREEDY), written)
    finally:
        conversion.undo()
    after = smollm2.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert smollm2.lm_head.weight is smollm2.model.embed_tokens.weight
    assert torch.equal(logits(smollm2), expected)


@pytest.mark.slow
def test_with_tokens_skipped_generation_with_a_cache_equals_generation_without(smollm2):
    conversion = surgery.gateskip(smollm2, budget=0.4)
    try:
        for parameter in conversion.part.gates.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad(), conversion.part.calibrating():
            smollm2(torch.randint(3, 40000, (4, 64), generator=generator))
        core.metrics(smollm2)
        logits(smollm2)
        kept = torch.stack([value.mean() for name, value in core.metrics(smollm2).items() if "kept" in name])
        assert bool((kept < 0.8).all())
        expected = smollm2.generate(IDS, use_cache=False, **GREEDY)
        for way in ({}, {"cache_implementation": "static"}):
            assert torch.equal(smollm2.generate(IDS, **way, **GREEDY), expected)
    finally:
        conversion.undo()


@pytest.mark.slow
def test_several_conversions_survive_save_and_load_bitwise(smollm2, tmp_path):
    model = copy.deepcopy(smollm2)
    surgery.gateskip(model)
    packed = surgery.ternary(model, per="row", pack=True)
    assert packed.stored_bytes[1] < 0.26 * packed.stored_bytes[0]  # The embedding, 113 MB of 538, stays as it is.
    surgery.save(model, tmp_path)
    loaded = surgery.load(tmp_path)
    ours, theirs = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (model, loaded))
    assert list(ours) == list(theirs)
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(loaded.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))


@pytest.mark.slow
def test_distillation_brings_a_ternary_model_back_a_little(smollm2):
    model = copy.deepcopy(smollm2)
    surgery.ternary(model, per="row")
    batches = [torch.cat([IDS[:1], IDS[:1].flip(1)], 1)]
    found = surgery.distill(model, smollm2, batches, steps=6, lr=3e-4)
    assert found[-1] < 0.8 * found[0]
