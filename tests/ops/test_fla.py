"""What is handed to the kernels of flash-linear-attention; on CUDA, that they return what ours do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatework.ops import fla
from gatework.ops.delta_rule import gated_delta_rule
from gatework.ops.linear_recurrence import gated_linear_recurrence

B, T, H, K, V = 2, 70, 3, 16, 24


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    """q, k of length 1, v, beta, log-decays per key channel, a state."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, width, generator=generator) for width in (K, K, V))
    beta, log_decay = torch.rand(B, T, H, generator=generator), F.logsigmoid(torch.randn(B, T, H, K, generator=generator) + 2)
    state = torch.randn(B, H, K, V, generator=generator)
    q, k, v, beta = (x.to(dtype) for x in (q, F.normalize(k, dim=-1), v, beta))
    return [x.to(device).requires_grad_() for x in (q, k, v, beta, log_decay, state)]


def stand_ins(calls: list[str]) -> dict:
    """Functions of the kernels' names, parameters and meaning, by our own operations."""

    def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
        calls.append("gla")
        assert output_final_state
        return gated_linear_recurrence(q, k, v, g, scale=scale, state=initial_state, segments=ONE)

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        calls.append("gated_delta_rule")
        assert output_final_state
        return gated_delta_rule(q, k, v, beta, g, scale=scale, state=initial_state, segments=ONE)

    def chunk_delta_rule(q, k, v, beta, scale=None, initial_state=None, output_final_state=False):
        calls.append("delta_rule")
        assert output_final_state
        return gated_delta_rule(q, k, v, beta, scale=scale, state=initial_state, segments=ONE)

    return {f.__name__: f for f in (chunk_gla, chunk_gated_delta_rule, chunk_delta_rule)}


#: One document: packed documents are never handed over, so this is how the stand-ins reach our own operations.
ONE = torch.zeros(B, T, dtype=torch.long)


@pytest.mark.parametrize("name", ["gla", "gated_delta_rule", "delta_rule"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("with_state", [True, False])
def test_arguments_reach_the_kernels(monkeypatch, name, scale, with_state):
    leaves = inputs()
    expected = run(name, leaves, scale, with_state)
    calls: list[str] = []
    monkeypatch.setattr(fla, "available", lambda *heads: True)
    monkeypatch.setattr(fla, "_kernels", lambda: stand_ins(calls))
    got = run(name, leaves, scale, with_state)
    assert calls == [name]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_what_stays_here(monkeypatch):
    """Packed documents, a few tokens that are stepped, decays that the kernels have no form for."""
    q, k, v, beta, log_decay, _ = (x.detach() for x in inputs())
    monkeypatch.setattr(fla, "available", lambda *heads: True)
    monkeypatch.setattr(fla, "_kernels", dict)
    gated_delta_rule(q, k, v, beta, segments=ONE)
    gated_delta_rule(*(x[:, :2] for x in (q, k, v, beta)))
    gated_linear_recurrence(q, k, v, log_decay, segments=ONE)
    gated_linear_recurrence(*(x[:, :2] for x in (q, k, v, log_decay)))
    gated_linear_recurrence(q, k, v, log_decay[..., :1])
    gated_linear_recurrence(q, k, v, None)
    gated_linear_recurrence(q, k, v, torch.zeros_like(v), axis="values")
    with pytest.raises(KeyError):
        gated_delta_rule(q, k, v, beta)


def test_nothing_is_handed_over_on_a_cpu():
    assert not fla.available(torch.zeros(1, 9, 1, 4, dtype=torch.bfloat16))


def run(name: str, leaves: list[Tensor], scale: float | None, with_state: bool) -> tuple[Tensor, ...]:
    """Outputs and gradients."""
    q, k, v, beta, log_decay, state = leaves
    settings = {"scale": scale, "state": state if with_state else None}
    if name == "gla":
        results = gated_linear_recurrence(q, k, v, log_decay, **settings)
    else:
        results = gated_delta_rule(q, k, v, beta, None if name == "delta_rule" else log_decay[..., 0], **settings)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    return *results, *torch.autograd.grad(results, leaves, upstream, allow_unused=True, materialize_grads=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["gla", "gated_delta_rule", "delta_rule"])
@pytest.mark.parametrize("with_state", [True, False])
def test_the_kernels_return_what_ours_do(monkeypatch, name, with_state):
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    leaves = inputs(torch.bfloat16, "cuda")
    assert fla.available(*leaves[:3])
    theirs = run(name, leaves, None, with_state)
    monkeypatch.setattr(fla, "available", lambda *heads: False)
    for a, b in zip(theirs, run(name, leaves, None, with_state), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.02 * float(b.detach().abs().max()))
