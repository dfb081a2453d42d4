"""The chunked state spaces against their recurrences in complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatework.ops import state_space as ops
from gatework.ops.state_space import (
    ComplexScan,
    DiagonalSystem,
    LowRankSystem,
    bilinear,
    cauchy_kernel,
    state_space,
    zero_order_hold,
)

B, G, N = 2, 3, 4
KINDS = ["diagonal", "scan", "low_rank"]


def leaves(kind: str, seed: int = 0) -> dict[str, Tensor]:
    """The parameters of a system, real and imaginary parts apart, as numbers whose gradients are compared."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    modes = 1 if kind == "scan" else N
    values = {"decay": draw(G, modes), "frequency": 3 * draw(G, modes), "log_step": draw(G, 1) - 2}
    names = {"diagonal": "w", "scan": "", "low_rank": "pbc"}[kind]
    values |= {f"{name}_{part}": draw(G, modes) for name in names for part in ("re", "im")}
    return {name: value.requires_grad_() for name, value in values.items()}


def built(kind: str, p: dict[str, Tensor]) -> ops.System:
    rate, step = (-p["decay"].exp(), p["frequency"]), p["log_step"].exp()
    if kind == "low_rank":
        return LowRankSystem.bilinear(rate, *((p[f"{name}_re"], p[f"{name}_im"]) for name in "pbc"), step)
    factor, _ = zero_order_hold(rate, step)
    return ComplexScan(factor) if kind == "scan" else DiagonalSystem(factor, (p["w_re"], p["w_im"]))


def reference(
    kind: str, p: dict[str, Tensor], u: Tensor, state: Tensor, real: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token at a time, in complex numbers, from the continuous system; u is (B, T, M G), the state (B, G, S)."""
    rate, step = torch.complex(-p["decay"].exp(), p["frequency"]), p["log_step"].exp()
    x = torch.complex(*state.chunk(2, -1))
    if kind == "low_rank":
        low_rank, entering, read = (
            torch.cat([torch.complex(p[f"{n}_re"], p[f"{n}_im"]), torch.complex(p[f"{n}_re"], -p[f"{n}_im"])], -1) for n in "pbc"
        )
        a = torch.cat([rate, rate.conj()], -1).diag_embed() - low_rank[..., None] * low_rank.conj()[..., None, :]
        one, half = torch.eye(2 * N, dtype=a.dtype), step[..., None] / 2 * a
        a_bar = torch.linalg.solve(one - half, one + half)
        b_bar = torch.linalg.solve(one - half, (step * entering)[..., None])[..., 0]
        x = torch.cat([x, x.conj()], -1)
    outputs = []
    for t in range(u.shape[1]):
        if segments is not None and t:
            x = torch.where((segments[:, t] == segments[:, t - 1])[:, None, None], x, 0)
        if kind == "low_rank":
            after = torch.einsum("gij,bgj->bgi", a_bar, x) + b_bar * u[:, t, :, None]
            outputs.append((read * after).sum(-1).real)
        elif kind == "diagonal":
            after = (rate * step).exp() * x + u[:, t, :, None]
            outputs.append((torch.complex(p["w_re"], p["w_im"]) * after).sum(-1).real)
        else:
            after = (rate * step).exp() * x + torch.complex(*u[:, t].chunk(2, -1))[..., None]
            outputs.append(torch.cat([after[..., 0].real, after[..., 0].imag], -1))
        x = after if real is None else torch.where(real[:, t, None, None], after, x)
    x = x[..., :N]
    return torch.stack(outputs, 1), torch.cat([x.real, x.imag], -1)


def inputs(kind: str, length: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    width, size = (2 * G, 2) if kind == "scan" else (G, 2 * N)
    u = torch.randn(B, length, width, dtype=torch.float64, generator=generator)
    return u.requires_grad_(), torch.randn(B, G, size, dtype=torch.float64, generator=generator).requires_grad_()


def agree(xs: list[Tensor], got: tuple[Tensor, ...], expected: tuple[Tensor, ...], atol: float = 1e-10) -> None:
    generator = torch.Generator().manual_seed(9)
    upstream = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)
    grads = (torch.autograd.grad(some, xs, upstream, materialize_grads=True) for some in (got, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=10 * atol)


@pytest.mark.parametrize("length", [1, 4, 5, 16, 37])
@pytest.mark.parametrize("chunk", [64, 8, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_recurrence_with_all_gradients(kind, chunk, length):
    p = leaves(kind)
    u, state = inputs(kind, length)
    got = state_space(built(kind, p), u, state=state, chunk=chunk)
    agree([u, state, *p.values()], got, reference(kind, p, u, state))


@pytest.mark.parametrize("counts", [(37, 20), (16, 0), (7, 8), (1, 33)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_that_after_the_last_real_token(kind, counts):
    p = leaves(kind)
    u, state = inputs(kind, 37)
    real = torch.arange(37) < torch.tensor(counts)[:, None]
    u = (u * real[..., None]).detach().requires_grad_()
    y, after = state_space(built(kind, p), u, state=state, real=real, chunk=8)
    wanted, wanted_after = reference(kind, p, u, state, real)
    agree([state, *p.values()], (y[real], after), (wanted[real], wanted_after))


@pytest.mark.parametrize("lengths", [[5, 1, 20, 11], [37], [1] * 37, [16, 16, 5]])
@pytest.mark.parametrize("chunk", [64, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_start_empty(kind, chunk, lengths):
    p = leaves(kind)
    u, state = inputs(kind, 37)
    one = torch.repeat_interleave(torch.tensor([3, 1] * 19)[: len(lengths)], torch.tensor(lengths))
    segments = torch.stack([one, torch.zeros_like(one)])
    y, after = state_space(built(kind, p), u, segments=segments, chunk=chunk)
    assert after is None
    agree([u, *p.values()], (y,), reference(kind, p, u, torch.zeros_like(state), segments=segments)[:1])


def test_packing_at_most_doubles_the_tokens(monkeypatch):
    """However short the documents are: the chunks are no longer than they are on average."""
    spread, chunked = [], ops._chunked

    def spy(system, u, *rest, **more):
        spread.append(u.shape[1])
        return chunked(system, u, *rest, **more)

    monkeypatch.setattr(ops, "_chunked", spy)
    system = built("diagonal", leaves("diagonal"))
    for size in (1, 3, 5, 17, 100):
        u, _ = inputs("diagonal", 200)
        state_space(system, u, segments=(torch.arange(200) // size).expand(B, -1))
    assert len(spread) == 5
    assert all(tokens <= 400 for tokens in spread), spread


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_state_it_starts_at_zero_and_returns_none(kind):
    system = built(kind, leaves(kind))
    for length in (3, 20):
        u, state = inputs(kind, length)
        y, after = state_space(system, u)
        assert after is None
        torch.testing.assert_close(y, state_space(system, u, state=torch.zeros_like(state))[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind):
    p = leaves(kind)
    u, state = inputs(kind, 11)

    def run(u: Tensor, state: Tensor, *values: Tensor):
        return state_space(built(kind, dict(zip(p, values, strict=True))), u, state=state, chunk=4)

    assert torch.autograd.gradcheck(run, (u, state, *p.values()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_inputs(kind):
    system = built(kind, leaves(kind))
    u, state = inputs(kind, 5)
    for some, start in ((u[:, :0], state), (u[:0], state[:0])):
        y, after = state_space(system, some, state=start)
        assert y.shape == some.shape
        torch.testing.assert_close(after, start)


@pytest.mark.parametrize("log_decay", [-60.0, 12.0])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_that_keep_all_or_nothing(kind, log_decay):
    p = leaves(kind)
    p["decay"] = torch.full_like(p["decay"], log_decay).requires_grad_()
    u, state = inputs(kind, 70)
    got = state_space(built(kind, p), u, state=state, chunk=16)
    grads = torch.autograd.grad(sum(x.sum() for x in got), list(p.values()), materialize_grads=True, retain_graph=True)
    agree([u, state], got, reference(kind, p, u, state), atol=1e-9)
    assert all(g.isfinite().all() for g in grads)


def test_half_precision_is_computed_in_the_systems_dtype():
    p = {name: x.detach().float() for name, x in leaves("diagonal").items()}
    system = built("diagonal", p)
    u = inputs("diagonal", 40)[0].detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = state_space(system, u)
    torch.testing.assert_close(y, state_space(system, u.float())[0], rtol=0, atol=0)


def test_what_is_kept_for_the_backward_pass_grows_with_the_length():
    p = leaves("diagonal")

    def kept(length: int) -> int:
        u, _ = inputs("diagonal", length)
        seen: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            state_space(built("diagonal", p), u, chunk=16)
        return sum(seen.values())

    assert kept(512) < kept(4096) < 8 * kept(512)


# -- discretisation


RATES = [(-0.5, 3.0), (-1.0, 0.0), (-1e-3, 1e-3), (-1e-9, 2e-9), (0.0, 0.0), (-300.0, 40.0)]


@pytest.mark.parametrize("rate", RATES)
def test_zero_order_hold(rate):
    """exp(z) and step (exp(z) - 1) / z with their derivatives, from the power series where z is small."""
    re, im, step = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (*rate, 0.7))
    z = torch.complex(re, im) * step
    gain = step * series(z) if abs(z) < 0.1 else step * (z.exp() - 1) / z
    (f_re, f_im), (g_re, g_im) = zero_order_hold((re, im), step)
    expected = z.exp().real, z.exp().imag, gain.real, gain.imag
    for ours, theirs in zip((f_re, f_im, g_re, g_im), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
        grads = (torch.autograd.grad(x, (re, im, step), retain_graph=True) for x in (ours, theirs))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def series(z: Tensor) -> Tensor:
    total = term = torch.ones_like(z)
    for k in range(2, 20):
        term = term * z / k
        total = total + term
    return total


def test_the_two_forms_of_the_gain_meet():
    """On both sides of the border between the polynomial and the quotient."""
    for size in (0.0099999, 0.0100001):
        angle = torch.linspace(0, 3.14, 7, dtype=torch.float64)
        re, im = -size * angle.sin(), size * angle.cos()
        _, gain = zero_order_hold((re, im), torch.ones((), dtype=torch.float64))
        wanted = series(torch.complex(re, im))
        torch.testing.assert_close(torch.complex(*gain), wanted, rtol=0, atol=2e-13)


def test_bilinear_is_the_trapezoidal_rule_and_maps_into_the_unit_disc():
    generator = torch.Generator().manual_seed(0)
    re = -torch.rand(500, dtype=torch.float64, generator=generator) * 100
    im = torch.randn(500, dtype=torch.float64, generator=generator) * 100
    step = torch.rand(500, dtype=torch.float64, generator=generator)
    factor, gain = bilinear((re, im), step)
    z = torch.complex(re, im) * step
    torch.testing.assert_close(torch.complex(*factor), (1 + z / 2) / (1 - z / 2), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.complex(*gain), step / (1 - z / 2), rtol=0, atol=1e-12)
    assert (torch.complex(*factor).abs() < 1).all()


# -- normal plus low rank


def test_a_low_rank_system_shortens_every_vector():
    """Whatever P is: the spectral norm of A is below 1."""
    for seed in range(5):
        p = leaves("low_rank", seed)
        p["p_re"] = 30 * p["p_re"]
        assert (torch.linalg.matrix_norm(built("low_rank", p).matrix(), 2) < 1).all()


@pytest.mark.parametrize("length", [1, 2, 3, 8, 21, 64])
def test_cauchy_kernel_equals_the_naive_one(length):
    """c A^j b for an even length too, where the textbook's form divides by 0; gradients included."""
    p = leaves("low_rank")
    xs = list(p.values())
    ours = cauchy_kernel(
        (-p["decay"].exp(), p["frequency"]), *((p[f"{n}_re"], p[f"{n}_im"]) for n in "pbc"), p["log_step"].exp(), length
    )
    impulse = torch.zeros(1, length, G, dtype=torch.float64)
    impulse[:, 0] = 1
    naive, _ = reference("low_rank", p, impulse, torch.zeros(1, G, 2 * N, dtype=torch.float64))
    agree(xs, (ours,), (naive[0].T,))


def test_convolution_with_the_cauchy_kernel_equals_the_recurrence():
    p = leaves("low_rank")
    u, _ = inputs("low_rank", 33)
    kernel = cauchy_kernel(
        (-p["decay"].exp(), p["frequency"]), *((p[f"{n}_re"], p[f"{n}_im"]) for n in "pbc"), p["log_step"].exp(), 33
    )
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=66) * torch.fft.rfft(kernel, n=66)
    y = torch.fft.irfft(spectrum, n=66)[..., :33].transpose(1, 2)
    torch.testing.assert_close(state_space(built("low_rank", p), u, chunk=8)[0], y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [3, 5])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chunk": 12}, "power of two, got 12"),
        ({"chunk": 0}, "power of two, got 0"),
        ({"segments": (B, 5), "state": (B, G, 2 * N)}, "segments or a state, not both"),
        ({"state": (1, G, 2 * N)}, r"the state is \(B, G, S\) = \(2, 3, 8\), not \(1, 3, 8\)"),
        ({"segments": (B, 2)}, r"segments is \(B, T\) = \(2, \d\), not \(2, 2\)"),
        ({"real": (B, 6)}, r"real is \(B, T\) = \(2, \d\), not \(2, 6\)"),
    ],
)
def test_wrong_calls(unchecked, length, given, message):
    kinds = {"segments": torch.long, "state": torch.float64, "real": torch.bool}
    given = {name: torch.ones(value, dtype=kinds[name]) if name in kinds else value for name, value in given.items()}
    u, _ = inputs("diagonal", length)
    with pytest.raises(ValueError, match=message):
        state_space(built("diagonal", leaves("diagonal")), u, **given)


@pytest.mark.parametrize(("kind", "wanted"), [("diagonal", G), ("low_rank", G), ("scan", 2 * G)])
def test_inputs_that_the_groups_do_not_take(kind, wanted):
    for width in (0, 1, 3 * G):
        with pytest.raises(ValueError, match=f"3 groups have {wanted} inputs per token, not {width}"):
            state_space(built(kind, leaves(kind)), torch.zeros(B, 5, width, dtype=torch.float64))


def test_a_kernel_of_no_length():
    x = torch.ones(G, N)
    with pytest.raises(ValueError, match="at least one entry, not 0"):
        cauchy_kernel((-x, x), (x, x), (x, x), (x, x), x[:, :1], 0)
