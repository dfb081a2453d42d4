"""``GaussianMoE``: the softmax-gated mixture of Gaussian regressions whose estimation the theory papers study.

Nguyen, Nguyen and Ho, Demystifying Softmax Gating Function in Gaussian Mixture of Experts, 2023, arXiv 2305.03288
(the model, equation 1); Nguyen et al., Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts, 2023,
2309.13850 (top-K); Nguyen, Akbarian and Ho, Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?,
2024, 2401.13875 (temperature and activation gates):

    p(y | x) = sum_i pi_i(x) N(y; a_i . x + b_i, v_i)

    linear        pi = softmax_i(b1_i . x + b0_i)
    top-K         the K largest b1_i . x (without b0), softmax of b1_i . x + b0_i over those
    temperature   pi = softmax_i((b1_i . x + b0_i) / tau), tau trained
    activation    pi = softmax_i((act(b1_i . x) + b0_i) / tau), act = sigmoid, tanh or gelu

What the theory says of the maximum-likelihood estimate from n examples, logarithms left out: with the right number of
experts every parameter comes near at rate n^-1/2; with one expert too many the atoms that share a true one come near at
n^-1/8 (b1 and b) and n^-1/4 (a and v), while the density still converges at n^-1/2; with the linear temperature gate, where
(b1, b0, tau) and (c b1, c b0, c tau) say the same, no parameter of the gate has a polynomial rate, with the activation gate
they have. ``gatework claims softmax_moe_theory`` measures these rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.registry import register
from gatework.experts.voronoi import Atoms
from gatework.gates.base import top_k as largest
from gatework.ops.lbfgs import minimize

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": nn.functional.gelu}


@register("gaussian_moe", paper="softmax_moe_theory")
class GaussianMoE(Component):
    """A softmax-gated mixture of linear Gaussian regressions.

    ``forward(x (N, d_in), y (N,)) -> (N,)``: the log-density of each y given its x. It is a statistical model, not a layer:
    :meth:`fit` finds its maximum-likelihood parameters, :meth:`sample` draws from it, :meth:`atoms` hands its parameters to
    :func:`gatework.experts.voronoi.voronoi_loss`.

    Args:
        d_in: number of inputs.
        experts: E.
        top_k: K, how many experts a point keeps; None keeps all.
        activation: of the gate's scores before the bias; None leaves them linear.
        temperature: divide the gate's logits by a trained tau > 0 (held as its logarithm).

    Parameters: ``gate_weight`` b1 (E, d_in), ``gate_bias`` b0 (E), ``slope`` a (E, d_in), ``intercept`` b (E),
        ``log_variance`` log v (E), ``log_tau`` (only with a temperature).

    Initialisation: standard normal, variances and tau 1.

    Raises:
        ValueError: sizes below 1, top_k outside 1..E, an unknown activation.
    """

    family = "experts"

    def __init__(
        self,
        d_in: int,
        experts: int,
        top_k: int | None = None,
        activation: Literal["sigmoid", "tanh", "gelu"] | None = None,
        temperature: bool = False,
    ) -> None:
        super().__init__()
        if min(d_in, experts) < 1:
            raise ValueError(f"d_in and experts must be at least 1, got {d_in} and {experts}")
        if top_k is not None and not 1 <= top_k <= experts:
            raise ValueError(f"top_k must be between 1 and the number of experts {experts}, got {top_k}")
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be 'sigmoid', 'tanh', 'gelu' or None, got {activation!r}")
        self.d_in, self.experts, self.top_k, self.activation = d_in, experts, top_k, activation
        self.gate_weight = nn.Parameter(torch.randn(experts, d_in))
        self.gate_bias = nn.Parameter(torch.randn(experts))
        self.slope = nn.Parameter(torch.randn(experts, d_in))
        self.intercept = nn.Parameter(torch.randn(experts))
        self.log_variance = nn.Parameter(torch.zeros(experts))
        self.log_tau = nn.Parameter(torch.zeros(())) if temperature else None

    def extra_repr(self) -> str:
        """The sizes and the gate."""
        shown = f"d_in={self.d_in}, experts={self.experts}, top_k={self.top_k}, activation={self.activation}"
        return f"{shown}, temperature={self.log_tau is not None}"

    def log_gate(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N E"]:
        """``log pi_i(x)``; minus infinity for the experts that top-K leaves out."""
        scores = x @ self.gate_weight.t()
        if self.activation is not None:
            scores = _ACTIVATIONS[self.activation](scores)
        logits = scores + self.gate_bias
        if self.log_tau is not None:
            logits = logits / self.log_tau.exp()
        if self.top_k is not None:
            kept = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, largest(scores, self.top_k), True)
            logits = logits.masked_fill(~kept, -math.inf)
        return logits.log_softmax(1)

    def forward(self, x: Float[Tensor, "N d"], y: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The log-density of each y given its x."""
        means = x @ self.slope.t() + self.intercept
        residual = (y[:, None] - means).square() / self.log_variance.exp()
        log_normal = -0.5 * (residual + self.log_variance + math.log(2 * math.pi))
        return (self.log_gate(x) + log_normal).logsumexp(1)

    @torch.no_grad()
    def sample(self, x: Float[Tensor, "N d"], generator: torch.Generator | None = None) -> Float[Tensor, "N"]:
        """One y for each x."""
        chosen = torch.multinomial(self.log_gate(x).exp(), 1, generator=generator)
        mean = (x @ self.slope.t() + self.intercept).gather(1, chosen)[:, 0]
        noise = torch.randn(mean.shape, dtype=mean.dtype, generator=generator)
        return mean + (self.log_variance[chosen[:, 0]] / 2).exp() * noise

    def fit(self, x: Float[Tensor, "N d"], y: Float[Tensor, "N"], iterations: int = 500) -> float:
        """Maximum-likelihood parameters, from where they are (L-BFGS; use float64); returns the mean log-likelihood.

        With ``top_k`` the kept experts change where their scores cross, and the likelihood jumps there: the gradient takes the
        regions as they are.
        """
        return -minimize(lambda: -self(x, y).mean(), self.parameters(), iterations)

    @torch.no_grad()
    def atoms(self) -> Atoms:
        """The parameters as atoms; the temperature stands beside each expert's."""
        values = {
            "gate": self.gate_weight.clone(), "slope": self.slope.clone(), "intercept": self.intercept[:, None].clone(),
            "variance": self.log_variance.exp()[:, None],
        }  # fmt: skip
        if self.log_tau is not None:
            values["temperature"] = self.log_tau.exp().expand(self.experts, 1).clone()
        # Where an activation stands in the way, or a temperature, adding a constant to all gate weights is no gauge any more.
        return Atoms(self.gate_bias.clone(), values, slow=("gate", "intercept"), shifts=self.activation is None)
