"""Fourier attention against the same formulas written out, forward and backward, in time and in what is kept between the two.

32 pictures of 64 tokens and 8 of 196, width 192, 3 heads, rank 12, 3 harmonics, float32, 2 threads. Written out, autograd keeps
every harmonic and the attention matrix is formed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.mixers import FourierKArAt

WIDTH = 192


def heads_of(x: Tensor, linear: nn.Linear, heads: int) -> Tensor:
    return linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)


def dense(m: FourierKArAt, x: Tensor) -> Tensor:
    q, k, v = (heads_of(x, linear, m.heads) for linear in (m.q_proj, m.k_proj, m.v_proj))
    scores = q @ k.transpose(-1, -2) * m.head_width**-0.5
    order = torch.arange(1, m.operator.cosine.shape[1] + 1, dtype=x.dtype)
    angles = scores[..., None] * order
    phi = torch.einsum("bhtjm,hmjp->bhtp", angles.cos(), m.operator.cosine)
    phi = phi + torch.einsum("bhtjm,hmjp->bhtp", angles.sin(), m.operator.sine)
    weights = phi @ m.operator.projection.transpose(-1, -2)
    return m.o_proj((weights @ v).transpose(1, 2).flatten(2))


def both_ways(function: Callable[[Tensor], Tensor], m: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)

    def run() -> tuple[Tensor, ...]:
        y = function(x)
        return y, *torch.autograd.grad(y, [x, *m.parameters()], upstream)

    return run


def compare(what: str, m: nn.Module, written: Callable[[Tensor], Tensor], x: Tensor, want: float) -> None:
    """Equal in float64, then timed in float32."""
    m.double()
    exact = x[:1].double().requires_grad_()
    for ours, theirs in zip(both_ways(m, m, exact)(), both_ways(written, m, exact)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    m.float()
    x = x.requires_grad_()
    ours, theirs = interleaved(both_ways(m, m, x), both_ways(written, m, x), repeats=9, warmup=2)
    row(what, ours, theirs, "ours", "written out", f">= {want}", theirs / ours >= want)


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that are saved for the backward pass."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(x)
    return sum(found.values())


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    for tokens, batch, want in ((64, 32, 1.1), (196, 8, 1.5)):
        m, x = FourierKArAt(WIDTH, tokens, heads=3), torch.randn(batch, tokens, WIDTH)
        compare(f"fourier_karat {tokens} tokens", m, lambda x, m=m: dense(m, x), x, want)
        ours, theirs = kept(m, x) / 2**20, kept(lambda x, m=m: dense(m, x), x) / 2**20
        verdict = "ok" if theirs >= 2 * ours else "NOT REACHED"
        print(f"kept for the backward pass: ours {ours:.1f} MiB, written out {theirs:.1f} MiB  want >= 2 times  {verdict}")


if __name__ == "__main__":
    main()
