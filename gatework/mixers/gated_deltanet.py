"""``GatedDeltaNet``: the delta rule with a decay, so that a state can be replaced key by key and forgotten as a whole.

Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, 2024, arXiv 2412.06464, eq. 10. Per head, with q, k, v and
beta as in :mod:`gatework.mixers.deltanet`, K = expand_k d_model / heads and V = expand_v d_model / heads:

    la = -exp(A) softplus(x W_a + dt)        A, dt: one learned number per head
    S_t = e^{la_t} (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t        o_t = K^-1/2 q_t S_t
    y = concat_h(RMSNorm(o_h) * silu(x W_g)_h) W_o

The decay is applied before the key reads what it replaces. W_a, W_b and W_g have no bias, as in the maintained code (fla-org);
the authors' first release had one in W_b.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.registry import register
from gatework.mixers.deltanet import DeltaNet


@register("gated_deltanet", paper="gated_deltanet")
class GatedDeltaNet(DeltaNet):
    """Linear attention by the delta rule, with one decay per head and token.

    ``forward(x (B, T, d_model)) -> (B, T, d_model)``; time and memory are linear in T, decoding keeps ``heads * K * V`` numbers
    and the convolution's last inputs, whatever the length.

    Args:
        d_model: width of the stream.
        heads: H; keys are K = ``expand_k d_model / heads`` wide, values V = ``expand_v d_model / heads``.
        expand_k: total key width as a share of ``d_model``; the paper's 0.75 and 1.5 make V = 2 K and about 6 d_model^2 weights.
        expand_v: total value width as a share of ``d_model``.
        conv_width: tokens that the convolution of queries, keys and values sees.
        allow_neg_eigval: beta = 2 sigmoid(x W_b), so that a write can turn what its key reads into its opposite.
        chunk: chunk length of the parallel form, a power of two.

    Initialisation: exp(A) uniform in (0, 16); softplus(dt) log-uniform in [0.001, 0.1], so that at first a head forgets
        slowly; the rest as :class:`~gatework.mixers.deltanet.DeltaNet`. A and dt are meant to have no weight decay
        (``no_weight_decay`` names them).

    Padding: a padded token writes nothing and decays nothing, and the convolution does not see it. Packed documents start with an
        empty state and nothing to look back at.

    ``keep`` computes the output stage (norm, gate, projection) for the kept tokens only; queries are computed for all, since the
    convolution mixes neighbours, and the recurrence is run for all.

    Raises:
        ValueError: for widths that do not divide.
    """

    #: Parameters that an optimizer should leave out of its weight decay.
    no_weight_decay: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __init__(
        self,
        d_model: int,
        heads: int = 4,
        expand_k: float = 0.75,
        expand_v: float = 1.5,
        conv_width: int = 4,
        allow_neg_eigval: bool = False,
        chunk: int = 32,
    ) -> None:
        super().__init__(d_model, heads, expand_k, expand_v, conv_width, allow_neg_eigval, chunk)
        self.a_proj = nn.Linear(d_model, heads, bias=False)
        self.A_log = nn.Parameter((16 * (1 - torch.rand(heads))).log())
        step = torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step + (-torch.expm1(-step)).log())  # The inverse of softplus.
        self.g_proj = nn.Linear(d_model, self.value_width, bias=False)

    def log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H"]:
        """Logarithms of the decays, at most 0, in float32 or better."""
        step = self.a_proj(x)
        dtype = torch.promote_types(step.dtype, torch.float32)
        return -self.A_log.to(dtype).exp() * F.softplus(step.to(dtype) + self.dt_bias.to(dtype))

    def output(self, o: Float[Tensor, "*B H V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Norm, gate and output projection."""
        gate = F.silu(self.g_proj(x)).unflatten(-1, (self.heads, -1))
        out: Tensor = self.o_proj((self.norm(o.to(x.dtype)) * gate).flatten(-2))
        return out
