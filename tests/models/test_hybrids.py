"""Decoders whose layers alternate between recurrent mixers and attention: they train, decode, pack and generate as one model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gatework.core import PartError
from gatework.models import Decoder

VOCAB, LAYERS = 13, 3
HYBRIDS = [
    "gla, gla, attention",
    "gsa, attention(window=4)",
    "linear_attention, attention(window=4), gla",
    "gsa(kv_heads=1, slots=4), gla, gated_attention",
]


def decoder(mixer: str, **settings) -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCAB, **({"d_model": 16, "layers": LAYERS, "heads": 2, "mixer": mixer} | settings)).double().eval()


def tokens(batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_pattern_places_the_mixers():
    names = [type(block.mixer).__name__ for block in decoder("gsa, attention(window=4)").blocks]
    assert names == ["GatedSlotAttention", "Attention", "GatedSlotAttention"]


@pytest.mark.parametrize("mixer", HYBRIDS)
@pytest.mark.parametrize("pieces", [[1] * 19, [6, 1, 12]])
def test_pieces_equal_whole(mixer, pieces):
    model, x = decoder(mixer), tokens()
    state = model.init_state(2)
    with torch.no_grad():
        fed = torch.cat([model(piece, state=state) for piece in x.split(pieces, 1)], 1)
        torch.testing.assert_close(fed, model(x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", HYBRIDS)
def test_greedy_generation_equals_uncached_beside_a_longer_row(mixer):
    model, short, long = decoder(mixer), tokens(1, 4), tokens(1, 9)
    expected = short
    for _ in range(6):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :5] = False
    padded = torch.cat([F.pad(short, (5, 0)), long])
    together = model.generate(padded, 6, temperature=0.0, mask=mask)
    assert torch.equal(together[0, 5:], expected[0])
    assert torch.equal(together[1], model.generate(long, 6, temperature=0.0)[0])


@pytest.mark.parametrize("mixer", HYBRIDS)
def test_packed_documents_equal_separate(mixer):
    model, x = decoder(mixer), tokens(1)
    packed = model(x, segments=torch.tensor([[0] * 8 + [1] * 11]))
    torch.testing.assert_close(packed[:, :8], model(x[:, :8]), rtol=0, atol=1e-10)
    torch.testing.assert_close(packed[:, 8:], model(x[:, 8:]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", HYBRIDS)
def test_learns_to_repeat(mixer):
    """The second half of a sequence is its first half, which takes a memory across the sequence: guessing costs log 8."""
    model = decoder(mixer, d_model=32).float().train()
    optimizer, generator = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(2)
    for _ in range(50):
        x = torch.randint(8, (32, 4), generator=generator).repeat(1, 2)
        loss = F.cross_entropy(model(x)[:, 3:-1].flatten(0, 1), x[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    assert loss.item() < 0.5


def test_the_state_is_what_attention_keeps_and_a_constant():
    both, attention = decoder("gsa, attention, gla"), decoder("attention(window=8)")
    sizes = [mixer.state_bytes(1000) for mixer in (block.mixer for block in both.blocks)]
    assert both.state_bytes(1000) == sum(sizes)
    assert both.state_bytes(2000) - both.state_bytes(1000) == 1000 * 2 * 16 * 8  # Keys and values of one layer of three.
    assert attention.state_bytes(2000) == attention.state_bytes(1000)
    with torch.no_grad():
        state = both.init_state(1)
        both(tokens(1, 11), state=state)
    assert state.nbytes == both.state_bytes(11)


def test_a_mixer_that_sees_later_tokens_is_refused():
    for mixer in ("vig", "gla, linear_attention(causal=false)"):
        with pytest.raises(PartError, match="needs a causal mixer"):
            decoder(mixer)
