"""Associative scans: all prefixes of an associative combination in logarithmic depth."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Elements = tuple[Tensor, ...]


def associative_scan(
    combine: Callable[[Elements, Elements], Elements], elements: Elements, dim: int = 1
) -> Elements:
    """All prefixes ``e_0, e_0 * e_1, e_0 * e_1 * e_2, ...`` of an associative ``*`` along one axis, by odd-even
    recursion.

    Pairs are combined, the half-long sequence is scanned, and the places between are filled with one more
    combination: O(T) combinations in O(log T) steps, each over a whole slice (Blelloch, Prefix Sums and Their
        Applications, 1990). Differentiable by what ``combine`` is made of.

    Args:
        combine: ``combine(earlier, later)``, associative (it need not commute), on tuples of tensors with any length
            along ``dim``.
        elements: tensors of equal length T along ``dim``.
        dim: the axis of the sequence, counted from the front.

    Raises:
        ValueError: if the lengths differ.
    """
    lengths = {tensor.shape[dim] for tensor in elements}
    if len(lengths) != 1:
        raise ValueError(f"all elements of a scan have one length along axis {dim}, got {sorted(lengths)}")
    length = lengths.pop()
    if length < 2:
        return elements

    def every_second(tensors: Elements, start: int, stop: int) -> Elements:
        return tuple(t.narrow(dim, start, stop - start)[(slice(None),) * dim + (slice(None, None, 2),)] for t in tensors)

    even_end = length - length % 2
    pairs = combine(every_second(elements, 0, even_end), every_second(elements, 1, even_end))
    odd = associative_scan(combine, pairs, dim)  # Prefixes that end at 1, 3, 5, ...
    later = every_second(elements, 2, length) if length > 2 else None
    even: Elements = tuple(t.narrow(dim, 0, 1) for t in elements)
    if later is not None and later[0].shape[dim]:
        before = tuple(t.narrow(dim, 0, later[0].shape[dim]) for t in odd)
        filled = combine(before, later)
        even = tuple(torch.cat([a, b], dim) for a, b in zip(even, filled, strict=True))
    return tuple(_interleave(a, b, dim, length) for a, b in zip(even, odd, strict=True))


def _interleave(even: Tensor, odd: Tensor, dim: int, length: int) -> Tensor:
    n_odd = odd.shape[dim]
    woven = torch.stack([even.narrow(dim, 0, n_odd), odd], dim + 1).flatten(dim, dim + 1)
    return woven if 2 * n_odd == length else torch.cat([woven, even.narrow(dim, n_odd, 1)], dim)


def linear_scan(
    decay: Float[Tensor, "B T *rest"], x: Float[Tensor, "B T *rest"], state: Float[Tensor, "B *rest"] | None = None
) -> Float[Tensor, "B T *rest"]:
    """The diagonal linear recurrence ``h_t = decay_t h_{t-1} + x_t`` along axis 1, all steps at once.

    Args:
        decay: factors.
        x: inputs.
        state: h before the first step; None is zero.
    """
    if state is not None and x.shape[1]:
        x = torch.cat([x[:, :1] + decay[:, :1] * state[:, None], x[:, 1:]], 1)

    def combine(earlier: Elements, later: Elements) -> Elements:
        return earlier[0] * later[0], torch.addcmul(later[1], later[0], earlier[1])

    return associative_scan(combine, (decay, x))[1]
