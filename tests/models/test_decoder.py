"""The decoder: composition, decoding, generation, refusals."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError
from gatework.models import Decoder

VOCAB = 17


def decoder(**settings) -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCAB, **({"d_model": 16, "layers": 3, "heads": 2} | settings)).double().eval()


def tokens(batch: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


MIXERS = ["attention", "gated_attention", "gla", "gla, attention", "attention(window=4)", "attention(kv_heads=1)"]
FEEDFORWARDS = ["mlp", "glu", "moe(experts=4)", "versatile_ffn(experts=4)"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_token_by_token_equals_whole(mixer):
    model, x = decoder(mixer=mixer), tokens()
    whole = model(x)
    state = model.init_state(2)
    steps = torch.cat([model(x[:, t : t + 1], state=state) for t in range(x.shape[1])], 1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
@pytest.mark.parametrize("depth", ["stack", "gateskip(budget=0.5)"])
def test_greedy_generation_equals_uncached(feedforward, depth):
    model, x = decoder(feedforward=feedforward, depth=depth, layers=2), tokens(length=5)
    expected = x
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(x, 6, temperature=0.0), expected)


def test_left_padded_batch_generates_as_alone():
    model = decoder(mixer="gla, attention")
    short, long = tokens(1, 4), tokens(1, 9)
    padded = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1), long])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :5] = False
    together = model.generate(padded, 5, temperature=0.0, mask=mask)
    assert torch.equal(together[0, 9:], model.generate(short, 5, temperature=0.0)[0, 4:])
    assert torch.equal(together[1], model.generate(long, 5, temperature=0.0)[0])


def test_generation_stops_at_eos_and_repeats_with_a_seed():
    model, x = decoder(), tokens()
    first = model.generate(x, 8, top_k=3, generator=torch.Generator().manual_seed(5))
    again = model.generate(x, 8, top_k=3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again)
    eos = int(model.generate(x, 1, temperature=0.0)[0, -1])
    stopped = model.generate(x[:1], 8, temperature=0.0, eos=eos)
    assert stopped.shape[1] == x.shape[1] + 1
    assert stopped[0, -1] == eos


def test_packed_documents_equal_separate():
    model, x = decoder(mixer="gla, attention"), tokens(1, 9)
    segments = torch.tensor([[0] * 4 + [1] * 5])
    packed = model(x, segments=segments)
    torch.testing.assert_close(packed[:, 4:], model(x[:, 4:]), rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, :4], model(x[:, :4]), rtol=0, atol=1e-10)


def test_pattern_repeats_along_the_layers():
    names = [type(b.mixer).__name__ for b in decoder(mixer="gla, attention", layers=3).blocks]
    assert names == ["GatedLinearAttention", "Attention", "GatedLinearAttention"]


def test_head_is_tied_unless_asked():
    tied, untied = decoder(), decoder(tie_embeddings=False)
    assert tied.head.weight is tied.embedding.weight
    assert untied.head.weight is not untied.embedding.weight


def test_state_bytes_counts_the_real_state():
    model, x = decoder(mixer="gla, attention"), tokens(1, 7)
    state = model.init_state(1)
    model(x, state=state)
    assert model.state_bytes(7) == state.nbytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixer": "glaa"}, "did you mean 'gla'"),
        ({"mixer": "attention(heads=3)"}, "not divisible by heads 3"),
        ({"feedforward": "glu(d_model=3)"}, "d_model is 16 in the model around it"),
        ({"mixer": "attention(causal=false)"}, "needs a causal mixer"),
        ({"mixer": "gla, gla, gla, gla"}, "pattern of 4 does not fit 3 layers"),
        ({"feedforward": "gla"}, "is a mixer, not a feedforward"),
        ({"layers": 0}, "layers must be at least 1"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    with pytest.raises(PartError, match=message):
        decoder(**settings)
