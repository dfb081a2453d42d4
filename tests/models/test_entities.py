"""Facts by three kinds of models: each against its equations, the ranking of all entities, entanglement."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from gatework.core import PartError
from gatework.models.entities import EntityModel, entanglement

NAMES = torch.tensor([[0, 3], [0, 4], [1, 3], [1, 5], [2, 4], [2, 5]])
FACTS = torch.tensor([[0, 1, 3], [2, 0, 3], [5, 1, 0], [4, 0, 2]])


def made(level, names=NAMES, noise=0.3, **settings):
    torch.manual_seed(0)
    model = EntityModel(names, relations=2, level=level, **({"d_model": 8, "layers": 2, "heads": 2} | settings)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(noise * torch.randn_like(p))
    return model


def asked(facts=FACTS):
    """As in evaluation: the objects are not told."""
    return torch.cat([facts[:, :2], torch.full_like(facts[:, :1], -100)], 1)


@pytest.mark.parametrize("names", [NAMES, torch.tensor([[0, 3, 6], [0, 3, 7], [1, 3, 6], [1, 5, 6], [2, 4, 7], [2, 4, 6]])])
@pytest.mark.parametrize("mixer", ["attention(rope=false)", "gla"])
def test_surface_ranks_every_name_by_its_tokens(names, mixer):
    """The chain rule, one full sequence per subject and candidate."""
    model = made("surface", names, mixer=mixer)
    found = model(asked())
    tokens = int(names.max()) + 1
    for row, (s, r, _) in enumerate(FACTS.tolist()):
        for e in range(len(names)):
            sequence = torch.cat([names[s], torch.tensor([tokens + r]), names[e]])
            log_p = model.decoder(sequence[None, :-1])[0].log_softmax(-1)
            k = names.shape[1]
            expected = sum(log_p[k + j, names[e, j]] for j in range(k))
            torch.testing.assert_close(found[row, e], expected, rtol=0, atol=1e-10)
    trained = model.train()(FACTS)
    torch.testing.assert_close(trained.gather(1, FACTS[:, 2:]), found.gather(1, FACTS[:, 2:]), rtol=0, atol=1e-10)
    assert trained.isfinite().sum() == len(FACTS)


def test_concept_is_the_language_model_over_one_token_per_entity():
    model = made("concept")
    assert model.decoder.vocab_size == len(NAMES) + 2
    assert model.decoder.head.weight is model.decoder.embedding.weight
    tokens = torch.stack([FACTS[:, 0], len(NAMES) + FACTS[:, 1]], 1)
    expected = model.decoder(tokens)[:, -1].log_softmax(-1)[:, : len(NAMES)]
    torch.testing.assert_close(model(asked()), expected, rtol=0, atol=1e-10)
    trained = model.train()(FACTS)
    torch.testing.assert_close(trained.gather(1, FACTS[:, 2:]), expected.gather(1, FACTS[:, 2:]), rtol=0, atol=1e-10)


def joint(model, memory):
    """Concepts and predictions by hand."""
    embedded = model.embedding.weight[NAMES]
    if memory:
        x = embedded.mean(1)
        slots = (x @ model.memory.keys.t()).argmax(1)
        known = F.layer_norm(model.memory.values[slots], (8,), model.norm.weight, model.norm.bias)
    else:
        known = torch.stack([model.recognition(name[None])[0, -1] for name in embedded])
    rows = torch.stack([known[FACTS[:, 0]], model.relation.weight[FACTS[:, 1]]], 1)
    p = model.semantics(rows)[:, -1]
    if memory:
        p = F.layer_norm(p, (8,), model.norm.weight, model.norm.bias)
    else:
        p = p * (p.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).rsqrt()
    return p @ known.t()


@pytest.mark.parametrize("memory", [None, 1])
def test_joint_embeddings_rank_all_entities_and_train_on_the_batchs(memory):
    model = made("jepa", memory=memory)
    scores = joint(model, memory)
    torch.testing.assert_close(model(asked()), scores.log_softmax(-1), rtol=0, atol=1e-10)
    # In a batch of two facts the candidates are their distinct subjects and objects: 0, 2 and 3, the last of which occurs twice.
    trained = model.train()(FACTS[:2])
    candidates = [0, 2, 3]
    torch.testing.assert_close(trained[:, candidates], scores[:2, candidates].log_softmax(-1), rtol=0, atol=1e-10)
    assert (trained[:, [1, 4, 5]] == -math.inf).all()
    loss = -trained.gather(1, FACTS[:2, 2:]).mean()
    expected = F.cross_entropy(scores[:2, candidates], torch.tensor([2, 2]))
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert ("embedding.weight" in found) == (memory is None)


def test_a_uniform_scorer_loses_the_logarithm_of_the_candidates():
    model = made("jepa").train()
    with torch.no_grad():
        model.recognition.blocks[0].mixer.o_proj.weight.zero_()
        model.recognition.blocks[0].feedforward.down.weight.zero_()
        model.embedding.weight.zero_()
    loss = -model(FACTS).gather(1, FACTS[:, 2:]).mean()
    assert loss.item() == pytest.approx(math.log(5))  # 0, 2, 3, 4 and 5.


def test_the_memory_has_a_slot_for_each_entity_and_only_its_values_learn():
    torch.manual_seed(0)
    names = torch.tensor(list(itertools.product(range(10), range(10, 20))))
    model = EntityModel(names, relations=2, level="jepa", d_model=64, layers=1, heads=2, memory=1).train()
    torch.testing.assert_close(model.memory.keys, model.embedding.weight[names].mean(1))
    _, slots = model.memory.read(model.embedding.weight[names].mean(1))
    assert slots[:, 0].tolist() == list(range(100))  # Each entity finds its own slot, though ten share each name.
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["embedding.weight", "memory.keys"]
    (-model(FACTS).gather(1, FACTS[:, 2:]).mean()).backward()
    touched = model.memory.values.grad.any(1).nonzero()[:, 0].tolist()
    assert touched == [0, 2, 3, 4, 5]
    assert model.entanglement() == 0


def test_entanglement_is_the_mean_cosine_of_the_last_hidden_layer():
    h = torch.tensor([[1.0, 0], [1, 1], [0, -2]])
    half = math.sqrt(0.5)
    assert entanglement(h) == pytest.approx((half + 0 + half) / 3)
    model = made("jepa")
    hidden = []
    for name in model.embedding.weight[NAMES]:
        block = model.recognition.blocks[0]
        x = name[None] + block.mix(name[None])
        hidden.append(F.gelu(F.rms_norm(x, (8,), block.feedforward_norm.weight, 1e-6) @ block.feedforward.up.weight.t())[0, -1])
    assert model.entanglement() == pytest.approx(entanglement(torch.stack(hidden)), abs=1e-12)
    with pytest.raises(PartError, match="entanglement is that of recognition, and level=surface has none"):
        made("surface").entanglement()
    with pytest.raises(PartError, match="entanglement needs a feed-forward with a last matrix called down"):
        made("jepa", feedforward="memory_layer(d_ff=9, k=2)").entanglement()


def test_wrong_use_meets_one_sentence():
    with pytest.raises(PartError, match="memory belongs to the recognition of level=jepa, and this model has level=concept"):
        made("concept", memory=1)
    with pytest.raises(PartError, match="k must be between 1 and the 6 slots, got 7"):
        made("jepa", memory=7)
    with pytest.raises(PartError, match="in training every fact has its object"):
        made("jepa").train()(asked())
    with pytest.raises(PartError, match=r"names are \(entities, tokens\) of whole numbers from 0 on"):
        made("surface", names=NAMES - 1)
    with pytest.raises(PartError, match="relations must be at least 1, got 0"):
        EntityModel(NAMES, relations=0)
    with pytest.raises(PartError, match="needs a causal mixer, and this Attention is not"):
        made("jepa", mixer="attention(causal=false)")
