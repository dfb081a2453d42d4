"""``ActivationDTS``: a softmax gate with a trained temperature over an activation of the linear scores.

Nguyen, Akbarian and Ho, Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?, 2024, arXiv 2401.13875, section 3
(the activation dense-to-sparse gate); the plain softmax gate is that of Nguyen et al., 2023, arXiv 2305.03288:

    w(x) = softmax_e((act(b1_e . x) + b0_e) / tau)    act = sigmoid, tanh or GELU, tau > 0 trained

A small tau makes the gate nearly sparse, a large one nearly uniform. Without the activation (b1, b0, tau) and (c b1, c b0, c tau)
are the same gate for every c > 0, so that the Fisher information is singular and the estimates of the parameters converge more
slowly than any polynomial rate; a non-linear activation takes that interaction away.

With ``k`` (our combination with Nguyen et al., Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts, 2023,
arXiv 2309.13850) the k experts with the largest ``act(b1_e . x)`` (without b0) are chosen, and the softmax is taken over those. tau
is held as its logarithm, which keeps it positive. The papers have no balance loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import AffineRouter, check_tokens, router_logits

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu}


@register("activation_dts", paper="softmax_moe_theory")
class ActivationDTS(AffineRouter):
    """Softmax gate, dense or top-k, over activated scores with a temperature.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts per token; None for all of them.
        act: of the scores: ``tanh`` (whose slope at 0 is that of the plain gate), ``sigmoid`` or ``gelu`` (the exact one).
        balance: balance terms, a list of parts or one; None for none.

    Parameters: ``weight`` b1 (E, d_model), ``bias`` b0 (E), ``log_tau`` (a scalar).

    Initialisation: the weight is normal with standard deviation 0.02, the bias 0, tau 1 (ours).

    Side outputs: the losses of the balance terms by their names (training), metrics ``load``, ``max_violation``, ``dead``,
    ``entropy``.

    Raises:
        ValueError: k outside 1..E, k = 1 without a balance term (the weight would always be 1), an unknown
            activation, a balance term twice or one that needs noise.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int | None = None,
        act: Literal["tanh", "sigmoid", "gelu"] = "tanh",
        balance: list[Any] | Any = None,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance)
        if act not in _ACTS:
            raise ValueError(f"act must be 'tanh', 'sigmoid' or 'gelu', got {act!r}")
        self.act = act
        self.log_tau = nn.Parameter(torch.zeros(()))

    def extra_repr(self) -> str:
        """The sizes and the activation."""
        return f"{super().extra_repr()}, act={self.act}"

    @property
    def tau(self) -> Float[Tensor, ""]:
        """The temperature, in float32 (float64 stays)."""
        return self.log_tau.to(torch.promote_types(self.log_tau.dtype, torch.float32)).exp()

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""
        check_tokens(x, mask, self.d_model)
        scores = router_logits(x, self.weight)
        return self.route(_ACTS[self.act](scores), mask, self.tau)
