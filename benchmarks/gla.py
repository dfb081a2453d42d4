"""Gated linear attention: the chunked recurrence against single steps and against softmax attention, forward and backward; so
its two relatives, the two recurrences of gated slot attention (64 slots) and linear attention without decays.

B 2, H 4, K = V = 64, float32, 2 threads. Log-decays are those of a fresh layer, logsigmoid(normal) / 16.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor

from gatework.ops.linear_recurrence import gated_linear_recurrence

BATCH, HEADS, WIDTH = 2, 4, 64
LENGTH = 2048
LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]


def inputs(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k, v, logits = (torch.randn(BATCH, length, HEADS, WIDTH, generator=generator, dtype=dtype) for _ in range(4))
    return [x.requires_grad_() for x in (q, k, v, F.logsigmoid(logits) / 16)]


def stepped(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """The recurrence, one token at a time; views by unbind, so that no step's gradient is a full-size tensor."""
    state = q.new_zeros(BATCH, HEADS, WIDTH, WIDTH)
    outputs = []
    steps = zip((q * WIDTH**-0.5).unbind(1), k.unbind(1), v.unbind(1), log_decay.exp().unbind(1), strict=True)
    for q_t, k_t, v_t, decay in steps:
        state = decay[..., None] * state + k_t[..., None] * v_t[..., None, :]
        outputs.append((q_t[..., None, :] @ state)[..., 0, :])
    return torch.stack(outputs, 1)


def chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    return gated_linear_recurrence(q, k, v, log_decay)[0]


def slot_attention(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    write = -torch.expm1(log_decay)
    logits, _ = gated_linear_recurrence(q, k, write, log_decay, scale=1.0, axis="values")
    return gated_linear_recurrence(logits.softmax(-1), write, v, log_decay, scale=1.0)[0]


def stepped_slots(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    keys = values = q.new_zeros(BATCH, HEADS, WIDTH, WIDTH)
    outputs = []
    for q_t, k_t, v_t, decay in zip(*(x.unbind(1) for x in (q, k, v, log_decay.exp())), strict=True):
        keys = decay[..., None] * keys + (1 - decay)[..., None] * k_t[..., None, :]
        values = decay[..., None] * values + (1 - decay)[..., None] * v_t[..., None, :]
        outputs.append(((keys @ q_t[..., None]).transpose(-1, -2).softmax(-1) @ values)[..., 0, :])
    return torch.stack(outputs, 1)


def undecayed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return gated_linear_recurrence(q, k, v, None)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return heads.transpose(1, 2)


def both_ways(function: Callable[..., Tensor], xs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    upstream = torch.randn(xs[2].shape, generator=torch.Generator().manual_seed(1), dtype=xs[2].dtype)

    def run() -> tuple[Tensor, ...]:
        out = function(*xs)
        return out, *torch.autograd.grad(out, xs, upstream)

    return run


def check() -> None:
    """Outputs and gradients in float64 equal the recurrence's before any speed is printed."""
    xs = inputs(200, torch.float64)
    for fast, slow in ((chunked, stepped), (slot_attention, stepped_slots)):
        for ours, theirs in zip(both_ways(fast, xs)(), both_ways(slow, xs)(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    none = torch.zeros_like(xs[3])
    for ours, theirs in zip(both_ways(undecayed, xs[:3])(), both_ways(lambda *x: stepped(*x, none), xs[:3])(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    xs = inputs(LENGTH)
    for ours, theirs in zip(both_ways(chunked, xs)(), both_ways(stepped, xs)(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    print("correct: outputs and all gradients equal the recurrence's (float64 within 1e-10, float32 within 1e-3)")


def main() -> None:
    torch.set_num_threads(2)
    begin = time.perf_counter()
    check()

    xs = inputs(LENGTH)
    ours, theirs = interleaved(both_ways(chunked, xs), both_ways(stepped, xs), repeats=9, warmup=1)
    row(f"gla T={LENGTH}: chunked vs stepped", ours, theirs, "chunked", "stepped", ">= 10", theirs / ours >= 10)

    softmax = both_ways(attention, xs[:3])
    for name, ours in (("gsa", both_ways(slot_attention, xs)), ("linear_attention", both_ways(undecayed, xs[:3]))):
        ours, theirs = interleaved(ours, softmax, repeats=9, warmup=1)
        label = f"{name} T={LENGTH}: chunked vs causal softmax attention"
        row(label, ours, theirs, "chunked", "sdpa", ">= 1", theirs / ours >= 1)

    seconds, faster = {}, {}
    for length in LENGTHS:
        xs = inputs(length)
        chunks, softmax = both_ways(chunked, xs), both_ways(attention, xs[:3])
        repeats = max(2, min(9, 12 * 1024 // length))
        ours, theirs = interleaved(chunks, softmax, repeats=repeats, warmup=1)
        seconds[length], faster[length] = ours, theirs > ours
        row(f"gla T={length}: chunked vs causal softmax attention", ours, theirs, "chunked", "sdpa")

    crossover = next((t for t in LENGTHS if all(faster[s] for s in LENGTHS if s >= t)), None)
    print(f"faster than scaled_dot_product_attention, forward and backward, from T = {crossover}")
    for length in LENGTHS[LENGTHS.index(LENGTH) + 1 :]:
        growth = seconds[length] / seconds[LENGTH] / (length / LENGTH)
        verdict = "ok" if growth <= 1.3 else "NOT REACHED"
        print(f"time per token at T={length} over that at T={LENGTH}: {growth:.2f}  want <= 1.3  {verdict}")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
