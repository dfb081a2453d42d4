"""The masked autoencoder: what it sees, what it says, and CRATE's two kinds of layers."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatework.core import PartError, metrics
from gatework.mixers.crate_mssa import coding_rate
from gatework.models import BACKBONES, MaskedAutoencoder
from gatework.models.trunk import patches

CRATE = {"mixer": "crate_mssa(causal=false)", "feedforward": "crate_ista", "decoder": "inverse"}


def model(shape: tuple[int, int, int] = (2, 4, 6), hidden: int = 4, **settings) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(shape, hidden, **({"d_model": 8, "heads": 2, "layers": 2} | settings)).double()


def inputs(batch: int = 3, hidden: int = 4) -> tuple[Tensor, Tensor]:
    """Pictures of 2 x 4 x 6 pixels with a mask of 2 x 2 patches, and which patches are hidden."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(batch, 2, 4, 6, dtype=torch.float64, generator=generator)
    where = torch.zeros(batch, 6, dtype=torch.bool)
    for row in where:
        row[torch.randperm(6, generator=generator)[:hidden]] = True
    mask = where.view(batch, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return torch.cat([pictures, mask.double()], 1), where


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def test_patches_are_squares_in_the_order_of_reading():
    x = torch.arange(32.0).view(1, 2, 4, 4)
    assert patches(x, 2)[0].tolist() == [
        [0, 1, 4, 5, 16, 17, 20, 21], [2, 3, 6, 7, 18, 19, 22, 23],
        [8, 9, 12, 13, 24, 25, 28, 29], [10, 11, 14, 15, 26, 27, 30, 31],
    ]


def test_positions_are_sines_and_cosines_of_row_and_column():
    positions = MaskedAutoencoder((1, 4, 6), 4, d_model=12, heads=2).positions
    for i in range(2):
        for j in range(3):
            angles = [[place * 10000.0 ** (-k / 3) for k in range(3)] for place in (i, j)]
            wanted = [f(a) for axis in angles for f in (math.sin, math.cos) for a in axis]
            torch.testing.assert_close(positions[3 * i + j], torch.tensor(wanted), rtol=0, atol=1e-6)


def encoded(m: MaskedAutoencoder, x: Tensor, where: Tensor) -> Tensor:
    """Token by token up to the encoder."""
    rows = []
    for picture, hides in zip(x, where, strict=True):
        tokens = []
        for i in range(2):
            for j in range(3):
                square = picture[:2, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten()
                token = m.stand_in if hides[3 * i + j] else m.stem.weight @ square + m.stem.bias
                tokens.append(token + m.positions[3 * i + j])
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def test_a_crate_autoencoder_is_its_equations():
    m, (x, where) = model(**CRATE), inputs()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.1 * torch.randn_like(p))
    z = encoded(m, x, where)
    for block in m.blocks:
        z = z + block.mixer(layer_norm(block.mixer_norm, z))
        z = block.feedforward(z)
    z = layer_norm(m.norm, z)
    for layer in m.decoder:
        z = layer_norm(layer.norm, z) @ layer.linear.weight.T
        z = z - layer.mixer(layer_norm(layer.mixer_norm, z))
    z = layer_norm(m.head_norm, z) @ m.head.weight.T + m.head.bias
    wanted = torch.stack([row[hides].flatten() for row, hides in zip(z, where, strict=True)])
    torch.testing.assert_close(m(x), wanted, rtol=0, atol=1e-11)
    assert m(x).shape == (3, 4 * 8)


def test_a_transformer_is_its_equations():
    m, (x, where) = model(feedforward="mlp"), inputs()
    z = encoded(m, x, where)
    for blocks, norm in ((m.encoder.blocks, m.norm), (m.decoder.blocks, m.head_norm)):
        assert len(blocks) == 2
        for block in blocks:
            z = z + block.mixer(layer_norm(block.mixer_norm, z))
            z = z + block.feedforward(layer_norm(block.feedforward_norm, z))
        z = layer_norm(norm, z)
    wanted = m.head(torch.stack([row[hides] for row, hides in zip(z, where, strict=True)])).flatten(1)
    torch.testing.assert_close(m(x), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("settings", [{}, CRATE], ids=["transformer", "crate"])
def test_hidden_pixels_are_not_seen_and_shown_ones_are(settings):
    m, (x, where) = model(**settings), inputs()
    mask = x[:, -1:] > 0
    y = m(x)
    for filler in (7.0, math.nan):
        other = torch.cat([x[:, :-1].masked_fill(mask, filler), x[:, -1:]], 1)
        assert torch.equal(m(other), y)
        m.zero_grad()
        m(other).sum().backward()
        assert all(p.grad.isfinite().all() for p in m.parameters())
    moved = torch.cat([x[:, :-1] + (~mask) * 0.5, x[:, -1:]], 1)
    assert (m(moved) - y).abs().amin(1).min() > 0
    assert where.any()


@pytest.mark.parametrize("settings", [{}, CRATE], ids=["transformer", "crate"])
def test_every_parameter_learns(settings):
    m, (x, _) = model(**settings), inputs()
    m(x).square().sum().backward()
    assert [name for name, p in m.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_crate_has_about_a_third_of_the_parameters():
    sizes = [
        sum(p.numel() for p in part.parameters())
        for settings in ({"feedforward": "mlp"}, CRATE)
        for part in [MaskedAutoencoder((1, 8, 8), 12, d_model=64, layers=3, **settings)]
    ]
    assert sizes[1] / sizes[0] < 0.3
    # A layer: U, W_o, D or E, against q, k, v, o and eight more of an MLP.
    assert sizes[1] / sizes[0] == pytest.approx(3 / 12, abs=0.03)


def test_codes_say_how_sparse_a_layer_is_and_features_are_their_mean():
    m, (x, _) = model(**CRATE, layers=3), inputs()
    pictures = x[:, :2]
    codes = m.codes(pictures)
    assert [tuple(code.shape) for code in codes] == [(3, 6, 8)] * 3
    assert all((code >= 0).all() for code in codes)
    m.features(pictures)
    said = metrics(m)
    for i, code in enumerate(codes):
        assert said[f"encoder.blocks.{i}.feedforward.nonzero"].item() == pytest.approx((code > 0).double().mean().item())
        assert coding_rate(code).shape == (3,)
        assert m.blocks[i].mixer.coding_rate(m.blocks[i].mixer_norm(code)).shape == (3,)
    torch.testing.assert_close(m.features(pictures), m.norm(codes[-1]).mean(1), rtol=0, atol=1e-12)


def test_it_learns_to_complete():
    torch.manual_seed(0)
    m = MaskedAutoencoder((1, 4, 4), 2, patch=2, d_model=16, heads=2, layers=1, **CRATE)
    optimizer = torch.optim.Adam(m.parameters(), 5e-3)
    colour = torch.rand(16, 1, 1, 1)
    pictures = colour.expand(-1, 1, 4, 4)
    mask = torch.zeros(16, 1, 4, 4)
    mask[:8, :, :, :2], mask[8:, :, 2:] = 1, 1
    x, y = torch.cat([pictures * (1 - mask), mask], 1), colour.flatten(1).expand(-1, 8)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.mse_loss(m(x), y)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * y.var()


def test_it_is_a_backbone():
    assert BACKBONES["masked_autoencoder"] is MaskedAutoencoder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_shape": (1, 8, 7)}, "sides divisible by patch 2, not"),
        ({"hidden": 17}, "between 1 and the 16 patches of a picture, got 17"),
        ({"hidden": 0}, "got 0"),
        ({"d_model": 6}, "d_model must be a multiple of 4 and layers at least 1, got 6 and 2"),
        ({"mixer": "gpsa"}, "a grid has no order: give causal=False"),
        ({"decoder": "none"}, "decoder must be same or inverse, got 'none'"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    init = inspect.unwrap(MaskedAutoencoder.__init__)  # The annotation check of the test run comes before the class's own.
    with pytest.raises(PartError, match=message):
        init(MaskedAutoencoder.__new__(MaskedAutoencoder), **({"input_shape": (1, 8, 8), "hidden": 12} | settings))


def test_wrong_calls_meet_one_sentence():
    m, (x, _) = model(), inputs()
    with pytest.raises(PartError, match=r"the shape \(3, 4, 6\) here, the mask last, not \(2, 4, 6\)"):
        m(x[:, 1:])
    with pytest.raises(PartError, match="built for 4 hidden patches of side 2"):
        m(inputs(hidden=3)[0])
    crooked = x.clone()
    crooked[:, -1] = crooked[:, -1].roll(1, -1)
    with pytest.raises(PartError, match="built for 4 hidden patches of side 2"):
        m(crooked)
