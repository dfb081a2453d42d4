"""From vectors to vectors by any causal mixer."""

from __future__ import annotations

import pytest
import torch

from gatework.core import PartError
from gatework.models import SequenceRegressor


def made(**settings):
    torch.manual_seed(0)
    return SequenceRegressor(**({"inputs": 3, "outputs": 2, "d_model": 8, "heads": 2, "layers": 2} | settings)).double().eval()


def test_it_is_a_stem_blocks_a_norm_and_a_head():
    model = made(mixer="gla")
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    h = x @ model.stem.weight.t() + model.stem.bias
    for block in model.blocks:
        h = block(h)
    h = h * (h.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * model.norm.weight
    torch.testing.assert_close(model(x), h @ model.head.weight.t() + model.head.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mixer", ["attention", "gla", "linear_self_attention", "gla, attention"])
def test_whole_equals_token_by_token_and_packed_equals_separate(mixer):
    model = made(mixer=mixer)
    x = torch.randn(2, 7, 3, dtype=torch.float64)
    whole, state = model(x), model.init_state(2)
    steps = torch.cat([model(x[:, t : t + 1], state=state) for t in range(7)], 1)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-10)
    assert state.nbytes == 2 * model.state_bytes(7)
    packed = model(torch.cat([x[:1], x[1:]], 1), segments=torch.tensor([[0] * 7 + [1] * 7]))
    torch.testing.assert_close(packed.view(2, 7, 2), whole, rtol=0, atol=1e-10)
    mask = torch.tensor([[False, True, True, True, True, True, True, True]])
    padded = model(torch.cat([torch.full((1, 1, 3), 5.0), x[:1]], 1), mask=mask)
    torch.testing.assert_close(padded[:, 1:], whole[:1], rtol=0, atol=1e-10)


def test_wrong_use_meets_one_sentence():
    with pytest.raises(PartError, match="a model that predicts a sequence needs a causal mixer, and this Attention is not"):
        made(mixer="attention(causal=false)")
    with pytest.raises(PartError, match="inputs and outputs must be at least 1, got 0 and 2"):
        made(inputs=0)
    with pytest.raises(PartError, match="layers must be at least 1, got 0"):
        made(layers=0)
    with pytest.raises(PartError, match=r"this model was built for inputs of shape \(batch, time, 3\), not \(2, 7, 4\)"):
        made()(torch.zeros(2, 7, 4))
