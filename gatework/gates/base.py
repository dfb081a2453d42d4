"""What gates share: the choice of the top k, statistics over real tokens, balance losses and terms, the monitoring of a
routing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Gate, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import build
from gatework.core.routing import Routing
from gatework.ops.precision import without_autocast

#: Added to the squared mean in the squared coefficient of variation.
CV_EPS = 1e-10
#: So many tokens in evaluation are taken for a step of decoding, and not monitored.
FEW_TOKENS = 16


def check_sizes(d_model: int, n_experts: int, k: int) -> None:
    """Refuse sizes that no gate can have.

    Raises:
        ValueError: d_model or n_experts below 1, k outside 1..E.
    """
    if min(d_model, n_experts) < 1:
        raise ValueError(f"d_model and n_experts must be at least 1, got {d_model} and {n_experts}")
    if not 1 <= k <= n_experts:
        raise ValueError(f"k must be between 1 and the number of experts {n_experts}, got {k}")


def check_tokens(x: Tensor, mask: Tensor | None, d_model: int) -> None:
    """Refuse what a gate over tokens of width ``d_model`` cannot route.

    Raises:
        PartError: x is not (N, d_model), the mask not N truth values.
    """
    if x.dim() != 2 or x.shape[1] != d_model:
        raise PartError(f"this gate was built for tokens of shape (N, {d_model}), not {tuple(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:1]):
        given = f"{tuple(mask.shape)} of {mask.dtype}"
        raise PartError(f"the mask has one bool per token, shape ({x.shape[0]},), not {given}")


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


def normalized(weights: Float[Tensor, "N k"]) -> Float[Tensor, "N k"]:
    """Rows divided by their sums; rows of zeros stay."""
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


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
    real = values.masked_fill(~mask.view(-1, *[1] * (values.dim() - 1)), 0)
    return real.sum(0) / mask.sum().clamp(min=1)


def share_loss(
    probs: Float[Tensor, "N E"], chosen: Int[Tensor, "E"], mask: Bool[Tensor, "N"] | None
) -> Float[Tensor, ""]:
    """``E sum_e f_e P_e``: f_e the share of the choices that fell on e (no gradient), P_e the mean probability; 1
    when uniform.

    Fedus et al., Switch Transformers, 2021, arXiv 2101.03961, equations 4 to 6, with f_e divided by k as well.
    """
    shares = chosen.to(probs.dtype) / chosen.sum().clamp(min=1)
    return probs.shape[1] * (shares * mean_over(probs, mask)).sum()


def switch_loss(
    probs: Float[Tensor, "N E"], experts: Int[Tensor, "N k"], mask: Bool[Tensor, "N"] | None
) -> Float[Tensor, ""]:
    """:func:`share_loss` where every slot is used."""
    return share_loss(probs, counts(experts, probs.shape[1], mask), mask)


def z_loss(logits: Float[Tensor, "N E"], mask: Bool[Tensor, "N"] | None) -> Float[Tensor, ""]:
    """Mean squared log-partition of the logits (Zoph et al., ST-MoE, 2022, arXiv 2202.08906, equation 5)."""
    return mean_over(logits.logsumexp(1).square(), mask)


@torch.no_grad()
def monitor(routing: Routing, mask: Bool[Tensor, "N"] | None, training: bool) -> dict[str, Tensor]:
    """What a gate says of its routing, as its ``metrics``.

    ``load`` (share of the used slots by expert), ``max_violation`` (largest load over the mean, minus 1), ``dead`` (number of
    experts that nobody chose) and, where the routing has probabilities, their mean ``entropy`` in nats over the real tokens
    (``mask``). Nothing for up to :data:`FEW_TOKENS` outside ``training``, a step of decoding, whose routing costs less than its
    statistics.
    """
    if not training and routing.experts.shape[0] <= FEW_TOKENS:
        return {}
    chosen = routing.counts().to(routing.weights.dtype)
    load = chosen / chosen.sum().clamp(min=1)
    found = {"load": load, "max_violation": load.max() * routing.n_experts - 1, "dead": (chosen == 0).sum()}
    if routing.probs is not None:
        found["entropy"] = mean_over(torch.special.entr(routing.probs).sum(1), mask)
    return found


def loss_weight(weight: float) -> float:
    """The factor of a loss, which is at least 0."""
    if not weight >= 0:
        raise ValueError(f"weight must be at least 0, got {weight}")
    return weight


def balance_terms(balance: Any, n_experts: int, offered: tuple[str, ...] = ()) -> nn.ModuleDict:
    """The terms of a gate by registered name: of part expressions, classes or instances, in a list or alone (None: none).

    ``offered`` are the conditions that the gate can give them.

    Raises:
        ValueError: a term named twice, made for another number of experts, or in need of what the gate does not offer.
    """
    given = [] if balance is None else list(balance) if isinstance(balance, list | tuple) else [balance]
    terms = nn.ModuleDict()
    for item in given:
        term = build(item, "balance", n_experts=n_experts)
        name = term.part_name
        if name in terms:
            raise ValueError(f"balance has {name} twice; give each term once")
        if getattr(term, "n_experts", n_experts) != n_experts:
            raise ValueError(f"{name} is made for {term.n_experts} experts, the gate has {n_experts}")
        missing = [condition for condition in term.conditions if condition not in offered]
        if missing:
            raise ValueError(f"{name} needs {' and '.join(missing)}, which this gate does not have; noisy_topk does")
        terms[name] = term
    return terms


class Router(Gate):
    """A gate with one linear map from tokens to expert logits, choosing k experts, with balance terms.

    A subclass chooses by :meth:`choose` and hands its routing out through :meth:`finish`. What it offers to terms beside the
    routing stands in ``offers``.

    Raises:
        ValueError: what :func:`check_sizes` and :func:`balance_terms` refuse.
    """

    offers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, d_model: int, n_experts: int, k: int, balance: Any = None) -> None:
        super().__init__()
        check_sizes(d_model, n_experts, k)
        self.d_model, self.n_experts, self.k = d_model, n_experts, k
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.balance = balance_terms(balance, n_experts, self.offers)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"d_model={self.d_model}, n_experts={self.n_experts}, k={self.k}"

    def choose(self, scores: Float[Tensor, "N E"]) -> Int[Tensor, "N k"]:
        """The k experts with the highest scores, after the terms have shifted them."""
        return top_k(self.shifted(scores), self.k)

    def shifted(self, scores: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """The scores that the choice is made by."""
        for term in self.balance.values():
            scores = term.shift(scores)  # type: ignore[operator]
        return scores

    def finish(
        self,
        routing: Routing,
        mask: Bool[Tensor, "N"] | None,
        conditions: Mapping[str, Tensor] | None = None,
        balanced: Routing | None = None,
    ) -> Routing:
        """Set the losses (in training) and metrics of ``routing``, and return it.

        The terms get those of the ``conditions`` that they ask for, and see ``balanced`` where it is given.
        """
        said = {}
        if self.training:
            for name, term in self.balance.items():
                wanted: Any = {key: value for key, value in (conditions or {}).items() if key in term.conditions}  # type: ignore
                loss = term(routing if balanced is None else balanced, mask, **wanted)
                if loss is not None:
                    said[name] = loss
        if not in_backward():
            self.losses, self.metrics = said, self.monitor(routing, mask)
        return routing

    def monitor(self, routing: Routing, mask: Bool[Tensor, "N"] | None) -> dict[str, Tensor]:
        """:func:`monitor` in the router's mode."""
        return monitor(routing, mask, self.training)


class AffineRouter(Router):
    """A router whose softmax gets a bias per expert that the choice does not see: the gate of the theory of softmax mixtures.

    Nguyen et al., 2023, arXiv 2305.03288 (dense) and 2309.13850 (top-K): the k largest scores are chosen, and the weights are the
    softmax of score + bias over those. A subclass makes the scores and calls :meth:`route`.

    Raises:
        ValueError: k = 1 without a balance term; what :class:`Router` refuses.

    Initialisation: the weight is normal with standard deviation 0.02, the bias 0.
    """

    def __init__(self, d_model: int, n_experts: int, k: int | None, balance: Any = None) -> None:
        super().__init__(d_model, n_experts, n_experts if k is None else k, balance)
        if k == 1 < n_experts and not self.balance:
            raise ValueError("with k=1 the only weight is always 1, and the gate learns nothing: take k of 2, or a balance term")
        self.bias = nn.Parameter(torch.zeros(n_experts))
        nn.init.normal_(self.weight, std=0.02)

    def route(
        self, scores: Float[Tensor, "N E"], mask: Bool[Tensor, "N"] | None, tau: Float[Tensor, ""] | None = None
    ) -> Routing:
        """The routing by ``(scores + bias) / tau``."""
        logits = scores + self.bias
        logits = logits if tau is None else logits / tau
        probs = logits.softmax(1)
        if self.k == self.n_experts:
            experts, weights = torch.arange(self.k, device=scores.device).expand_as(scores), probs
        else:
            experts = self.choose(scores)
            weights = logits.gather(1, experts).softmax(1)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None], 0)
        return self.finish(Routing(weights, experts, self.n_experts, logits, probs), mask)
