"""``MultinomialMoE``: the softmax-gated mixture of multinomial logistic regressions, and its transformed gate.

Nguyen, Akbarian, Nguyen and Ho, A General Theory for Softmax Gating Multinomial Logistic Mixture of Experts, 2023,
arXiv 2310.14188 (the companion of 2305.03288, which has Gaussian experts):

    p(y = s | x) = sum_i softmax_i(b1_i . M(x) + b0_i) softmax_s(c_is + d_is . x)

M is the identity or, in the modified gate, a bounded function of each coordinate (tanh, sigmoid). Where d_i = 0 for some
expert of the truth and the number of experts is too large, the plain gate's parameters converge more slowly than any power of
n, because a change of b1 then looks like a change of d; the modified gate does not mix them up.

The logits of an expert are free up to a constant: the last class's c and d are held at 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.registry import register
from gatework.experts.voronoi import Atoms
from gatework.ops.lbfgs import minimize

_TRANSFORMS = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}


@register("multinomial_moe", paper="softmax_moe_theory")
class MultinomialMoE(Component):
    """A softmax-gated mixture of multinomial logistic regressions.

    ``forward(x (N, d_in), y (N,) integers) -> (N,)``: the log-probability of each y given its x. Like
    :class:`gatework.experts.GaussianMoE` a statistical model: :meth:`fit`, :meth:`sample`, :meth:`atoms`.

    Args:
        d_in: number of inputs.
        experts: E.
        classes: number of values of y.
        transform: M, what the gate sees of each input; None is the input itself.

    Parameters: ``gate_weight`` b1 (E, d_in), ``gate_bias`` b0 (E), ``slope`` d (E, classes - 1, d_in), ``intercept`` c
        (E, classes - 1).

    Initialisation: standard normal.

    Raises:
        ValueError: sizes that are too small, an unknown transform.
    """

    family = "experts"

    def __init__(self, d_in: int, experts: int, classes: int, transform: Literal["tanh", "sigmoid"] | None = None) -> None:
        super().__init__()
        if min(d_in, experts) < 1 or classes < 2:
            raise ValueError(f"d_in and experts must be at least 1 and classes 2, got {d_in}, {experts} and {classes}")
        if transform is not None and transform not in _TRANSFORMS:
            raise ValueError(f"transform must be 'tanh', 'sigmoid' or None, got {transform!r}")
        self.d_in, self.experts, self.classes, self.transform = d_in, experts, classes, transform
        self.gate_weight = nn.Parameter(torch.randn(experts, d_in))
        self.gate_bias = nn.Parameter(torch.randn(experts))
        self.slope = nn.Parameter(torch.randn(experts, classes - 1, d_in))
        self.intercept = nn.Parameter(torch.randn(experts, classes - 1))

    def extra_repr(self) -> str:
        """The sizes and the gate's transform."""
        return f"d_in={self.d_in}, experts={self.experts}, classes={self.classes}, transform={self.transform}"

    def log_probs(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N S"]:
        """The log-probabilities of all classes."""
        seen = x if self.transform is None else _TRANSFORMS[self.transform](x)
        log_gate = (seen @ self.gate_weight.t() + self.gate_bias).log_softmax(1)
        logits = torch.einsum("nd,esd->nes", x, self.slope) + self.intercept
        experts = nn.functional.pad(logits, (0, 1)).log_softmax(2)
        return (log_gate[:, :, None] + experts).logsumexp(1)

    def forward(self, x: Float[Tensor, "N d"], y: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
        """The log-probability of each y given its x."""
        return self.log_probs(x).gather(1, y[:, None])[:, 0]

    @torch.no_grad()
    def sample(self, x: Float[Tensor, "N d"], generator: torch.Generator | None = None) -> Int[Tensor, "N"]:
        """One y for each x."""
        return torch.multinomial(self.log_probs(x).exp(), 1, generator=generator)[:, 0]

    def fit(self, x: Float[Tensor, "N d"], y: Int[Tensor, "N"], iterations: int = 500) -> float:
        """Maximum-likelihood parameters, from where they are (L-BFGS; use float64); returns the mean log-likelihood."""
        return -minimize(lambda: -self(x, y).mean(), self.parameters(), iterations)

    @torch.no_grad()
    def atoms(self) -> Atoms:
        """The parameters as atoms."""
        values = {"gate": self.gate_weight.clone(), "slope": self.slope.flatten(1).clone(), "intercept": self.intercept.clone()}
        return Atoms(self.gate_bias.clone(), values, slow=())
