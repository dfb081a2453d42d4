"""What gates share: the choice of the top k, statistics over real tokens, balance losses and the monitoring of a
routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Gate
from gatework.core.routing import Routing
from gatework.ops.precision import without_autocast

#: Added to the squared mean in the squared coefficient of variation.
CV_EPS = 1e-10


def top_k(scores: Float[Tensor, "N E"], k: int) -> Int[Tensor, "N k"]:
    """The k highest scores of each row, highest first; of equal scores the lower index comes first, on every device."""
    if k <= 4:
        left = scores.detach()
        chosen = [left.argmax(1, keepdim=True)]
        for _ in range(k - 1):
            left = left.scatter(1, chosen[-1], float("-inf"))
            chosen.append(left.argmax(1, keepdim=True))
        return torch.cat(chosen, 1)
    return scores.detach().argsort(dim=1, descending=True, stable=True)[:, :k]


def router_logits(x: Float[Tensor, "N D"], weight: Float[Tensor, "E D"]) -> Float[Tensor, "N E"]:
    """``x weight^T`` in float32 (float64 stays), whatever the autocast dtype is."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with without_autocast(x.device):
        return F.linear(x.to(dtype), weight.to(dtype))


def cv_squared(values: Float[Tensor, "E"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation with the population variance: 0 where all values are equal."""
    return values.var(correction=0) / (values.mean().square() + CV_EPS)


def counts(experts: Int[Tensor, "N k"], n_experts: int, mask: Bool[Tensor, "N"] | None) -> Int[Tensor, "E"]:
    """How many (real) tokens chose each expert."""
    weights = torch.ones_like(experts) if mask is None else mask.long()[:, None].expand_as(experts)
    zeros = torch.zeros(n_experts, dtype=torch.long, device=experts.device)
    return zeros.scatter_add(0, experts.flatten(), weights.flatten())


def mean_over(values: Float[Tensor, "N *rest"], mask: Bool[Tensor, "N"] | None) -> Float[Tensor, "*rest"]:
    """Mean over the real tokens; 0 without any."""
    if mask is None:
        return values.sum(0) / max(values.shape[0], 1)
    weights = mask.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return (values * weights).sum(0) / mask.sum().clamp(min=1)


def switch_loss(
    probs: Float[Tensor, "N E"], experts: Int[Tensor, "N k"], mask: Bool[Tensor, "N"] | None
) -> Float[Tensor, ""]:
    """``E sum_e f_e P_e``: f_e the share of the choices that fell on e (no gradient), P_e the mean probability; 1
    when uniform.

    Fedus et al., Switch Transformers, 2021, arXiv 2101.03961, equations 4 to 6, with f_e divided by k as well.
    """
    n_experts = probs.shape[1]
    chosen = counts(experts, n_experts, mask)
    shares = chosen.to(probs.dtype) / chosen.sum().clamp(min=1)
    return n_experts * (shares * mean_over(probs, mask)).sum()


def z_loss(logits: Float[Tensor, "N E"], mask: Bool[Tensor, "N"] | None) -> Float[Tensor, ""]:
    """Mean squared log-partition of the logits (Zoph et al., ST-MoE, 2022, arXiv 2202.08906, equation 5)."""
    return mean_over(logits.logsumexp(1).square(), mask)


@torch.no_grad()
def monitor(routing: Routing, mask: Bool[Tensor, "N"] | None, training: bool) -> dict[str, Tensor]:
    """What a gate says of its routing, as its ``metrics``.

    ``load`` (share of the used slots by expert), ``max_violation`` (largest load over the mean, minus 1), ``dead`` (number of
    experts that nobody chose) and, where the routing has probabilities, their mean ``entropy`` in nats over the real tokens
    (``mask``). Nothing for a single token outside ``training``, a step of decoding, whose routing costs less than its statistics.
    """
    if not training and routing.experts.shape[0] == 1:
        return {}
    chosen = routing.counts().to(routing.weights.dtype)
    load = chosen / chosen.sum().clamp(min=1)
    found = {"load": load, "max_violation": load.max() * routing.n_experts - 1, "dead": (chosen == 0).sum()}
    if routing.probs is not None:
        found["entropy"] = mean_over(torch.special.entr(routing.probs).sum(1), mask)
    return found


class Router(Gate):
    """A gate with one linear map from tokens to expert logits, choosing k experts."""

    def __init__(self, d_model: int, n_experts: int, k: int) -> None:
        super().__init__()
        if not 1 <= k <= n_experts:
            raise ValueError(f"k must be between 1 and the number of experts {n_experts}, got {k}")
        self.d_model, self.n_experts, self.k = d_model, n_experts, k
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"d_model={self.d_model}, n_experts={self.n_experts}, k={self.k}"

    def monitor(self, routing: Routing, mask: Bool[Tensor, "N"] | None) -> dict[str, Tensor]:
        """:func:`monitor` in the router's mode."""
        return monitor(routing, mask, self.training)
