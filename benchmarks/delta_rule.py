"""The delta rule: our chunks against those of transformers and softmax attention; the short convolution against PyTorch's.

B 2, H 4, K = V = 64, float32, 2 threads, forward and backward. Keys have length 1, writing strengths are uniform in (0, 1), decays
such that half of a memory is left after about five tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor

from gatework.mixers.base import ShortConvolution
from gatework.ops.delta_rule import gated_delta_rule

BATCH, HEADS, WIDTH = 2, 4, 64
LENGTH = 2048
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]


def inputs(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v, beta, log-decays."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(BATCH, length, HEADS, WIDTH, generator=generator, dtype=dtype) for _ in range(3))
    beta = torch.rand(BATCH, length, HEADS, generator=generator, dtype=dtype)
    log_decay = F.logsigmoid(torch.randn(BATCH, length, HEADS, generator=generator, dtype=dtype) + 2)
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, log_decay)]


def stepped(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrence, one token at a time."""
    state = q.new_zeros(BATCH, HEADS, WIDTH, WIDTH)
    outputs = []
    for q_t, k_t, v_t, beta_t, decay in zip(*(x.unbind(1) for x in (q * WIDTH**-0.5, k, v, beta, log_decay.exp())), strict=True):
        state = decay[..., None, None] * state
        written = beta_t[..., None] * (v_t - (k_t[..., None, :] @ state)[..., 0, :])
        state = state + k_t[..., None] * written[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1)


def gated(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    return gated_delta_rule(q, k, v, beta, log_decay)[0]


def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return gated_delta_rule(q, k, v, beta)[0]


def of_transformers(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule(q, k, v, log_decay, beta)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return heads.transpose(1, 2)


def both_ways(function: Callable[..., Tensor], xs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    def run() -> tuple[Tensor, ...]:
        out = function(*xs)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        return out, *torch.autograd.grad(out, xs, upstream)

    return run


def check() -> None:
    """Outputs and gradients equal the recurrence's before any speed is printed."""
    for length, dtype, tolerance in ((200, torch.float64, 1e-10), (LENGTH, torch.float32, 1e-3)):
        xs = inputs(length, dtype)
        for ours, theirs in zip(both_ways(gated, xs)(), both_ways(stepped, xs)(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    print("correct: outputs and all gradients equal the recurrence's (float64 within 1e-10, float32 within 1e-3)")


def convolution() -> None:
    """Of the q, k and v of such a layer, three times 256 channels."""
    layer = ShortConvolution(3 * HEADS * WIDTH)
    channels, width = layer.weight.shape
    x = torch.randn(BATCH, LENGTH, channels, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def ours(x: Tensor, _: Tensor) -> Tensor:
        return layer(x)[0]

    def theirs(x: Tensor, weight: Tensor) -> Tensor:
        padded = F.pad(x.transpose(1, 2), (width - 1, 0))
        return F.silu(F.conv1d(padded, weight[:, None], groups=channels)).transpose(1, 2)

    sides = [both_ways(side, [x, layer.weight]) for side in (ours, theirs)]
    for a, b in zip(*(side() for side in sides), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    mine, other = interleaved(*sides, repeats=9)
    row(f"short convolution T={LENGTH}, {channels} channels", mine, other, "ours", "conv1d", ">= 1", other >= mine)


def main() -> None:
    torch.set_num_threads(2)
    begin = time.perf_counter()
    check()
    convolution()

    xs = inputs(LENGTH)
    ours, without, theirs = interleaved(
        both_ways(gated, xs), both_ways(plain, xs[:4]), both_ways(of_transformers, xs), repeats=9, warmup=1
    )
    row(f"gated delta rule T={LENGTH}: ours vs transformers'", ours, theirs, "ours", "transformers", ">= 2.5", theirs / ours >= 2.5)
    row(f"delta rule T={LENGTH}: without decay vs with", without, ours, "without", "with")

    seconds, faster = {}, {}
    for length in LENGTHS:
        xs = inputs(length)
        repeats = max(2, min(9, 12 * 1024 // length))
        ours, theirs = interleaved(both_ways(gated, xs), both_ways(attention, xs[:3]), repeats=repeats, warmup=1)
        seconds[length], faster[length] = ours, theirs > ours
        want, ok = (">= 1", theirs >= ours) if length >= LENGTH else ("", None)
        row(f"gated delta rule T={length} vs causal softmax attention", ours, theirs, "ours", "sdpa", want, ok)

    crossover = next((t for t in LENGTHS if all(faster[s] for s in LENGTHS if s >= t)), None)
    print(f"faster than scaled_dot_product_attention, forward and backward, from T = {crossover}")
    for length in LENGTHS[LENGTHS.index(LENGTH) + 1 :]:
        growth = seconds[length] / seconds[LENGTH] / (length / LENGTH)
        verdict = "ok" if growth <= 1.3 else "NOT REACHED"
        print(f"time per token at T={length} over that at T={LENGTH}: {growth:.2f}  want <= 1.3  {verdict}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
