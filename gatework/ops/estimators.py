"""Gradient estimators: functions whose backward pass is chosen, because the true derivative is zero or does not exist.

The forward value of every ``straight-through`` function here is exactly the hard one, bit for bit. (The usual
expression ``hard + soft - soft.detach()`` is so only up to rounding: 1 + p - p can be 0.99999994.)

Randomness comes from ``generator``, or is given as ``noise``, which makes the function deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def straight_through(hard: Tensor, soft: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The value of ``hard`` with the gradient of ``soft`` (Bengio et al. 2013, arXiv 1308.3432).

    Args:
        hard: any dtype, the shape of ``soft``; it gets no gradient.
        soft: gets the whole gradient, unchanged.

    Returns:
        ``hard`` in the dtype of ``soft``.

    Raises:
        ValueError: if the shapes differ.
    """
    if hard.shape != soft.shape:
        raise ValueError(f"hard has shape {tuple(hard.shape)}, soft {tuple(soft.shape)}; they must be equal")
    out: Tensor = _StraightThrough.apply(hard, soft)
    return out


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(hard: Tensor, soft: Tensor) -> Tensor:
        return hard.to(soft.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def ste_round(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round to the nearest integer (halves to even); the gradient passes unchanged."""
    return straight_through(x.detach().round(), x)


def ste_sign(x: Float[Tensor, "*shape"], clip: float | None = 1.0) -> Float[Tensor, "*shape"]:
    """+1 for ``x >= 0``, else -1; the gradient passes where ``|x| <= clip`` and is 0 elsewhere.

    Args:
        x: any shape.
        clip: None passes the gradient everywhere; 1 is the estimator of binarized networks (Hubara et al. 2016,
            arXiv 1602.02830, equation 4).
    """
    hard = torch.where(x.detach() < 0, -1.0, 1.0)
    return straight_through(hard, x if clip is None else x.clamp(-clip, clip))


def ste_bernoulli(
    probs: Float[Tensor, "*shape"], noise: Float[Tensor, "*shape"] | None = None, generator: torch.Generator | None = None
) -> Float[Tensor, "*shape"]:
    """Sample 0 or 1 with P(1) = ``probs``; the gradient passes unchanged to ``probs``.

    It is unbiased for a function that is linear in each sample. 0 and 1 are certain: a probability of 0 never gives
    1, one of 1 always.

    Args:
        probs: probabilities of a 1.
        noise: uniform on [0, 1), compared with ``probs``; None draws it.
        generator: source of the noise.
    """
    if noise is None:
        noise = torch.rand(probs.shape, generator=generator, dtype=_wide(probs.dtype), device=probs.device)
    return straight_through(noise < probs.detach(), probs)


def gumbel_noise(like: Float[Tensor, "*shape"], generator: torch.Generator | None = None) -> Float[Tensor, "*shape"]:
    """Standard Gumbel noise ``-log(-log(u))``, always finite, of the shape of ``like``, in float32 (float64 stays)."""
    exponential = torch.empty(like.shape, dtype=_wide(like.dtype), device=like.device).exponential_(generator=generator)
    return -exponential.log()


def gumbel_softmax(
    logits: Float[Tensor, "*shape"],
    tau: float | Tensor = 1.0,
    hard: bool = False,
    dim: int = -1,
    noise: Float[Tensor, "*shape"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """A relaxed sample of a categorical variable, ``softmax((logits + g) / tau)`` (Jang et al. 2016, arXiv 1611.01144).

    The index of its maximum is distributed as ``softmax(logits)`` whatever the temperature. Computed in float32,
    float64 stays float64; the result has the dtype of ``logits``.

    Args:
        logits: unnormalised log-probabilities.
        tau: temperature, above 0.
        hard: return exactly the one-hot vector of the maximum (the first one of equal maxima), with the gradient of
            the relaxed sample.
        dim: axis of the categories.
        noise: Gumbel noise g; None draws it, zeros make the function deterministic.
        generator: source of the noise.
    """
    if noise is None:
        noise = gumbel_noise(logits, generator)
    scores = (logits.to(_wide(logits.dtype)) + noise) / tau
    soft = scores.softmax(dim)
    if hard:
        soft = straight_through(_one_hot(scores.detach(), dim), soft)
    return soft.to(logits.dtype)


def reinmax(
    logits: Float[Tensor, "*shape K"],
    tau: float = 1.0,
    noise: Float[Tensor, "*shape K"] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape K"]:
    """A one-hot sample of a categorical variable with a second-order gradient.

    Liu et al. 2023, arXiv 2304.08612, algorithm 2.

    With ``p0 = softmax(logits)`` and the sample D: ``p1 = (D + softmax(logits / tau)) / 2``, and the gradient is that
    of ``2 softmax(log(p1)) - p0 / 2``, where ``log(p1)`` is moved by the logits. At ``tau = 1`` its expectation is
    the true gradient for every quadratic function of the sample; the straight-through gradient has that for linear
    ones only.

    Args:
        logits: unnormalised log-probabilities of K categories.
        tau: temperature, at least 1 in the paper.
        noise: Gumbel noise that decides the sample; None draws it.
        generator: source of the noise.
    """
    if noise is None:
        noise = gumbel_noise(logits, generator)
    wide = logits.to(_wide(logits.dtype))
    sample = _one_hot(wide.detach() + noise, -1)
    middle = ((sample + (wide.detach() / tau).softmax(-1)) / 2).log()
    moved = (middle - wide.detach() + wide).softmax(-1)
    return straight_through(sample, 2 * moved - wide.softmax(-1) / 2).to(logits.dtype)


def _one_hot(scores: Tensor, dim: int) -> Tensor:
    return torch.zeros_like(scores).scatter_(dim, scores.argmax(dim, keepdim=True), 1.0)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = [
    "gumbel_noise", "gumbel_softmax", "reinmax", "ste_bernoulli", "ste_round", "ste_sign", "straight_through",
]
