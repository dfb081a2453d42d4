"""``Mixture``: a conditional density, a mixture of linear Gaussian experts behind any gate."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import build


class Mixture(nn.Module):
    """What the theory papers estimate, with any gate of the library: ``p(y | x) = sum_e g_e(x) N(y; a_e x + b_e, v_e)``.

    The gate's weights are divided by their sum (a density needs that), negative ones are refused.
    :class:`gatework.experts.GaussianMoE` is the same model with the gates of the papers and a maximum-likelihood fit.

    Args:
        inputs: width of an example.
        experts: E.
        gate: part expression of the gate over x.

    Initialisation: slopes and intercepts standard normal, variances 1; the gate as its part says.

    Raises:
        PartError: sizes below 1, a gate that needs more than the example.

    Example:
        >>> Mixture(inputs=2, experts=3)(torch.zeros(5, 2)).shape
        torch.Size([5, 3, 3])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("inputs",)

    def __init__(self, inputs: int, experts: int = 4, gate: Any = "activation_dts") -> None:
        super().__init__()
        if min(inputs, experts) < 1:
            raise PartError(f"inputs and experts must be at least 1, got {inputs} and {experts}")
        self.inputs = inputs
        self.gate = build(gate, "gate", d_model=inputs, n_experts=experts)
        if self.gate.conditions:
            needs = ", ".join(self.gate.conditions)
            raise PartError(f"{type(self.gate).__name__} chooses by {needs} too, which this model does not have")
        self.slope = nn.Parameter(torch.randn(experts, inputs))
        self.intercept = nn.Parameter(torch.randn(experts))
        self.log_variance = nn.Parameter(torch.zeros(experts))

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N 3 E"]:
        """Of each expert the logarithm of its weight (minus infinity for one that is not chosen), mean and log-variance."""
        if x.shape[1] != self.inputs:
            raise PartError(f"this model was built for {self.inputs} inputs, not {x.shape[1]}")
        weights = self.gate(x).dense()
        if (weights < 0).any():
            raise PartError(f"{type(self.gate).__name__} gives negative weights, which are no mixture")
        used = weights > 0
        log_weights = torch.where(used, weights, 1).log().masked_fill(~used, -math.inf).log_softmax(1)
        means = x @ self.slope.t() + self.intercept
        return torch.stack([log_weights, means, self.log_variance.expand_as(means)], 1)


def log_density(output: Float[Tensor, "N 3 E"], y: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """The log-density of each y under a mixture's output."""
    log_weights, means, log_variance = output.unbind(1)
    log_normal = -0.5 * ((y[:, None] - means).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))
    return (log_weights + log_normal).logsumexp(1)
