from __future__ import annotations

import pytest
import torch

from gatework.core import PartError, losses
from gatework.models import BACKBONES, CoordinateNetwork


def test_the_head_sees_the_features_of_the_field():
    torch.manual_seed(0)
    model = BACKBONES["coordinates"](2, 3, experts=3, d_ff=5)
    assert isinstance(model, CoordinateNetwork)
    x = torch.rand(7, 2)
    y = model(x)
    torch.testing.assert_close(y, model.head(model.field(x)), rtol=0, atol=0)
    assert y.shape == (7, 3)
    assert set(losses(model)) == {"field.gate.switch"}
    assert [expert[1].out_features for expert in model.field.experts] == [5] * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 0}, "channels must be at least 1"), ({"coordinates": 4}, "1, 2 or 3 coordinates"),
        ({"coarsest": 999}, "between n_min"), ({"gate": "hsah"}, "did you mean 'hash'"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(PartError, match=message):
        CoordinateNetwork(**({"coordinates": 2, "channels": 1} | settings))
