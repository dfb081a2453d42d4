"""The classifier's three backbones."""

from __future__ import annotations

import inspect

import pytest
import torch

from gatework.core import PartError
from gatework.models import Classifier
from gatework.models.trunk import patches


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 12)])
@pytest.mark.parametrize("backbone", ["mlp", "convnet", "vit"])
def test_learns_a_batch_by_heart(shape, backbone):
    torch.manual_seed(0)
    model = Classifier(shape, 4, backbone=backbone, d_model=16, heads=2)
    x, y = torch.randn(8, *shape), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model(x).argmax(-1) == y).all()


def test_blocks_then_head_is_the_model():
    model = Classifier((1, 8, 8), 4, d_model=16, layers=3)
    x = torch.randn(2, 1, 8, 8)
    h = x
    for block in model.blocks:
        h = block(h)
    torch.testing.assert_close(model.head(h), model(x), rtol=0, atol=0)


def test_vit_sees_every_patch_from_every_patch():
    torch.manual_seed(0)
    model = Classifier((1, 4, 4), 3, backbone="vit", d_model=16, heads=2, layers=1)
    x = torch.randn(1, 1, 4, 4, requires_grad=True)
    tokens = model.depth(model.stem(patches(x, model.patch)) + model.positions)
    (gradient,) = torch.autograd.grad(tokens[0, 0].sum(), x)
    assert (gradient.abs() > 0).all()


def test_patches_are_the_pixels_of_each_square():
    model = Classifier((1, 4, 4), 3, backbone="vit", d_model=8, heads=2, layers=1)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert patches(x, model.patch)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "mlp", "mixer": "gla"}, "'mixer' has no place"),
        ({"backbone": "vit", "patch": 3}, "not divisible by patch 3"),
        ({"backbone": "convnet", "d_model": 18}, "not divisible by 4"),
        ({"classes": 0}, "at least 1 class and 1 layer, got 0 and 2"),
    ],
)
def test_wrong_settings_meet_one_sentence(settings, message):
    with pytest.raises(PartError, match=message):
        Classifier(**({"input_shape": (1, 8, 8), "classes": 4} | settings))


def test_an_unknown_backbone_is_refused():
    init = inspect.unwrap(Classifier.__init__)  # The annotation check of the test run comes before the class's own.
    with pytest.raises(PartError, match="no backbone 'resnet'; there are mlp, convnet, vit"):
        init(Classifier.__new__(Classifier), (1, 8, 8), 4, backbone="resnet")
