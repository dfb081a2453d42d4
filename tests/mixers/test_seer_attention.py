"""SeerAttention against its equations: what is read, what the gate learns, and the forms of decoding."""

from __future__ import annotations

import math

import pytest
import torch

from gatework.core import losses, metrics
from gatework.core.cost import count_flops
from gatework.mixers import Attention, SeerAttention

D, HEADS, BLOCK = 16, 4, 4
FORMS = [
    {"choice": "token"}, {"choice": "token", "kv_heads": 2, "gate_width": 6}, {"choice": "token", "kv_heads": 1, "rope": False},
    {"choice": "block"}, {"choice": "block", "kv_heads": 2, "gate_width": 6}, {"choice": "block", "kv_heads": 2, "qk_norm": True},
]


def layer(train: bool = False, **settings) -> SeerAttention:
    torch.manual_seed(0)
    m = SeerAttention(D, **({"heads": HEADS, "block": BLOCK} | settings)).double()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return m.train(train)


def inputs(length: int = 22, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def parts(m, x_T):
    """Queries, keys (before rotation) and values (T, heads, K) of one sequence."""
    q, k, v = ((x_T @ p.weight.T).view(len(x_T), -1, m.head_width) for p in (m.q_proj, m.k_proj, m.v_proj))
    if m.q_norm is not None:
        q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * n.weight for y, n in ((q, m.q_norm), (k, m.k_norm)))
    return q, k, v


def turn(m, y, positions):
    """``y`` (n, ..., K): channels i and i + K/2 as one complex number, turned by ``position * base^(-2i/K)``."""
    if not m.rope:
        return y
    half = y.shape[-1] // 2
    angles = torch.as_tensor(positions).double()[:, None] * m.rope_base ** (-torch.arange(half).double() / half)
    angles = angles.view(len(y), *[1] * (y.dim() - 2), half)
    turned = torch.complex(y[..., :half], y[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def attention_map(m, q, k, seen):
    """The attention probabilities (H, T, T) under a mask."""
    q, k = (turn(m, y, range(len(y))) for y in (q, k))
    scores = torch.einsum("thk,shk->hts", q, k.repeat_interleave(m.heads // m.kv_heads, 1)) / m.head_width**0.5
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def gate_logits(m, q, k):
    """By chooser and row: {block: logit} over the blocks that are open to the row."""
    length, b = len(q), m.block
    blocks = -(-length // b)
    choosers = m.kv_heads if m.choice == "token" else m.heads
    table = []
    for n in range(choosers):
        pooled = []
        for j in range(blocks):
            some = k[j * b : (j + 1) * b, n // (choosers // m.kv_heads)]
            pooled.append(torch.cat([some.amax(0), some.amin(0), some.mean(0)]))
        kg = turn(m, torch.stack(pooled) @ m.gate_k[n], [j * b for j in range(blocks)])
        if m.choice == "token":
            group = m.heads // m.kv_heads
            qg, places, own = q[:, n * group : (n + 1) * group].flatten(1), range(length), [t // b for t in range(length)]
        else:
            qg = torch.stack([q[i * b : (i + 1) * b, n].mean(0) for i in range(blocks)])
            places, own = [i * b for i in range(blocks)], [i + 1 for i in range(blocks)]
        qg = turn(m, qg if m.gate_q is None else qg @ m.gate_q[n], places)
        logits = qg @ kg.T / m.gate_width**0.5
        table.append([{j: row[j] for j in range(end)} for row, end in zip(logits, own, strict=True)])
    return table


def chosen(m, row, r, blocks):
    """The blocks that row r reads."""
    own = r // m.block if m.choice == "token" else r
    if not row:
        return {own}
    largest = sorted(row, key=lambda j: -row[j])
    if m.budget is not None:
        read = set(largest[: max(1, m.budget // m.block)])
    elif m.ratio is not None and m.choice == "token":
        read = set(largest[: max(1, int(m.ratio * own))])
    elif m.ratio is not None:
        read = {own, *[j for j in largest if j != own][: max(1, int((1 - math.sqrt(1 - m.ratio)) * blocks)) - 1]}
    else:
        probs = torch.stack(list(row.values())).softmax(0)
        read = {j for j, p in zip(row, probs, strict=True) if p > m.threshold}
    if m.choice == "block" and r >= blocks - 2:
        return set(range(r + 1))
    return read | {own}


def reference(m, x):
    """Evaluation: softmax over the tokens of the blocks that are read."""
    outputs = []
    for x_T in x:
        q, k, v = parts(m, x_T)
        length, blocks = len(x_T), -(-len(x_T) // m.block)
        table = gate_logits(m, q, k)
        seen = torch.zeros(m.heads, length, length, dtype=torch.bool)
        for h in range(m.heads):
            for t in range(length):
                n, r = (h // (m.heads // m.kv_heads), t) if m.choice == "token" else (h, t // m.block)
                for j in chosen(m, table[n][r], r, blocks):
                    seen[h, t, j * m.block : min((j + 1) * m.block, t + 1)] = True
        heads = attention_map(m, q, k, seen) @ v.repeat_interleave(m.heads // m.kv_heads, 1).transpose(0, 1)
        outputs.append(heads.transpose(0, 1).flatten(1) @ m.o_proj.weight.T)
    return torch.stack(outputs)


def reference_loss(m, x):
    """The mean divergence over the rows that count."""
    total, count = 0, 0
    for x_T in x.detach():
        q, k, _ = (y.detach() for y in parts(m, x_T))
        length, blocks = len(x_T), -(-len(x_T) // m.block)
        probs = attention_map(m, q, k, torch.ones(length, length, dtype=torch.bool).tril())
        maps = torch.stack([probs[..., j * m.block : (j + 1) * m.block].amax(-1) for j in range(blocks)], -1)
        for n, rows in enumerate(gate_logits(m, q, k)):
            for r, row in enumerate(rows):
                if m.choice == "token":
                    group = m.heads // m.kv_heads
                    target = maps[n * group : (n + 1) * group, r].amax(0)
                else:
                    target = maps[n, r * m.block : (r + 1) * m.block].amax(0)
                if (r // m.block if m.choice == "token" else r) < blocks // 4 or not row:
                    continue
                target = target[list(row)] / target[list(row)].sum()
                total = total + (target * (target.log() - torch.stack(list(row.values())).log_softmax(0))).sum()
                count += 1
    return total / count


@pytest.mark.parametrize(
    ("form", "rule"),
    [
        (form, rule) for form in FORMS for rule in ({"threshold": 0.15}, {"ratio": 0.5}, {"ratio": 0.2}, {"budget": 9})
        if form["choice"] == "token" or "budget" not in rule  # A budget is for tokens.
    ],
    ids=str,
)
def test_evaluation_equals_the_equations_with_all_gradients(form, rule):
    m, x = layer(**form, **rule), inputs().requires_grad_()
    got, expected = m(x), reference(m, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    assert 0.2 < float(metrics(m)["kept"]) < 1
    leaves = [x, *(p for name, p in m.named_parameters() if "gate" not in name)]
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 16])
@pytest.mark.parametrize("choice", ["token", "block"])
def test_other_lengths(choice, length):
    m, x = layer(choice=choice, threshold=0.3), inputs(length)
    torch.testing.assert_close(m(x), reference(m, x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [22, 24, 9])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_training_is_dense_and_the_loss_is_the_gates_alone(monkeypatch, form, length):
    monkeypatch.setattr("gatework.mixers.seer_attention.MAPPED", 2 * BLOCK)
    m, x = layer(train=True, loss_weight=0.7, **form), inputs(length).requires_grad_()
    dense = Attention(D, HEADS, m.kv_heads, qk_norm=m.q_norm is not None, rope=m.rope).double()
    dense.load_state_dict({name: value for name, value in m.state_dict().items() if "gate" not in name})
    y = m(x)
    torch.testing.assert_close(y, dense(x), rtol=0, atol=1e-12)
    loss = losses(m)["gate"]
    expected = 0.7 * reference_loss(m, x)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    gate = [p for name, p in m.named_parameters() if "gate" in name]
    others = [x, *(p for name, p in m.named_parameters() if "gate" not in name)]
    ours, theirs = (torch.autograd.grad(value, gate, retain_graph=True) for value in (loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert all(g is None for g in torch.autograd.grad(loss, others, allow_unused=True))
    assert all(g is None for g in torch.autograd.grad(y.sum(), gate, allow_unused=True))


@pytest.mark.parametrize("choice", ["token", "block"])
def test_target_sums_to_1_on_the_triangle_and_the_gate_that_says_it_has_no_loss(monkeypatch, choice):
    m, x = layer(train=True, choice=choice), inputs(24)
    q, k = m._normed(m.query(x), None), m._normed(m.key(x), None)
    target = m._target(q, k, None)
    rows = torch.arange(target.shape[2])
    own = rows // BLOCK if choice == "token" else rows
    column = torch.arange(6)
    open_to = column < own[:, None] if choice == "token" else column <= own[:, None]
    assert (target[..., open_to] > 0).all()
    assert not target[..., ~open_to].any()
    torch.testing.assert_close(target.sum(-1)[..., open_to.any(1)], torch.ones(2, HEADS, int(open_to.any(1).sum())).double())
    monkeypatch.setattr(m, "_row_logits", lambda *_: (target.log().masked_fill(~open_to, float("-inf")).requires_grad_(), open_to))
    m(x)
    assert abs(float(losses(m)["gate"].detach())) < 1e-12


def test_the_gate_learns_its_attention():
    m, x = layer(train=True), inputs(32, 4)
    optimizer = torch.optim.Adam([m.gate_q, m.gate_k], lr=0.02)
    seen = []
    for _ in range(40):
        m(x)
        loss = losses(m)["gate"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.6 * seen[0]


@pytest.mark.parametrize("choice", ["token", "block"])
def test_a_threshold_below_0_and_a_ratio_of_1_are_dense_attention(choice):
    x = inputs()
    for rule in ({"threshold": -1.0}, {"ratio": 1.0}):
        m = layer(choice=choice, **rule)
        dense = m.train()(x)
        losses(m)
        assert torch.equal(m.eval()(x), dense)
        assert float(metrics(m)["kept"]) == 1


@pytest.mark.parametrize(("ratio", "blocks"), [(0.5, 12), (0.1, 12), (0.75, 7)])
def test_ratio_counts_of_the_block_form(monkeypatch, ratio, blocks):
    m = layer(choice="block", ratio=ratio)
    read = []

    def record(q, k, v, kept, block, seen):
        read.append(kept)
        return torch.zeros_like(q)

    monkeypatch.setattr("gatework.mixers.seer_attention.block_sparse_attention", record)
    m(inputs(blocks * BLOCK))
    most = max(1, int((1 - math.sqrt(1 - ratio)) * blocks))
    counts = read[0].sum(-1)
    assert (counts[..., : blocks - 2] == torch.arange(1, blocks - 1).clamp(max=most)).all()
    assert (counts[..., blocks - 2 :] == torch.tensor([blocks - 1, blocks])).all()
    assert read[0].diagonal(dim1=2, dim2=3).all()


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
@pytest.mark.parametrize("rule", [{"threshold": 0.15}, {"ratio": 0.5}, {"budget": 4}])
def test_decoding_reads_the_same_blocks(form, rule):
    m, x = layer(**form, **rule), inputs(23, 3)
    lengths = torch.tensor([23, 17, 9])
    mask = torch.arange(23) >= 23 - lengths[:, None]
    for settings in ({}, {"mask": mask}):
        whole = m(x, **settings)
        for pieces in ([23], [1] * 23, [9, 1, 1, 12], [16, 1, 1, 1, 1, 1, 1, 1]):
            state, outputs, start = m.init_state(3), [], 0
            with torch.no_grad():
                for size in pieces:
                    span = {name: value[:, start : start + size] for name, value in settings.items()}
                    outputs.append(m(x[:, start : start + size], state=state, **span))
                    start += size
            real = mask if settings else torch.ones_like(mask)
            torch.testing.assert_close(torch.cat(outputs, 1)[real], whole[real], rtol=0, atol=1e-11)


def test_a_state_filled_in_training_can_be_used_in_evaluation():
    m, x = layer(ratio=0.5), inputs(20)
    whole = m(x)[:, 16:]
    state = m.init_state(2)
    m.train()(x[:, :7], state=state)
    m(x[:, 7:16], state=state)
    assert losses(m) == {}
    torch.testing.assert_close(m.eval()(x[:, 16:], state=state), whole, rtol=0, atol=1e-11)
    assert state.nbytes == 2 * m.state_bytes(20)


def test_what_is_not_chosen_is_not_computed():
    x = inputs(96, 1)
    flops = {}
    for name, m in {"sparse": layer(choice="block", ratio=0.25), "dense": layer(choice="block", threshold=-1.0)}.items():
        with count_flops() as count, torch.no_grad():
            m(x)
        flops[name] = count.by_op["_scaled_dot_product_flash_attention_for_cpu"]
        share = float(metrics(m)["kept"])
        pairs = 24 * 25 // 2 * share * BLOCK**2 if name == "sparse" else 96 * 97 / 2
        assert flops[name] == round(4 * HEADS * pairs * m.head_width)
    m, state = layer(budget=4), layer().init_state(1)
    with torch.no_grad():
        m(x, state=state)
        with count_flops() as count:
            m(x[:, :1], state=state)
    # One chosen block and the own one, of 25.
    assert count.by_op["_scaled_dot_product_flash_attention_for_cpu"] == 4 * HEADS * 2 * BLOCK * m.head_width


def test_keep_leaves_out_blocks_without_a_kept_token():
    m, x = layer(choice="block", ratio=0.5), inputs(32, 1)
    keep = torch.zeros(1, 32, dtype=torch.bool)
    keep[:, 30] = True
    with count_flops() as some, torch.no_grad():
        y = m(x, keep=keep)
    with count_flops() as every, torch.no_grad():
        torch.testing.assert_close(y[:, 30], m(x)[:, 30], rtol=0, atol=1e-12)
    name = "_scaled_dot_product_flash_attention_for_cpu"
    assert some.by_op[name] == 4 * HEADS * BLOCK * 8 * BLOCK * m.head_width
    assert every.by_op[name] > 2 * some.by_op[name]


def test_the_block_form_is_neither_causal_nor_decodes():
    m, x = layer(choice="block", ratio=0.5), inputs(32)
    later = x.clone()
    later[:, 19] *= -5
    assert (m(later)[:, 16:19] - m(x)[:, 16:19]).detach().abs().max() > 1e-6
    assert not m.capabilities["causal"]
    with pytest.raises(ValueError, match="cannot decode"):
        m.init_state(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block": 0}, "block must be at least 1"), ({"gate_width": 3}, "gate_width positive"),
        ({"ratio": 0.0}, "ratio must be in"), ({"ratio": 0.5, "budget": 8}, "without a budget"), ({"budget": 0}, "budget must be"),
        ({"budget": 8, "choice": "block"}, "for choice='token'"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        SeerAttention(D, HEADS, **settings)
