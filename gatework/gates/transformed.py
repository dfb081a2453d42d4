"""``Transformed``: a softmax gate over a bounded function of the token.

Nguyen et al., A General Theory for Softmax Gating Multinomial Logistic Mixture of Experts, 2023, arXiv 2310.14188, section 4 (the
modified gating function); the gate it modifies is that of Nguyen et al., 2023, arXiv 2305.03288:

    w(x) = softmax_e(b1_e . M(x) + b0_e)    M = tanh or sigmoid, elementwise

In a mixture of classifiers ``sum_e w_e(x) softmax_s(c_es + d_es . x)`` some of whose d vanish, the plain gate (M(x) = x) makes
the derivatives by the parameters of gate and experts linearly dependent, and maximum likelihood then converges more slowly than
any polynomial rate; the bounded M takes the dependence away.

With ``k`` it is the top-K gate of Nguyen et al., Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts, 2023,
arXiv 2309.13850: the k experts with the largest ``b1_e . M(x)`` (without b0) are chosen, and the softmax of
``b1_e . M(x) + b0_e`` is taken over those. The papers have no balance loss.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import AffineRouter, check_tokens, router_logits


@register("transformed", paper="softmax_moe_theory")
class Transformed(AffineRouter):
    """Softmax gate, dense or top-k, over tanh or sigmoid of the token.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        k: experts per token; None for all of them.
        transform: M, ``tanh`` or ``sigmoid`` of every channel.
        balance: balance terms, a list of parts or one; None for none.

    Parameters: ``weight`` b1 (E, d_model), ``bias`` b0 (E).

    Initialisation: the weight is normal with standard deviation 0.02, the bias 0 (ours).

    Side outputs: the losses of the balance terms by their names (training), metrics ``load``, ``max_violation``, ``dead``,
    ``entropy``.

    Raises:
        ValueError: k outside 1..E, k = 1 without a balance term (the weight would always be 1), an unknown
            transform, a balance term twice or one that needs noise.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int | None = None,
        transform: Literal["tanh", "sigmoid"] = "tanh",
        balance: list[Any] | Any = None,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance)
        if transform not in ("tanh", "sigmoid"):
            raise ValueError(f"transform must be 'tanh' or 'sigmoid', got {transform!r}")
        self.transform = transform

    def extra_repr(self) -> str:
        """The sizes and the transform."""
        return f"{super().extra_repr()}, transform={self.transform}"

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""
        check_tokens(x, mask, self.d_model)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        bounded = x.tanh() if self.transform == "tanh" else x.sigmoid()
        return self.route(router_logits(bounded, self.weight), mask)
