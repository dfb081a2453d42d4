"""``DivLinear``: a factored linear layer whose groups of components are mixed by a gate on an instruction.

DivControl: Knowledge Diversion for Controllable Image Generation, 2025, arXiv 2507.23620. The factorisation is that of ``kind``,
obtained from a trained weight by its singular value decomposition: the largest R_g components (learngenes) are always on, K groups
of R_t components (tailors) are mixed by the condition's embedding t (D_t):

    a = softmax(MLP(t) / tau)  (K; with top-k the k largest, renormalised)
    W(t) = U_0 diag(s_0) V_0^T + sum_k a_k U_k diag(s_k) V_k^T        y = W(t) x + b

There is no factor K: a uniform gate averages the groups. Features of the condition's branch are aligned with early features of the
frozen main branch by

    L_al = 1 - mean cos(P h_cond, stopgrad(h_early))        P linear

A new condition can be tried without training, by running the gate on its embedding, or gets a group and a row of the gate of its
own while all else is frozen (``DivLinear.extend``).

No code was published: the gate's MLP (one hidden SiLU layer as wide as t), the weight 0.5 of the loss and all ranks are ours. Watch
the metric ``entropy``: a gate that stays uniform makes one shared model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.experts.factored import FactoredLinear
from gatework.gates.base import top_k
from gatework.ops.precision import without_autocast


class ConditionGate(nn.Module):
    """Weights of K groups from an instruction: ``softmax(MLP(t) / tau)``, in float32 (float64 stays) whatever autocast says.

    Args:
        d_condition: width of the embeddings t.
        groups: K.
        k: keep the k largest weights and renormalise them (of equal ones the first); None keeps all. With k = 1 the weight is a
            constant 1, and the gate learns nothing.
        tau: temperature.

    Raises:
        ValueError: a size below 1, k outside 1..K, a temperature that is not positive.
    """

    def __init__(self, d_condition: int, groups: int, k: int | None = None, tau: float = 1.0) -> None:
        super().__init__()
        if min(d_condition, groups) < 1 or not tau > 0:
            raise ValueError(f"d_condition and groups must be at least 1 and tau positive, got {d_condition}, {groups}, {tau}")
        if k is not None and not 1 <= k <= groups:
            raise ValueError(f"k must be between 1 and the number of groups {groups}, got {k}")
        self.k, self.tau = k, tau
        self.hidden = nn.Linear(d_condition, d_condition)
        self.rows = nn.ModuleList([nn.Linear(d_condition, groups)])

    def extra_repr(self) -> str:
        """The settings."""
        return f"k={self.k}, tau={self.tau}"

    def forward(self, t: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """The groups' weights."""
        dtype = torch.promote_types(torch.promote_types(t.dtype, self.hidden.weight.dtype), torch.float32)
        with without_autocast(t.device):
            h = F.silu(_linear(self.hidden, t.to(dtype)))
            logits = torch.cat([_linear(row, h) for row in self.rows], -1) / self.tau
            if self.k is not None:
                kept = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top_k(logits, self.k), True)
                logits = logits.masked_fill(~kept, float("-inf"))
            return logits.softmax(-1)


def _linear(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


@register("divcontrol", paper="divcontrol")
class DivLinear(FactoredLinear):
    """A linear layer whose groups of components an instruction mixes.

    ``forward(x (B, ..., d_in), condition (B, d_condition)) -> (B, ..., d_out)``.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        d_condition: width of the instruction's embedding.
        groups: K.
        learngenes: R_g, components that are always on.
        tailors: R_t, components of each group.
        bias: whether there is a bias.
        k, tau: of the ``ConditionGate``.

    Initialisation: as ``kind``; the gate's layers are ``nn.Linear``'s. ``from_linear`` starts from a trained layer.

    Side outputs: metric ``entropy``, the mean entropy of the gate in nats, log K at most.

    Raises:
        ValueError: a size below 1, k outside 1..K, a temperature that is not positive.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_condition: int,
        groups: int = 4,
        learngenes: int = 8,
        tailors: int = 4,
        bias: bool = True,
        k: int | None = None,
        tau: float = 1.0,
    ) -> None:
        super().__init__(d_in, d_out, groups, learngenes, tailors, bias)
        self.d_condition = d_condition
        self.gate = ConditionGate(d_condition, groups, k, tau)

    def gates(self, condition: Float[Tensor, "*B D"]) -> Float[Tensor, "M K"]:
        """The groups' weights, which sum to 1; ``condition`` is (B, d_condition) or (d_condition)."""
        if condition.shape[-1:] != (self.d_condition,) or condition.dim() > 2:
            raise PartError(f"a condition is (samples, {self.d_condition}), not {tuple(condition.shape)}")
        found: Tensor = self.gate(condition.reshape(-1, self.d_condition))
        return found

    def forward(self, x: Float[Tensor, "B *T I"], condition: Float[Tensor, "B D"]) -> Float[Tensor, "B *T O"]:
        """Apply each sample's own weight.

        Raises:
            PartError: x or the condition of another width, another number of conditions than samples.
        """
        gates = self.gates(condition)
        if not in_backward():
            self.metrics = {"entropy": torch.special.entr(gates.detach()).sum(-1).mean()}
        return self._forward(x, gates)

    def extend(self, groups: int = 1, freeze: bool = True, noop: bool = True) -> DivLinear:
        """A layer with more groups, for a new condition: few-shot adaptation.

        Args:
            groups: how many.
            freeze: the new tailors and the gate's new rows alone are trained.
            noop: new tailors start with U = 0; else U is normal with standard deviation 0.02, as V is. s is 1. The gate's new rows
                start as ``nn.Linear``'s, so that the present groups give up a share at once.
        """
        made = self._extended(groups, keep=True, freeze=freeze, noop=noop)
        made.gate.rows.append(nn.Linear(self.d_condition, groups).to(self.gate.hidden.weight))
        return made


class AlignmentLoss(nn.Module):
    """``weight * (1 - mean cos(P h_cond, h_early))``: keeps the condition's features near the main branch's early ones.

    ``forward(h_cond (..., d_condition), h_early (..., d_early)) -> scalar``, 0 to 2 times ``weight``, 0 without any features. No
    gradient reaches ``h_early``.

    Args:
        d_condition: width of the features of the condition's branch.
        d_early: width of the main branch's.
        weight: factor of the loss.
    """

    def __init__(self, d_condition: int, d_early: int, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = weight
        self.projector = nn.Linear(d_condition, d_early)

    def extra_repr(self) -> str:
        """The settings."""
        return f"weight={self.weight}"

    def forward(self, h_cond: Float[Tensor, "*B C"], h_early: Float[Tensor, "*B E"]) -> Float[Tensor, ""]:
        """The loss.

        Raises:
            PartError: features of other widths, or not as many of the one as of the other.
        """
        wanted = (self.projector.in_features, self.projector.out_features)
        if (h_cond.shape[-1:], h_early.shape[-1:]) != ((wanted[0],), (wanted[1],)) or h_cond.shape[:-1] != h_early.shape[:-1]:
            given = f"{tuple(h_cond.shape)} and {tuple(h_early.shape)}"
            raise PartError(f"the features are (..., {wanted[0]}) and as many of (..., {wanted[1]}), not {given}")
        cosines = F.cosine_similarity(self.projector(h_cond), h_early.detach(), dim=-1)
        return self.weight * (1 - cosines).sum() / max(cosines.numel(), 1)


__all__ = ["AlignmentLoss", "ConditionGate", "DivLinear"]
