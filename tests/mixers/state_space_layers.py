"""State-space layers from their equations in complex numbers, one token at a time, with dense matrices where the paper has them."""

from __future__ import annotations

import torch
from torch import Tensor

D = 6


def inputs(length: int, seed: int = 1) -> Tensor:
    return torch.randn(2, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rates(m) -> Tensor:
    return torch.complex(-m.log_decay.exp(), m.frequency)


def whole(x: Tensor) -> Tensor:
    """What a parameter holds, beside its conjugate."""
    half = torch.view_as_complex(x)
    return torch.cat([half, half.conj()], -1)


def channels(m, x: Tensor, matrix: Tensor, entering: Tensor, read: Tensor, bilinear: bool) -> Tensor:
    """One system per channel, x' = matrix x + entering u, y = Re(read x), and the layer's output stage.

    ``matrix`` is (D, S, S). Zero-order hold comes from the exponential of the matrix [[A, B], [0, 0]].
    """
    step, size = m.log_step.exp()[:, None, None], matrix.shape[-1]
    one = torch.eye(size, dtype=matrix.dtype)
    if bilinear:
        a = torch.linalg.solve(one - step / 2 * matrix, one + step / 2 * matrix)
        b = torch.linalg.solve(one - step / 2 * matrix, step * entering[..., None])[..., 0]
    else:
        block = torch.cat([torch.cat([matrix, entering[..., None]], -1), torch.zeros(D, 1, size + 1)], 1)
        both = torch.linalg.matrix_exp(step * block)
        a, b = both[:, :size, :size], both[:, :size, size]
    h = torch.zeros(len(x), D, size, dtype=matrix.dtype)
    rows = []
    for t in range(x.shape[1]):
        h = torch.einsum("dij,bdj->bdi", a, h) + b * x[:, t, :, None]
        o = (read * h).sum(-1).real + m.skip * x[:, t]
        g = o * (1 + torch.erf(o / 2**0.5)) / 2
        left, right = (g @ m.o_proj.weight.T + m.o_proj.bias).chunk(2, -1)
        rows.append(left / (1 + (-right).exp()))
    return torch.stack(rows, 1)


def shared(m, x: Tensor, copies: int) -> Tensor:
    """One diagonal system for all channels with a step per mode, and its output stage."""
    z, rate = rates(m)[:, 0] * m.log_step.exp(), rates(m)[:, 0]
    gain = (z.exp() - 1) / rate
    b, c = torch.view_as_complex(m.b), torch.view_as_complex(m.c)
    h = torch.zeros(len(x), len(z), dtype=z.dtype)
    rows = []
    for t in range(x.shape[1]):
        h = z.exp() * h + gain * (x[:, t].to(b.dtype) @ b.T)
        o = copies * (h @ c.T).real + m.skip * x[:, t]
        g = o * (1 + torch.erf(o / 2**0.5)) / 2
        rows.append(g / (1 + (-(g @ m.gate_proj.weight.T + m.gate_proj.bias)).exp()))
    return torch.stack(rows, 1)


def same_with_gradients(m, got: Tensor, expected: Tensor, x: Tensor) -> None:
    """Outputs, and the gradients of the inputs and all parameters."""
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x, *m.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
