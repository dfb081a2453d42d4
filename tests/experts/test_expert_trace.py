"""The recorder of who served how many rows, gate by gate and batch by batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gatework.core import PartError
from gatework.experts import MoE
from gatework.experts.expert_trace import record
from gatework.models import Decoder

D, E = 8, 4


def layer(**settings) -> MoE:
    torch.manual_seed(0)
    made = MoE(D, **({"d_ff": 6, "experts": E} | settings)).double().eval()
    nn.init.normal_(made.gate.weight)
    return made


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def chosen(m: MoE, x: torch.Tensor) -> list[int]:
    """How often each expert is among the two largest scores."""
    found = [0] * E
    for row in x @ m.gate.weight.T:
        for e in sorted(range(E), key=lambda e: -row[e].item())[:2]:
            found[e] += 1
    return found


@pytest.mark.parametrize("settings", [{}, {"capacity": 1.0}], ids=str)
def test_counts_are_the_chosen_rows_with_what_a_capacity_drops(settings):
    m, batches = layer(**settings), [tokens(13), tokens(1, 2), tokens(0), tokens(7, 3)]
    with record(m) as trace:
        for x in batches:
            m(x)
        assert not trace
    assert list(trace) == ["gate"]
    assert trace["gate"].tolist() == [chosen(m, x) for x in batches]
    assert trace["gate"].dtype == torch.long


def test_padding_is_not_counted():
    m, x, mask = layer(), tokens(10), torch.arange(10) % 3 > 0
    with record(m) as trace:
        m(x, mask)
    assert trace["gate"].tolist() == [chosen(m, x[mask])]


def test_a_gate_that_is_not_called_is_missing_and_an_error_leaves_no_hooks():
    model = nn.ModuleDict({"used": layer(), "idle": layer()})
    wrong = tokens(5)[:, 1:]
    with pytest.raises(PartError, match="not"), record(model) as trace:
        [model["used"](x) for x in (tokens(5), wrong)]
    assert list(trace) == ["used.gate"]
    model["used"](tokens(5))
    assert len(trace["used.gate"]) == 1
    assert not any(module._forward_hooks for module in model.modules())


def test_every_gate_is_counted_once_a_pass():
    torch.manual_seed(0)
    model = Decoder(vocab_size=11, d_model=8, layers=2, heads=2, feedforward="moe(experts=4, d_ff=8)")
    ids = torch.randint(11, (2, 6))
    with record(model) as trace:
        model(ids)
        checkpoint(model, ids, use_reentrant=False).sum().backward()
    model(ids)
    assert len(trace) == 2
    for counts in trace.values():
        assert counts.shape == (2, 4)
        assert counts.sum(1).tolist() == [24, 24]
