"""The layers of two streams: the same map of each position's channels as a picture and as tokens, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gatework.core import PartError
from gatework.gates.streams import check_streams, norm, pointwise

from .two_streams import EXACT, mapped, normed, with_odd_norms

PICTURE = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = PICTURE.permute(0, 2, 3, 1).flatten(1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_map_is_one_matrix_for_all_positions_in_both_forms(bias):
    linear, convolution = (pointwise(6, 3, tokens, bias).double() for tokens in (True, False))
    assert (linear.bias is not None) == (convolution.bias is not None) == bias
    with torch.no_grad():
        for ours, theirs in zip(convolution.parameters(), linear.parameters(), strict=True):
            ours.copy_(theirs.view_as(ours))
    torch.testing.assert_close(linear(TOKENS), mapped(linear, TOKENS), **EXACT)
    torch.testing.assert_close(convolution(PICTURE).permute(0, 2, 3, 1).flatten(1, 2), mapped(linear, TOKENS), **EXACT)


@pytest.mark.parametrize("train", [True, False])
def test_pictures_are_normed_over_the_batch_and_tokens_over_their_own_channels(train):
    torch.manual_seed(0)
    batch, layer = (with_odd_norms(nn.Sequential(norm(6, tokens)), train)[0] for tokens in (False, True))
    wanted = normed(batch, TOKENS, train)
    torch.testing.assert_close(batch(PICTURE).permute(0, 2, 3, 1).flatten(1, 2), wanted, **EXACT)
    torch.testing.assert_close(layer(TOKENS), normed(layer, TOKENS, train), **EXACT)
    torch.testing.assert_close(layer(TOKENS[:, 3:4]), layer(TOKENS)[:, 3:4], **EXACT)


@pytest.mark.parametrize(
    ("a", "b", "tokens", "message"),
    [
        ((2, 6, 5, 4), (2, 6, 5, 3), False, "the two streams have one shape (B, 6, H, W), not (2, 6, 5, 4) and (2, 6, 5, 3)"),
        ((2, 5, 6), (1, 5, 6), True, "the two streams have one shape (B, T, 6), not (2, 5, 6) and (1, 5, 6)"),
        ((2, 5, 5, 6), (2, 5, 5, 6), False, "a stream has shape (B, 6, H, W), not (2, 5, 5, 6)"),
        ((6, 5, 4), (6, 5, 4), False, "a stream has shape (B, 6, H, W), not (6, 5, 4)"),
        ((2, 6, 5), (2, 6, 5), True, "a stream has shape (B, T, 6), not (2, 6, 5)"),
        ((2, 1, 5, 6), (2, 1, 5, 6), True, "a stream has shape (B, T, 6), not (2, 1, 5, 6)"),
    ],
)
def test_streams_of_another_form_are_refused(a, b, tokens, message):
    with pytest.raises(PartError) as error:
        check_streams(torch.zeros(a), torch.zeros(b), 6, tokens)
    assert str(error.value) == message


@pytest.mark.parametrize(("shape", "tokens"), [((2, 6, 5, 4), False), ((0, 6, 1, 1), False), ((2, 5, 6), True), ((2, 0, 6), True)])
def test_streams_of_the_form_pass(shape, tokens):
    assert check_streams(torch.zeros(shape), torch.zeros(shape), 6, tokens) is None
