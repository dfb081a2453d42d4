"""Softmax attention from its equations, one query at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def rope(x: Tensor, position: int, base: float) -> Tensor:
    """Turn the plane of channels i and i + K/2 by ``position * base^(-2i/K)``."""
    width = len(x)
    turned = list(x)
    for i in range(width // 2):
        angle = position * base ** (-2 * i / width)
        a, b = x[i], x[i + width // 2]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + width // 2] = a * math.sin(angle) + b * math.cos(angle)
    return torch.stack(turned)


def _attention(m, x: Tensor, mask: Tensor | None = None, segments: Tensor | None = None, gate=None) -> Tensor:
    """``m``'s output for ``x`` (B, T, D), from its weights; rows of padded tokens are 0 here.

    ``gate(position, what (heads, K), x_t)`` may change what stands at g1 to g4 (heads, K) and g5 (1, D).
    """
    gate = gate or (lambda position, what, x_t: what)
    width = m.d_model // m.heads
    rows = []
    for b in range(len(x)):
        real = [t for t in range(x.shape[1]) if mask is None or mask[b, t]]
        q, k, v = {}, {}, {}
        for place, t in enumerate(real):
            q_t = gate("g4", (m.q_proj.weight @ x[b, t]).view(m.heads, width), x[b, t])
            k_t = gate("g3", (m.k_proj.weight @ x[b, t]).view(m.kv_heads, width), x[b, t])
            v[t] = gate("g2", (m.v_proj.weight @ x[b, t]).view(m.kv_heads, width), x[b, t])
            if m.q_norm is not None:
                q_t, k_t = rms_norm(q_t, m.q_norm.weight), rms_norm(k_t, m.k_norm.weight)
            if m.rope:
                q_t = torch.stack([rope(head, place, m.rope_base) for head in q_t])
                k_t = torch.stack([rope(head, place, m.rope_base) for head in k_t])
            q[t], k[t] = q_t, k_t
        outputs = [torch.zeros_like(x[b, 0]) for _ in range(x.shape[1])]
        for i, t in enumerate(real):
            seen = [
                s for j, s in enumerate(real)
                if (j <= i or not m.causal)
                and (m.window is None or abs(i - j) < m.window)
                and (segments is None or segments[b, s] == segments[b, t])
            ]
            heads = []
            for h in range(m.heads):
                g = h // (m.heads // m.kv_heads)
                scores = torch.stack([q[t][h] @ k[s][g] / width**0.5 for s in seen])
                weights = scores.exp() / scores.exp().sum()
                heads.append(sum(w * v[s][g] for w, s in zip(weights, seen, strict=True)))
            read = gate("g1", torch.stack(heads), x[b, t]).flatten()
            outputs[t] = gate("g5", (m.o_proj.weight @ read)[None], x[b, t])[0]
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


@pytest.fixture(scope="session")
def attention_equations():
    """The slow reference: ``attention_equations(module, x, mask=None, segments=None, gate=None)``."""
    return _attention
