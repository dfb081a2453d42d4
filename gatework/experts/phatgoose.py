"""``Phatgoose``: a frozen linear layer with many low-rank adapters, of which each token takes a few.

Muqeeth et al., Learning to Route Among Specialized Experts for Zero-Shot Generalization, 2024, arXiv 2402.05859 (code:
r-three/phatgoose). Adapters z = 1..E (LoRA: A_z, B_z) were trained apart from each other, and beside each of them, everything else
frozen, one vector v_z by the gate ``sigmoid(v_z . u)`` in front of its update. Without any further training, for a token u:

    a_z = LN(v_z) . LN(u) / sqrt(d_in)    w = softmax(a over its k largest)    y = W u + sum_{z kept} w_z B_z A_z u

LN has no gain and no bias (eps 1e-5), so a_z is sqrt(d_in) times the cosine between the centred v_z and the centred u. The sigmoid
is not used any more. :mod:`gatework.surgery` trains the vectors and puts this layer into pretrained models.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component, No, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import top_k
from gatework.ops.dispatch import run_experts, unstack
from gatework.ops.precision import without_autocast

#: Of both layer norms.
EPS = 1e-5


@register("phatgoose", paper="phatgoose")
class Phatgoose(Component):
    """Token-wise top-k routing over low-rank adapters of one linear layer.

    ``forward(u (..., d_in)) -> (..., d_out)``. Only the kept adapters' products run, sorted by adapter; of equal scores the lower
    index wins. Scores are computed in float32 (float64 stays) whatever the autocast dtype is. Stateless: decoding needs nothing.

    Args:
        base: the linear layer; it is called with the tokens as they come.
        a: (E, r, d_in) first factors. Adapters of lower rank are filled up with zeros.
        b: (E, d_out, r) second factors, with the adapters' scales in them.
        v: (E, d_in) the gate vectors. Their lengths do not matter, nor does a constant added to all entries; an adapter whose
            vector is 0 (untrained) scores 0 for every token.
        k: adapters per token.

    Initialisation: none of its own, all tensors are given (and copied).

    Side outputs: the metric ``load``, each adapter's share of the choices; nothing for a single token in evaluation.

    Raises:
        ValueError: factors and vectors that do not fit each other, k outside 1..E.
    """

    family = "experts"
    capabilities = Component.capabilities | {
        "compiles": No("tokens are sorted by adapter, and the lengths of the segments are data"),
    }

    def __init__(
        self, base: nn.Module, a: Float[Tensor, "E r I"], b: Float[Tensor, "E O r2"], v: Float[Tensor, "E2 I2"], k: int = 2
    ) -> None:
        super().__init__()
        if a.shape[:2] != (b.shape[0], b.shape[2]) or v.shape != (a.shape[0], a.shape[2]):
            given = f"{tuple(a.shape)}, {tuple(b.shape)} and {tuple(v.shape)}"
            raise ValueError(f"a, b and v must have the shapes (E, r, d_in), (E, d_out, r) and (E, d_in), got {given}")
        if not 1 <= k <= len(a):
            raise ValueError(f"k must be between 1 and the number of adapters {len(a)}, got {k}")
        self.base, self.k = base, k
        self.a, self.b, self.v = (nn.Parameter(tensor.detach().clone()) for tensor in (a, b, v))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"adapters={self.a.shape[0]}, rank={self.a.shape[1]}, k={self.k}"

    def route(self, u: Float[Tensor, "N I"]) -> Routing:
        """Who is chosen, with which weights."""
        dtype = torch.promote_types(torch.promote_types(u.dtype, self.v.dtype), torch.float32)
        width = u.shape[1:]
        with without_autocast(u.device):
            tokens, vectors = (F.layer_norm(x.to(dtype), width, eps=EPS) for x in (u, self.v))
            scores = F.linear(tokens, vectors) * width[0] ** -0.5
        chosen = top_k(scores, self.k)
        return Routing(scores.gather(1, chosen).softmax(1), chosen, len(self.v), scores)

    def forward(self, u: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The layer's output with each token's adapters.

        Raises:
            PartError: tokens of another width.
        """
        if u.shape[-1:] != self.v.shape[1:]:
            raise PartError(f"a token has width {self.v.shape[1]}, and u has the shape {tuple(u.shape)}")
        y: Tensor = self.base(u)
        tokens = u.reshape(-1, u.shape[-1])
        routing = self.route(tokens)
        if torch.is_autocast_enabled(u.device.type):
            dtype = torch.get_autocast_dtype(u.device.type)
        else:
            dtype = torch.promote_types(u.dtype, self.a.dtype)
        with without_autocast(u.device):
            factors = zip(unstack(self.a.to(dtype)), unstack(self.b.to(dtype)), strict=True)
            update = run_experts(tokens.to(dtype), routing, [partial(_low_rank, a, b) for a, b in factors], width=self.b.shape[1])
        if (self.training or len(tokens) > 1) and not in_backward():
            load = torch.bincount(routing.experts.flatten(), minlength=len(self.v)) / max(routing.experts.numel(), 1)
            self.metrics = {"load": load}
        return y + update.view(y.shape).to(y.dtype)


def _low_rank(a: Tensor, b: Tensor, rows: Tensor) -> Tensor:
    return F.linear(F.linear(rows, a), b)
