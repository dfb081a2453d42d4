"""``DSelectK``: k soft selectors over binary codes of the experts, trained by gradients alone.

Hazimeh et al., DSelect-k: Differentiable Selection in the Mixture of Experts with Applications to Multi-Task Learning, 2021,
arXiv 2106.03760. With m = ceil(log2 E), the smooth step S (:func:`gatework.ops.smooth_step.smooth_step`), the binary code b_e of
expert e (most significant bit first) and selectors j = 1..k:

    z = A_z x + b_z, (k, m)    a = A_w x + b_w, (k)        (static: z = b_z, a = b_w)
    r_j(e) = prod_i [ S(z_ji) if b_e,i = 1 else 1 - S(z_ji) ]
    q_e = sum_j softmax(a)_j r_j(e)
    loss = entropy * mean_t sum_j,e -r log(r + 1e-6)  +  mean_t sum_j 1 / sum_{e < E} r_j(e), where E is no power of 2

A selector whose every z_ji is at least gamma / 2 away from 0 is one-hot, exactly: at most k experts are left, and z gets no
gradient any more.

Differences: the released code sums both losses over the batch, here they are means over the real tokens (with ``static`` the two
are the same); the denominator of the second is at least 1e-6.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.registry import register
from gatework.gates.base import mean_over, router_logits
from gatework.gates.smooth import SmoothGate, entropy
from gatework.ops.smooth_step import smooth_step

#: Inside the logarithm of the entropy, and the least denominator of the loss for unused codes.
EPS = 1e-6


@register("dselect_k", paper="dselect_k")
class DSelectK(SmoothGate):
    """Differentiable choice of at most k experts by binary codes.

    Starts dense and nearly uniform and becomes sparse as the selectors decide; the same function in training and evaluation. The
    weights of a token sum to 1, or to less where E is no power of 2 and a selector still gives some of its weight to codes
    without an expert. Two selectors may choose the same expert. A token all of whose selectors have chosen such codes for good is
    routed nowhere; the second loss keeps them from there.

    Args:
        d_model: width of the tokens.
        n_experts: E, at least 2.
        k: number of selectors, the most experts that are left at the end.
        gamma: width of the smooth step; a larger one keeps the selectors undecided for longer.
        entropy: weight of the entropy loss, which hurries the decision.
        static: one choice for all tokens, whatever they are, as the gate of one task among several.

    Initialisation: A_z and b_z uniform in +-gamma / 100, A_w and b_w in +-0.05.

    Side outputs: losses ``entropy`` and, where E is no power of 2, ``codes`` (training); metrics ``load``, ``max_violation``,
        ``dead``, ``entropy``, ``chosen`` (mean number of experts that a token uses).

    Raises:
        ValueError: fewer than 2 experts, k outside 1..E, gamma not positive, a negative entropy weight.
    """

    def __init__(
        self, d_model: int, n_experts: int, k: int = 2, gamma: float = 1.0, entropy: float = 1e-6, static: bool = False
    ) -> None:
        super().__init__(d_model, n_experts, k, gamma, entropy)
        self.static, self.bits = static, (n_experts - 1).bit_length()
        self.code_bias = nn.Parameter(torch.empty(k * self.bits))
        self.code_weight = None if static else nn.Parameter(torch.empty(k * self.bits, d_model))
        # The softmax over a single selector is 1.
        self.mix_bias = None if k == 1 else nn.Parameter(torch.empty(k))
        self.mix_weight = None if static or k == 1 else nn.Parameter(torch.empty(k, d_model))
        for name, parameter in self.named_parameters():
            bound = gamma / 100 if name.startswith("code") else 0.05
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        """The sizes and the settings of the selectors."""
        return f"{super().extra_repr()}, static={self.static}"

    def select(
        self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None
    ) -> tuple[Float[Tensor, "N k E"], dict[str, Tensor]]:
        """Each selector's weights, softmax(a)_j r_j(e), and the losses."""
        mask = None if self.static else mask
        z = self._logits(x, self.code_weight, self.code_bias).view(-1, self.selectors, self.bits)
        split = torch.stack([smooth_step(-z, self.gamma), smooth_step(z, self.gamma)], -1)
        reached = split[:, :, 0]
        for bit in range(1, self.bits):
            reached = (reached[..., None] * split[:, :, bit, None]).flatten(2)
        reached = reached[..., : self.n_experts]
        losses = {}
        if self.training:
            if self.entropy:
                losses["entropy"] = self.entropy * mean_over(entropy(reached, EPS), mask)
            if self.n_experts < 2**self.bits:
                losses["codes"] = mean_over(reached.sum(2).clamp(min=EPS).reciprocal().sum(1), mask)
        if self.mix_bias is not None:
            reached = self._logits(x, self.mix_weight, self.mix_bias).softmax(1)[..., None] * reached
        return reached.expand(x.shape[0], -1, -1), losses

    def _logits(self, x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        """One row per token; of a static gate one for all."""
        if weight is None:
            return bias.to(torch.promote_types(torch.promote_types(x.dtype, bias.dtype), torch.float32))[None]
        return router_logits(x, weight) + bias
