"""The prior-data fitted network: its attention by hand, what it may and may not depend on, linear mixers in its place."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gatework.core import PartError
from gatework.core.cost import count_flops
from gatework.models import PFN
from gatework.models.pfn import ContextAttention


def made(mixer=None, **settings):
    torch.manual_seed(0)
    model = PFN(**({"inputs": 2, "bars": 5, "d_model": 8, "layers": 2, "heads": 2, "mixer": mixer} | settings)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def points(context=4, queries=3, batch=2, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    return draw(batch, context, 2), draw(batch, context), draw(batch, queries, 2)


def rms(x, norm):
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight


def reference(model, x, y, queries):
    """All points side by side under the paper's mask, one head and one pair at a time."""
    m, n = x.shape[1], x.shape[1] + queries.shape[1]
    out = []
    for b in range(len(x)):
        h = torch.cat([model.encode_x(x[b]) + model.encode_y(y[b][:, None]), model.encode_x(queries[b])])
        for block in model.depth.blocks:
            mixer = block.mixer
            q, k, v = mixer.qkv(rms(h, block.mixer_norm)).unflatten(-1, (3, 2, 4)).unbind(1)
            rows = []
            for i in range(n):
                heads = []
                for head in range(2):
                    seen = [j for j in range(n) if j < m or j == i]
                    scores = torch.stack([q[i, head] @ k[j, head] / math.sqrt(4) for j in seen]).softmax(0)
                    heads.append(sum(s * v[j, head] for s, j in zip(scores, seen, strict=True)))
                rows.append(torch.cat(heads))
            h = h + mixer.o_proj(torch.stack(rows))
            normed = rms(h, block.feedforward_norm)
            h = h + F.gelu(normed @ block.feedforward.up.weight.t()) @ block.feedforward.down.weight.t()
        out.append(model.head(rms(h[m:], model.norm)))
    return torch.stack(out)


@pytest.mark.parametrize("context", [0, 1, 4])
def test_outputs_and_gradients_equal_the_papers_mask(context):
    model, given = made(), points(context)
    weight = torch.randn(2, 3, 5, dtype=torch.float64)
    results = []
    for run in (model.predict, lambda *given: reference(model, *given)):
        out = run(*given)
        model.zero_grad()
        (out * weight).sum().backward()
        results.append([out, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}])
    torch.testing.assert_close(*results, rtol=0, atol=1e-10)


def test_one_tensor_says_the_same_as_three():
    model, (x, y, queries) = made(), points()
    flags = torch.tensor([1.0] * 4 + [0.0] * 3).double().expand(2, -1)
    values = torch.cat([y, torch.full((2, 3), 7.0).double()], 1)  # A query's y is not looked at.
    whole = torch.cat([torch.cat([x, queries], 1), values[..., None], flags[..., None]], -1)
    torch.testing.assert_close(model(whole), model.predict(x, y, queries), rtol=0, atol=0)


@pytest.mark.parametrize("mixer", [None, "gla", "attention", "linear_self_attention", "gla, attention(rope=false)"])
def test_queries_do_not_see_each_other(mixer):
    model, (x, y, queries) = made(mixer), points()
    whole = model.predict(x, y, queries)
    for i in range(3):
        torch.testing.assert_close(model.predict(x, y, queries[:, i : i + 1]), whole[:, i : i + 1], rtol=0, atol=1e-12)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model.predict(x, y, queries[:, order]), whole[:, order], rtol=0, atol=1e-12)
    assert (model.predict(x, y + 1, queries) - whole).abs().min() > 0  # But all see the context.
    assert model.predict(x[:, :0], y[:, :0], queries).shape == whole.shape


def test_the_papers_attention_reads_its_context_as_a_set_and_a_causal_mixer_in_its_order():
    order = torch.tensor([3, 1, 0, 2])
    x, y, queries = points()
    for mixer in (None, "gla", "attention"):
        model = made(mixer)
        apart = (model.predict(x[:, order], y[:, order], queries) - model.predict(x, y, queries)).abs().max()
        assert apart < 1e-12 if mixer is None else apart > 1e-6


@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_a_causal_mixer_is_one_sequence_per_query(mixer):
    """Context and one query, side by side through the blocks."""
    model, (x, y, queries) = made(mixer), points()
    for i in range(3):
        h = torch.cat([model.encode_x(x) + model.encode_y(y[..., None]), model.encode_x(queries[:, i : i + 1])], 1)
        expected = model.head(model.norm(model.depth(h)))[:, -1]
        torch.testing.assert_close(model.predict(x, y, queries)[:, i], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixer", [None, "gla", "attention"])
def test_gradients_reach_everything(mixer):
    model, (x, y, queries) = made(mixer).train(), points()
    model.predict(x, y, queries).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_every_block_starts_as_the_identity():
    torch.manual_seed(0)
    model, (x, y, queries) = PFN(2, 5, d_model=8, layers=2).double(), points()
    torch.testing.assert_close(model.predict(x, y, queries), model.head(model.norm(model.encode_x(queries))), rtol=0, atol=0)


def test_a_query_costs_the_context_and_not_the_other_queries():
    counts = []
    for queries in (10, 20, 40):
        with count_flops() as count, torch.no_grad():
            made().predict(*points(6, queries, batch=1))
        counts.append(count.total)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_the_papers_attention_says_what_it_cannot():
    mixer = ContextAttention(8, heads=2)
    x, state = torch.randn(2, 5, 8), mixer.init_state(2)
    torch.nn.init.normal_(mixer.o_proj.weight)
    torch.testing.assert_close(mixer(x, state=state), mixer(x))
    assert state.nbytes == 2 * mixer.state_bytes(5)
    keep = torch.tensor([[True, False, True, True, False]] * 2)
    torch.testing.assert_close(mixer(x, keep=keep), mixer(x) * keep[..., None])
    assert not any(mixer.capabilities[name] for name in ("causal", "decodes", "packs", "keeps"))
    with pytest.raises(PartError, match="sets come without padding and one to a row"):
        mixer(x, mask=keep)


def test_wrong_use_meets_one_sentence():
    with pytest.raises(PartError, match="needs a causal mixer, and this Attention is not"):
        made("attention(causal=false)")
    with pytest.raises(PartError, match="d_model 8 is not divisible by heads 3"):
        made(heads=3)
    with pytest.raises(PartError, match="inputs and bars must be at least 1, got 2 and 0"):
        made(bars=0)
    x = torch.zeros(2, 4, 4, dtype=torch.float64)
    with pytest.raises(PartError, match=r"x has the shape \(batch, points, 4\): each point's x, y and whether it is context, not"):
        made()(x[..., :3])
    for flags in ([[0.0, 1, 0, 0], [1, 0, 0, 0]], [[1.0, 0, 1, 0], [1, 0, 1, 0]], [[1.0, 1, 0, 0], [1, 0, 0, 0]]):
        x[..., 3] = torch.tensor(flags)
        with pytest.raises(PartError, match="the context comes first in every row and is as long in all of them"):
            made()(x)
