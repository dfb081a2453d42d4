"""The chunked delta rule against its recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatework.ops.delta_rule import gated_delta_rule, unit

B, H, K, V = 2, 3, 5, 7


def inputs(length: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    """q, k of length 1, v, beta in (0, 2), log-decays, a state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    q, k, v = normal(B, length, H, K), F.normalize(normal(B, length, H, K), dim=-1), normal(B, length, H, V)
    beta, log_decay = 2 * torch.sigmoid(normal(B, length, H)), F.logsigmoid(normal(B, length, H) + 1)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, beta, log_decay, normal(B, H, K, V))]


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor | None = None,
    segments: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token at a time: decay, read what the key holds, replace a share beta of it, read by the query."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = v.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    outputs = []
    for t in range(q.shape[1]):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        if log_decay is not None:
            state = state * log_decay[:, t, :, None, None].exp()
        known = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t], k[:, t], v[:, t] - known)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


def same_with_gradients(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], leaves: list[Tensor], atol: float = 1e-10) -> None:
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in ours]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    for a, b in zip(*(torch.autograd.grad(x, leaves, upstream) for x in (ours, theirs)), strict=True):
        assert b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("chunk", [1, 2, 4, 8, 16, 64])
@pytest.mark.parametrize("length", [1, 3, 7, 8, 37, 65])
@pytest.mark.parametrize("decays", [True, False])
def test_equals_the_recurrence_with_all_gradients(length, chunk, decays):
    q, k, v, beta, log_decay, state = inputs(length)
    given = (q, k, v, beta, log_decay if decays else None)
    leaves = [x for x in (*given, state) if x is not None]
    same_with_gradients(gated_delta_rule(*given, state=state, chunk=chunk), recurrence(*given, state), leaves)


@pytest.mark.parametrize("decays", [True, False])
def test_packed_documents(decays):
    q, k, v, beta, log_decay, state = inputs(45)
    ids, lengths = torch.tensor([4, 9, 0, 1]), torch.tensor([[1, 15, 16, 13], [20, 3, 2, 20]])
    segments = torch.stack([ids.repeat_interleave(row) for row in lengths])
    given = (q, k, v, beta, log_decay if decays else None)
    leaves = [x for x in (*given, state) if x is not None]
    for chunk in (4, 16, 32):
        got = gated_delta_rule(*given, state=state, segments=segments, chunk=chunk)
        same_with_gradients(got, recurrence(*given, state, segments), leaves)


def test_a_sequence_of_many_stretches():
    """Longer than what is computed at once, with documents that cross the borders of what is."""
    *given, state = (x.detach() for x in inputs(600))
    leaves = [x.clone().requires_grad_() for x in (*(x[:, :, :1] for x in given), state[:, :1])]
    segments = (torch.arange(600)[None] + torch.tensor([[0], [50]])) // 200
    got = gated_delta_rule(*leaves[:5], state=leaves[5], segments=segments, chunk=16)
    same_with_gradients(got, recurrence(*leaves[:5], leaves[5], segments), leaves)


def test_gradcheck():
    *given, state = (x.detach()[:1] for x in inputs(7))
    leaves = [x.clone().requires_grad_() for x in (*(x[:, :, :2] for x in given), state[:, :2])]
    assert torch.autograd.gradcheck(lambda *xs: gated_delta_rule(*xs[:5], state=xs[5], chunk=4), leaves)


@pytest.mark.parametrize("decays", [True, False])
@pytest.mark.parametrize("pieces", [[1] * 12, [4, 3, 5], [9, 0, 3]])
def test_pieces_equal_whole(pieces, decays):
    *given, state = (x.detach() for x in inputs(12))
    if not decays:
        given[4] = None
    whole, after = gated_delta_rule(*given, state=state)
    outputs, start = [], 0
    for size in pieces:
        piece = [None if x is None else x[:, start : start + size] for x in given]
        out, state = gated_delta_rule(*piece, state=state)
        outputs.append(out)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-12)


def test_decays_of_1_are_the_rule_without_decay():
    q, k, v, beta, log_decay, state = inputs(37)
    gated = gated_delta_rule(q, k, v, beta, torch.zeros_like(log_decay), state=state)
    same_with_gradients(gated, gated_delta_rule(q, k, v, beta, state=state), [q, k, v, beta, state])


def test_the_scale():
    *given, state = inputs(9)
    same_with_gradients(gated_delta_rule(*given, state=state, scale=0.3), recurrence(*given, state, scale=0.3), [*given, state])
    short = [x.detach()[:, :3] for x in given]
    same = gated_delta_rule(*short, scale=0.3)[0], recurrence(*short, scale=0.3)[0]
    torch.testing.assert_close(*same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -1e4])
def test_extreme_decays_are_finite(value, dtype):
    q, k, v, beta, log_decay, state = inputs(40, dtype)
    log_decay = torch.full_like(log_decay, value).requires_grad_()
    log_decay.data[:, ::3] = -0.1
    leaves = [q, k, v, beta, log_decay, state]
    got, expected = (rule(*leaves[:5], state=state) for rule in (gated_delta_rule, recurrence))
    same_with_gradients(got, expected, leaves, atol=1e-10 if dtype == torch.float64 else 1e-4)


def test_complete_forgetting_leaves_the_present_token():
    q, k, v, beta, _, state = inputs(20)
    closed = torch.full_like(beta, -1e4).requires_grad_()
    out, _ = gated_delta_rule(q, k, v, beta, closed, state=state)
    alone = K**-0.5 * beta[..., None] * (q * k).sum(-1, keepdim=True) * v
    torch.testing.assert_close(out, alone, rtol=0, atol=1e-12)
    assert torch.autograd.grad(out.sum(), closed)[0].abs().max() < 1e-12


def test_without_writing_the_state_decays_only():
    q, k, v, beta, log_decay, state = inputs(21)
    zero = torch.zeros_like(beta, requires_grad=True)
    leaves = [q, k, v, zero, log_decay, state]
    got = gated_delta_rule(*leaves[:5], state=state, chunk=8)
    same_with_gradients(got, recurrence(*leaves[:5], state), leaves)
    torch.testing.assert_close(got[1], state * log_decay.sum(1)[..., None, None].exp(), rtol=0, atol=1e-12)


def test_a_key_reads_back_its_last_value():
    """beta 1, no decay, keys of length 1: the second write under a key replaces the first."""
    _, k, v, *_ = inputs(6)
    k = k[:, :1].expand(-1, 6, -1, -1)
    out, state = gated_delta_rule(k, k, v, torch.ones(B, 6, H, dtype=torch.float64), scale=1.0)
    torch.testing.assert_close(out, v, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.einsum("bhk,bhkv->bhv", k[:, 0], state), v[:, -1], rtol=0, atol=1e-12)


def test_orthonormal_keys_are_linear_attention():
    q, _, v, *_ = inputs(K)
    k = torch.linalg.qr(torch.randn(B, H, K, K, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0].transpose(1, 2)
    out, state = gated_delta_rule(q, k, v, torch.ones(B, K, H, dtype=torch.float64), chunk=2)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril() * K**-0.5
    torch.testing.assert_close(out, torch.einsum("bhts,bshv->bthv", scores, v), rtol=0, atol=1e-12)
    torch.testing.assert_close(state, torch.einsum("bshk,bshv->bhkv", k, v), rtol=0, atol=1e-12)


def test_eigenvalues_of_the_transition():
    """An identity as the state comes out as the product of the transitions, whose eigenvalues are e^la (1, .., 1, 1 - beta)."""
    _, k, _, _, log_decay, _ = (x.detach()[:, :1] for x in inputs(1))
    zero = torch.zeros(B, 1, H, K, dtype=torch.float64)
    eye = torch.eye(K, dtype=torch.float64).expand(B, H, K, K)
    for strength in (0.0, 0.5, 1.0, 1.7, 2.0):
        beta = torch.full((B, 1, H), strength, dtype=torch.float64)
        _, state = gated_delta_rule(k, k, zero, beta, log_decay, state=eye)
        values = torch.linalg.eigvalsh(state) / log_decay[:, 0, :, None].exp()
        expected = torch.tensor([1 - strength] + [1] * (K - 1), dtype=torch.float64)
        torch.testing.assert_close(values, expected.expand(B, H, K), rtol=0, atol=1e-12)


def test_the_worst_system_is_solved_as_well_as_by_substitution():
    """One key for all tokens and beta 2: the inverse's entries stay at 2 while the powers of the matrix grow to 1e30."""
    length = 64
    v = torch.randn(1, length, 1, 3, generator=torch.Generator().manual_seed(5))
    k = torch.ones(1, length, 1, 1)
    beta = torch.full((1, length, 1), 2.0)
    out, _ = gated_delta_rule(k, k, v, beta, chunk=64)
    expected, _ = recurrence(k.double(), k.double(), v.double(), beta.double(), None)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [2, 20])
def test_half_precision_is_computed_in_float32(length):
    given = [x.detach() for x in inputs(length, torch.bfloat16)]
    out, state = gated_delta_rule(*given[:5], state=given[5])
    expected = gated_delta_rule(*(x.float() for x in given[:5]), state=given[5].float())
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, expected[0].bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(state, expected[1], rtol=0, atol=0)


def test_nothing_to_do():
    q, k, v, beta, log_decay, state = (x.detach() for x in inputs(4))
    out, after = gated_delta_rule(*(x[:, :0] for x in (q, k, v, beta, log_decay)), state=state)
    assert out.shape == (B, 0, H, V)
    torch.testing.assert_close(after, state)
    leaves = [x[:0].requires_grad_() for x in (q, k, v, beta, log_decay)]
    out, after = gated_delta_rule(*leaves)
    assert (out.shape, after.shape) == ((0, 4, H, V), (0, H, K, V))
    assert all(g.shape == x.shape for g, x in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True))


@pytest.mark.parametrize("chunk", [0, 3, 48])
def test_chunks_are_powers_of_two(chunk):
    with pytest.raises(ValueError, match=f"chunk {chunk} must be a power of two"):
        gated_delta_rule(*(x.detach() for x in inputs(4)[:5]), chunk=chunk)


@pytest.mark.parametrize("length", [3, 9])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": (2, 9, 2, 3)}, r"queries \(2, {T}, 2, 3\), keys \(2, {T}, 2, 4\)"),
        ({"k": (2, 2, 2, 4)}, r"keys \(2, 2, 2, 4\)"),
        ({"q": (2, 9, 2, 0), "k": (2, 9, 2, 0)}, "with K >= 1"),
        ({"v": (2, 9, 1, 5)}, r"values \(2, {T}, 1, 5\)"),
        ({"beta": (2, 9, 1)}, r"and \(2, {T}, 1\), \(2, {T}, 2\)"),
        ({"log_decay": (1, 9, 2)}, r"and \(2, {T}, 2\), \(1, {T}, 2\)"),
        ({"state": (1, 2, 4, 5)}, r"the state is \(B, H, K, V\) = \(2, 2, 4, 5\), not \(1, 2, 4, 5\)"),
        ({"segments": (2, 2)}, r"segments are \(B, T\) = \(2, {T}\), not \(2, 2\)"),
    ],
)
def test_sizes_that_do_not_fit(unchecked, length, wrong, message):
    shapes = {"q": (2, 9, 2, 4), "k": (2, 9, 2, 4), "v": (2, 9, 2, 5), "beta": (2, 9, 2), "log_decay": (2, 9, 2)} | wrong
    given = {name: torch.zeros(shape) if name == "state" else torch.zeros(shape)[:, :length] for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=message.replace("{T}", str(length))):
        gated_delta_rule(**given)


def test_unit():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]], dtype=torch.float64, requires_grad=True)
    expected = torch.stack([row / (row[0] ** 2 + row[1] ** 2 + 1e-6) ** 0.5 for row in x])
    torch.testing.assert_close(unit(x), expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(unit, x)
    assert unit(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("length", [1, 63, 130])
def test_equals_the_forms_of_transformers(length):
    """Both forms of Qwen3-Next, in float32."""
    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    theirs = pytest.importorskip(name, reason="this transformers has no Qwen3-Next")
    q, k, v, beta, log_decay, state = leaves = [x.detach().float().requires_grad_() for x in inputs(length)]
    for rule in (theirs.torch_chunk_gated_delta_rule, theirs.torch_recurrent_gated_delta_rule):
        ours = gated_delta_rule(q, k, v, beta / 2, log_decay, state=state)
        expected = rule(q, k, v, log_decay, beta / 2, initial_state=state, output_final_state=True)
        same_with_gradients(ours, expected, leaves, atol=1e-5)


def test_equals_the_naive_form_of_fla():
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive", reason="flash-linear-attention is not installed")
    q, k, v, beta, log_decay, state = (x.detach() for x in inputs(40, torch.float32))
    ours = gated_delta_rule(q, k, v, beta, log_decay, state=state)
    theirs = naive.naive_recurrent_gated_delta_rule(q, k, v, beta, log_decay, initial_state=state, output_final_state=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
