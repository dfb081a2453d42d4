"""ParaGRU's and ParaLSTM's recurrences, parallel in time, against the same cells stepped with autograd, forward and backward.

B 2, T 4096, D 256 in 2 heads, float32, 2 threads. Both sides are given the inputs of the gates, drawn like those of a fresh layer,
and the weights: the initial ones (standard deviation 0.056), and ten times as large (as training may make them), where Newton's
method has to iterate. ``nn.GRU`` and ``nn.LSTM`` of that width, whose hidden weights are full, stand beside them; their own
projection of the input is in their times.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from _timing import interleaved, row
from torch import Tensor, nn

from gatework.mixers.paragru import GRUCell
from gatework.mixers.paralstm import LSTMCell
from gatework.ops.newton import Cell, newton_recurrence

BATCH, LENGTH, HEADS, WIDTH = 2, 4096, 2, 256


def inputs(cell: type[Cell], scale: float, length: int = LENGTH, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    shape = (HEADS, BATCH, length, cell.gates, WIDTH // HEADS)  # As the layer's projection, one product per head, leaves them.
    gates = 0.5 * torch.randn(shape, generator=generator, dtype=dtype).movedim(0, 3)
    gates[:, :, 0] -= torch.linspace(0, 1, WIDTH, dtype=dtype).view(HEADS, -1)
    weight = scale * torch.randn(cell.weights, HEADS, WIDTH // HEADS, generator=generator, dtype=dtype)
    return [gates.requires_grad_(), weight.requires_grad_()]


def stepped_gru(gates: Tensor, weight: Tensor) -> Tensor:
    h, outputs = torch.zeros_like(gates[:, 0, 0]), []
    a_z, a_r, a_c = weight
    for z, r, c in zip(*(gate.unbind(1) for gate in gates.unbind(2)), strict=True):
        z, r = torch.sigmoid(z + a_z * h), torch.sigmoid(r + a_r * h)
        h = torch.lerp(h, torch.tanh(c + a_c * h * r), z)
        outputs.append(h)
    return torch.stack(outputs, 1)


def stepped_lstm(gates: Tensor, weight: Tensor) -> Tensor:
    c, h, outputs = torch.zeros_like(gates[:, 0, 0]), torch.zeros_like(gates[:, 0, 0]), []
    a_f, a_g, a_o, p_f, p_o = weight
    for f, g, o in zip(*(gate.unbind(1) for gate in gates.unbind(2)), strict=True):
        c = torch.lerp(torch.tanh(g + a_g * h), c, torch.sigmoid(f + a_f * h + p_f * c))
        h = torch.sigmoid(o + a_o * h + p_o * c) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, 1)


STEPPED = {GRUCell: stepped_gru, LSTMCell: stepped_lstm}


def both_ways(function: Callable[..., Tensor], xs: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    with torch.no_grad():
        upstream = torch.randn_like(function(*xs))

    def run() -> tuple[Tensor, ...]:
        out = function(*xs)
        return out, *torch.autograd.grad(out, xs, upstream)

    return run


def parallel(cell: type[Cell]) -> Callable[..., Tensor]:
    return lambda gates, weight: newton_recurrence(cell, gates, weight)[0][-1]


def check(cell: type[Cell], scale: float) -> None:
    """Outputs and gradients equal those of the loop before any speed is printed."""
    for length, dtype, tolerance in ((500, torch.float64, 1e-10), (LENGTH, torch.float32, 1e-2)):
        xs, results = inputs(cell, scale, length, dtype), []
        for function in (parallel(cell), STEPPED[cell]):
            torch.manual_seed(0)
            results.append(both_ways(function, xs)())
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, theirs.abs().max().item()))


def main() -> None:
    torch.set_num_threads(2)
    begin = time.perf_counter()
    initial = 2 / (5 * WIDTH) ** 0.5
    for name, cell, peer in (("paragru", GRUCell, nn.GRU), ("paralstm", LSTMCell, nn.LSTM)):
        for scale in (initial, 10 * initial):
            check(cell, scale)
            xs = inputs(cell, scale)
            _, iterations, _ = newton_recurrence(cell, *xs)
            ours, theirs = interleaved(both_ways(parallel(cell), xs), both_ways(STEPPED[cell], xs), repeats=5, warmup=1)
            want = ">= 20" if scale == initial else ""
            what = f"{name} T={LENGTH}, weights {scale:.2f}, {int(iterations)} iterations"
            row(what, ours, theirs, "parallel", "stepped", want, theirs / ours >= 20 if want else None)
        network = peer(WIDTH, WIDTH, batch_first=True)
        x = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)
        xs = inputs(cell, initial)
        ours, theirs = interleaved(
            both_ways(parallel(cell), xs), both_ways(lambda x, n=network: n(x)[0], [x]), repeats=5, warmup=1
        )
        row(f"{name} T={LENGTH} vs nn.{peer.__name__}, full hidden weights", ours, theirs, "parallel", f"nn.{peer.__name__}")
    print("correct: outputs and all gradients equal the loop's (float64 within 1e-10, float32 within 1e-2 of the largest)")
    print(f"{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
