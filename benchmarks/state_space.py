"""State spaces beside the gated delta rule, and their chunks beside Fourier transforms, forward and backward.

B 2, width 256, float32, 2 threads. S4D and S4 have 64 state numbers per channel, S5 256 for all channels together; the delta rule
has H 4, K = V = 64.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor

from gatework.mixers import S4, S4D, S5
from gatework.mixers.state_space import StateSpaceMixer
from gatework.ops.delta_rule import gated_delta_rule
from gatework.ops.state_space import state_space

BATCH, WIDTH, HEADS = 2, 256, 4
LENGTH = 16384
LENGTHS = [2048, 16384]


def system(cls: type[StateSpaceMixer], dtype: torch.dtype = torch.float32, **settings: object) -> StateSpaceMixer:
    torch.manual_seed(0)
    return cls(WIDTH, **settings).to(dtype)  # type: ignore[arg-type]


def inputs(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, length, WIDTH, generator=torch.Generator().manual_seed(length), dtype=dtype).requires_grad_()


def chunked(m: StateSpaceMixer, x: Tensor) -> Tensor:
    return state_space(m.system(), m.inputs(x))[0]


def vandermonde(m: S4D, length: int) -> Tensor:
    """S4D's kernel of all tokens, a^(128 i + j) being a^(128 i) a^j: one product of matrices per channel."""
    block = 128
    bank = m.system()
    log = torch.complex(*bank.factor).log()
    weight = torch.complex(*bank.weight)
    near = (log[:, :, None] * torch.arange(block)).exp()
    far = (log[:, None] * block * torch.arange(-(-length // block))[:, None]).exp() * weight[:, None]
    return (torch.cat([far.real, -far.imag], -1) @ torch.cat([near.real, near.imag], 1)).flatten(1)[:, :length]


def by_fourier(kernel: Tensor, x: Tensor) -> Tensor:
    length = x.shape[1]
    spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)


def fourier(m: S4D, x: Tensor) -> Tensor:
    return by_fourier(vandermonde(m, x.shape[1]), x)


def cauchy(m: S4, x: Tensor) -> Tensor:
    return by_fourier(m.kernel(x.shape[1]), x)


def both_ways(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn(function().shape, generator=torch.Generator().manual_seed(1), dtype=leaves[0].dtype)

    def run() -> tuple[Tensor, ...]:
        y = function()
        return y, *torch.autograd.grad(y, leaves, upstream, allow_unused=True)

    return run


def of_system(function: Callable[..., Tensor], m: StateSpaceMixer, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    used = [p for name, p in m.named_parameters() if name in ("log_step", "log_decay", "frequency", "p", "b", "c")]
    return both_ways(lambda: function(m, x), [x, *used])


def delta(length: int) -> Callable[[], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(BATCH, length, HEADS, WIDTH // HEADS, generator=generator) for _ in range(3))
    beta, logits = (torch.randn(BATCH, length, HEADS, generator=generator) for _ in range(2))
    leaves = [x.requires_grad_() for x in (q, F.normalize(k, dim=-1), v, beta.sigmoid(), F.logsigmoid(logits) / 16)]
    return both_ways(lambda: gated_delta_rule(*leaves)[0], leaves)


def check() -> None:
    """Outputs and gradients in float64 equal those by the Fourier transform before any speed is printed."""
    x = inputs(300, torch.float64)
    for cls, theirs in ((S4D, fourier), (S4, cauchy)):
        m = system(cls, torch.float64)
        for a, b in zip(of_system(chunked, m, x)(), of_system(theirs, m, x)(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    print("correct: outputs and all gradients equal those by Fourier transforms of the whole kernels (float64 within 1e-9)")


def kept_bytes(m: StateSpaceMixer, x: Tensor) -> int:
    """Bytes kept for the backward pass."""
    seen: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        chunked(m, x)
    return sum(seen.values())


def main() -> None:
    torch.set_num_threads(2)
    begin = time.perf_counter()
    check()
    s4, s4d, s5 = system(S4), system(S4D), system(S5, d_state=256)
    mixers = {"s4d": s4d, "s5": s5, "s4": s4}
    x = inputs(LENGTH)
    *seconds, theirs = interleaved(*(of_system(chunked, m, x) for m in mixers.values()), delta(LENGTH), repeats=3, warmup=1)
    for name, ours in zip(mixers, seconds, strict=True):
        row(f"{name} T={LENGTH}: chunks vs gated delta rule", ours, theirs, name, "delta", ">= 1", theirs / ours >= 1)
    for length in LENGTHS:
        x = inputs(length)
        ours, theirs = interleaved(of_system(chunked, s4d, x), of_system(fourier, s4d, x), repeats=5, warmup=1)
        row(f"s4d T={length}: chunks vs Fourier transform", ours, theirs, "chunks", "fft")
    x = inputs(2048)
    ours, theirs = interleaved(of_system(chunked, s4, x), of_system(cauchy, s4, x), repeats=3, warmup=1)
    row("s4 T=2048: chunks vs Cauchy kernel and Fourier transform", ours, theirs, "chunks", "cauchy")
    for name, m in mixers.items():
        growth = kept_bytes(m, inputs(LENGTH)) / kept_bytes(m, inputs(LENGTH // 4)) / 4
        print(f"{name}: bytes kept per token at T={LENGTH} over those at T={LENGTH // 4}: {growth:.2f}  want <= 1.05  ", end="")
        print("ok" if growth <= 1.05 else "NOT REACHED")
    token = inputs(1).detach()
    for name, m in mixers.items():
        state = m.init_state(BATCH)
        with torch.no_grad():
            (seconds,) = interleaved(lambda m=m, state=state: m(token, state=state), repeats=50, warmup=5)
        print(f"{name}: one token of decoding {seconds * 1e3:.3f} ms")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
