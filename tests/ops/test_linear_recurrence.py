"""The chunked gated linear recurrence against the recurrence itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gatework.ops import linear_recurrence
from gatework.ops.linear_recurrence import gated_linear_recurrence

B, H, K, V = 2, 3, 4, 5


def reference(q, k, v, log_decay, state, scale, axis="keys"):
    """The recurrence, one token at a time."""
    outputs = []
    for t in range(q.shape[1]):
        if log_decay is not None:
            factor = log_decay[:, t].exp()
            state = state * (factor[..., None] if axis == "keys" else factor[..., None, :])
        state = state + k[:, t][..., None] * v[:, t][..., None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1), state


def inputs(length: int, strength: float = 1.0, seed: int = 0, decays: int = K):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    q, k, v = draw(B, length, H, K), draw(B, length, H, K), draw(B, length, H, V)
    log_decay = -strength * torch.rand(B, length, H, decays, dtype=torch.float64, generator=generator)
    return [x.requires_grad_() for x in (q, k, v, log_decay, draw(B, H, K, V))]


def agree(xs, got, expected, atol):
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    for a, b in zip(torch.autograd.grad(got, xs, upstream), torch.autograd.grad(expected, xs, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


#: Where the decays are: the axis, and how many there are per head; None for no decay at all.
FORMS = [("keys", K), ("values", V), ("keys", 1), ("values", 1), ("keys", None)]


def of_form(decays: int | None, length: int, strength: float = 1.0):
    """Inputs, and those of them that have gradients."""
    xs = inputs(length, strength, decays=decays or 1)
    if decays is None:
        xs[3] = None
    return xs, [x for x in xs if x is not None]


@pytest.mark.parametrize("length", [1, 3, 17, 64, 130])
@pytest.mark.parametrize("chunk", [64, 16, 4])
@pytest.mark.parametrize(("axis", "decays"), FORMS)
def test_every_place_of_the_decays_with_all_gradients(axis, decays, chunk, length):
    xs, leaves = of_form(decays, length)
    got = gated_linear_recurrence(*xs[:4], state=xs[4], scale=0.7, axis=axis, chunk=chunk)
    agree(leaves, got, reference(*xs, 0.7, axis), 1e-10)


@pytest.mark.parametrize("strength", [0.0, 30.0, 1e4])
@pytest.mark.parametrize(("axis", "decays"), FORMS[:-1])
def test_extreme_decays_in_every_place(axis, decays, strength):
    xs, leaves = of_form(decays, 70, strength)
    agree(leaves, gated_linear_recurrence(*xs[:4], state=xs[4], scale=1.0, axis=axis), reference(*xs, 1.0, axis), 1e-9)


@pytest.mark.parametrize("stretch", [16, 1024])
@pytest.mark.parametrize(("axis", "decays"), FORMS)
def test_packed_documents_with_decays_in_every_place(monkeypatch, axis, decays, stretch):
    monkeypatch.setattr(linear_recurrence, "STRETCH", stretch)
    xs, leaves = of_form(decays, 45)
    edges = [0, 1, 17, 33, 45]
    segments = torch.cat([torch.full((B, b - a), i) for i, (a, b) in enumerate(pairwise(edges))], 1)
    got, got_state = gated_linear_recurrence(*xs[:4], state=xs[4], segments=segments, chunk=16, scale=1.0, axis=axis)
    state, parts = xs[4], []
    for a, b in pairwise(edges):
        parts.append(reference(*(None if x is None else x[:, a:b] for x in xs[:4]), state, 1.0, axis))
        state = torch.zeros_like(state)
    agree(leaves, (got, got_state), (torch.cat([o for o, _ in parts], 1), parts[-1][1]), 1e-10)


@pytest.mark.parametrize(("axis", "decays"), FORMS)
def test_steps_equal_chunks(axis, decays):
    xs, _ = of_form(decays, 9)
    with torch.no_grad():
        whole, end = gated_linear_recurrence(*xs[:4], state=xs[4], axis=axis)
        state, outputs = xs[4], []
        for t in range(9):
            out, state = gated_linear_recurrence(
                *(None if x is None else x[:, t : t + 1] for x in xs[:4]), state=state, axis=axis
            )
            outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, end, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("axis", "decays"), FORMS)
def test_gradcheck_in_every_place(axis, decays):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 1, 2), (1, 6, 1, 2), (1, 6, 1, 3), (1, 1, 2, 3)]
    xs = [torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]
    if decays is not None:
        width = {K: 2, V: 3, 1: 1}[decays]
        xs.append((-torch.rand(1, 6, 1, width, dtype=torch.float64, generator=generator)).requires_grad_())

    def run(q, k, v, state, decay=None):
        return gated_linear_recurrence(q, k, v, decay, state=state, axis=axis, chunk=4, sub_chunk=2)

    assert torch.autograd.gradcheck(run, xs)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 63, 64, 65, 130])
@pytest.mark.parametrize(("chunk", "sub_chunk"), [(64, 4), (64, 16), (16, 1), (16, 16), (4, 2), (1, 1)])
def test_chunked_equals_recurrence_with_all_gradients(length, chunk, sub_chunk):
    xs = inputs(length)
    got = gated_linear_recurrence(*xs[:4], state=xs[4], scale=0.7, chunk=chunk, sub_chunk=sub_chunk)
    agree(xs, got, reference(*xs, 0.7), 1e-10)


@pytest.mark.parametrize("stretch", [1, 16, 48])
@pytest.mark.parametrize("length", [16, 49, 130])
def test_stretches_of_chunks_hand_the_state_on(monkeypatch, length, stretch):
    monkeypatch.setattr(linear_recurrence, "STRETCH", stretch)
    xs = inputs(length)
    got = gated_linear_recurrence(*xs[:4], state=xs[4], scale=0.7, chunk=16)
    agree(xs, got, reference(*xs, 0.7), 1e-10)


@pytest.mark.parametrize("strength", [0.0, 30.0, 1e4])
def test_extreme_decays_are_exact_and_finite(strength):
    xs = inputs(70, strength)
    agree(xs, gated_linear_recurrence(*xs[:4], state=xs[4], scale=1.0), reference(*xs, 1.0), 1e-9)


def test_no_decay_is_causal_linear_attention():
    q, k, v, _, _ = inputs(40)
    out, _ = gated_linear_recurrence(q, k, v, torch.zeros_like(k), scale=1.0)
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    torch.testing.assert_close(out, torch.einsum("bhts,bshv->bthv", scores, v), rtol=0, atol=1e-11)


def test_full_decay_sees_the_present_token_alone():
    q, k, v, decay, _ = inputs(40)
    out, _ = gated_linear_recurrence(q, k, v, torch.full_like(decay, -1e4), scale=1.0)
    torch.testing.assert_close(out, (q * k).sum(-1, keepdim=True) * v, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 3, 16, 40])
def test_the_state_hands_over(cut):
    xs = [x.detach() for x in inputs(50)]
    whole, end = gated_linear_recurrence(*xs[:4], chunk=16)
    first, state = gated_linear_recurrence(*(x[:, :cut] for x in xs[:4]), chunk=16)
    second, last = gated_linear_recurrence(*(x[:, cut:] for x in xs[:4]), state=state, chunk=16)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(last, end, rtol=0, atol=1e-11)


@pytest.mark.parametrize("stretch", [16, 1024])
@pytest.mark.parametrize("cuts", [[5], [16], [1, 17, 33], [20, 21, 22]])
def test_packed_documents_equal_separate_ones_with_gradients(monkeypatch, cuts, stretch):
    monkeypatch.setattr(linear_recurrence, "STRETCH", stretch)
    xs = inputs(45, 2.0)
    edges = [0, *cuts, 45]
    segments = torch.cat([torch.full((B, b - a), i) for i, (a, b) in enumerate(pairwise(edges))], 1)
    got, got_state = gated_linear_recurrence(*xs[:4], segments=segments, chunk=16, scale=1.0)
    zero = torch.zeros(B, H, K, V, dtype=torch.float64)
    parts = [reference(*(x[:, a:b] for x in xs[:4]), zero, 1.0) for a, b in pairwise(edges)]
    agree(xs[:4], (got, got_state), (torch.cat([o for o, _ in parts], 1), parts[-1][1]), 1e-10)


def test_one_decay_per_head_is_broadcast():
    q, k, v, decay, _ = inputs(20)
    one = decay[..., :1].detach().requires_grad_()
    got, _ = gated_linear_recurrence(q, k, v, one, scale=1.0)
    expected, _ = gated_linear_recurrence(q, k, v, one.expand_as(k), scale=1.0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    got.sum().backward()
    assert one.grad.shape == one.shape


def test_decays_of_another_width_are_refused():
    q, k, v, decay, _ = inputs(5)
    with pytest.raises(ValueError, match="one per channel of the values, not 4"):
        gated_linear_recurrence(q, k, v, decay, axis="values")


@pytest.mark.parametrize("decay", [(2, 9, 1, 4), (1, 9, 3, 4), (2, 8, 3, 1)])
def test_decays_of_other_tokens_or_heads_are_refused(unchecked, decay):
    q, k, v, _, _ = inputs(9)
    with pytest.raises(ValueError, match="all other inputs begin with the same B, T and H"):
        gated_linear_recurrence(q, k, v, torch.zeros(decay))


def test_linear_in_v():
    q, k, v, decay, _ = inputs(20)
    single = gated_linear_recurrence(q, k, v, decay)[0]
    torch.testing.assert_close(gated_linear_recurrence(q, k, 3 * v, decay)[0], 3 * single, rtol=0, atol=1e-11)


def test_gradcheck():
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 1, 2), (1, 6, 1, 2), (1, 6, 1, 3), (1, 6, 1, 2), (1, 1, 2, 3)]
    q, k, v, decay, state = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    xs = [x.requires_grad_() for x in (q, k, v, -decay.abs(), state)]
    assert torch.autograd.gradcheck(lambda *x: gated_linear_recurrence(*x[:4], state=x[4], chunk=4, sub_chunk=2), xs)


class Written(TorchDispatchMode):
    """Counts the elements that operations return."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize(("axis", "decays"), FORMS)
def test_work_is_linear_in_time_backwards_too(monkeypatch, axis, decays):
    monkeypatch.setattr(linear_recurrence, "STRETCH", 16)
    written = []
    for length in (64, 512):
        xs, leaves = of_form(decays, length)
        with Written() as count:
            out, _ = gated_linear_recurrence(*xs[:4], state=xs[4], axis=axis, chunk=16)
            torch.autograd.grad(out.sum(), leaves)
        written.append(count.elements / length)
    assert written[1] < 1.05 * written[0]


@pytest.mark.parametrize(("axis", "decays"), FORMS[:-1])
def test_what_follows_a_token_that_forgets_everything_is_as_exact_in_float32(axis, decays):
    xs, _ = of_form(decays, 70)
    xs[3] = -xs[3].detach().abs() / 16
    xs[3][:, ::7] = -1e5
    with torch.no_grad():
        exact, _ = gated_linear_recurrence(*xs[:4], scale=1.0, axis=axis)
        rounded, _ = gated_linear_recurrence(*(x.float() for x in xs[:4]), scale=1.0, axis=axis)
    torch.testing.assert_close(rounded.double(), exact, rtol=0, atol=2e-4 * float(exact.abs().max()))


def test_half_precision_accumulates_in_float32():
    xs = [x.detach() for x in inputs(64)]
    out, state = gated_linear_recurrence(*(x.bfloat16() for x in xs[:4]))
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    rounded = [x.bfloat16().double() for x in xs[:4]]
    expected, _ = reference(*rounded, torch.zeros_like(xs[4]), K**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_no_tokens():
    xs = [x.detach()[:, :0] for x in inputs(3)[:4]]
    out, state = gated_linear_recurrence(*xs)
    assert out.shape == (B, 0, H, V)
    assert not state.any()


def test_chunks_that_do_not_halve_are_refused():
    xs = inputs(3)
    with pytest.raises(ValueError, match="powers of two"):
        gated_linear_recurrence(*xs[:4], chunk=48)
