"""``AdaptiveTopK``: one or two experts per token, by how sure the router is; ``ComplexityCurriculum`` orders the data by it.

Li et al., Adaptive Gating in Mixture-of-Experts based Language Models, 2023 (EMNLP), arXiv 2310.07188. With p = softmax(x W^T) and
its two largest entries p1 >= p2, of the experts i and j:

    y = p1 E_i(x) + p2 E_j(x)  if p1 - p2 <= threshold,    y = p1 E_i(x)  else

in training and in evaluation alike. The weights are the probabilities as they are, so that the router learns where one expert is
chosen, too. The balance loss sees first choices only: nothing pulls a token to or from its second expert. A router at its
start is nearly uniform and sends all tokens to two experts; what is saved comes with training.

The curriculum. For a sample d and the adaptive layers l = 1..M let r_l(d) be the share of its tokens that used two experts. A batch
takes as long as its slowest sample, so samples of like complexity C_d = (r_1, .., r_M) are to stand together, the simple ones
first: the sample with the smallest mean of C_d leads, the others follow by falling cosine similarity to it. Ours: the cosine is
that of (r_1, 1 - r_1, .., r_M, 1 - r_M). That of C_d itself does not exist where no token used two experts, and takes samples in
which all layers use twice as many second experts for equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import Router, check_tokens, mean_over, normalized, router_logits, top_k


@register("adaptive_topk", paper="adaptive_topk")
class AdaptiveTopK(Router):
    """Softmax gate that takes a second expert where the first is not sure.

    The routing has two slots per token, of which the second is empty (weight 0) where one expert does: it costs nothing there, and
    ``routing.weights != 0`` says how many experts a token used. With one expert in all (E = 1) there is one slot.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        threshold: the second expert is used where p1 - p2 is at most this; below 0 never (top-1), from 1 on always (top-2).
            The paper studies 0.05 to 0.5.
        renorm: divide the weights by their sum (ours). A token with one expert then has a weight of 1 and gives the router no
            gradient.
        balance: balance terms, a list of parts or one; ``[]`` or None for none. They see first choices only. ``loss_free`` shifts
            p for the choice of the experts and of their number, not for the weights.

    Initialisation: the router's weight is normal with standard deviation 0.02 (ours).

    Side outputs: the losses of the balance terms by their names (training), metrics ``load``, ``max_violation``, ``dead``,
    ``entropy`` and ``two_experts``, the share of the real tokens that use two.

    Raises:
        ValueError: no experts, a threshold that is no number, a balance term twice or one that needs noise.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        threshold: float = 0.1,
        renorm: bool = False,
        balance: list[Any] | Any = "switch(0.01)",
    ) -> None:
        if n_experts < 1:
            raise ValueError(f"n_experts must be at least 1, got {n_experts}")
        super().__init__(d_model, n_experts, min(2, n_experts), balance)
        if math.isnan(threshold):
            raise ValueError(f"threshold must be a number, got {threshold}")
        self.threshold, self.renorm = threshold, renorm
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        """The sizes and settings."""
        return f"{super().extra_repr()}, threshold={self.threshold}, renorm={self.renorm}"

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens."""
        check_tokens(x, mask, self.d_model)
        logits = router_logits(x, self.weight)
        probs = logits.softmax(1)
        scores = self.shifted(probs)
        experts = top_k(scores, self.k)
        ranked = scores.detach().gather(1, experts)
        used = ranked[:, :1] - ranked <= self.threshold
        used[:, 0] = True
        if mask is not None:
            used = used & mask[:, None]
        weights = torch.where(used, probs.gather(1, experts), 0)
        if self.renorm:
            weights = normalized(weights)
        first = Routing(weights[:, :1], experts[:, :1], self.n_experts, logits, probs)
        routing = self.finish(Routing(weights, experts, self.n_experts, logits, probs), mask, balanced=first)
        if self.metrics and not in_backward():
            two = (weights.detach()[:, 1:] != 0).any(1)
            self.metrics = self.metrics | {"two_experts": mean_over(two.to(probs.dtype), mask)}
        return routing


class ComplexityCurriculum:
    """An order of the training data, from samples that need few experts to samples that need many.

    ::

        curriculum = ComplexityCurriculum().fit(model, tokens.split(64))
        for rows in curriculum.order().split(64):
            train(tokens[rows])

    Measure anew from time to time: what the gates find hard changes while they train.
    """

    #: Shares of tokens that used two experts, of every sample in every adaptive layer; set by :meth:`fit`.
    complexity: Float[Tensor, "S M"]

    @torch.no_grad()
    def fit(self, model: nn.Module, batches: Iterable[Any]) -> ComplexityCurriculum:
        """Measure every sample's complexity by running the model, in evaluation mode and without gradients.

        Args:
            model: with ``adaptive_topk`` gates, which are given all tokens of a batch, sample after sample. The order in which
                they run is that of the layers.
            batches: the samples in the order that is to be changed; each batch is what the model is called with, a tensor or a
                dictionary of keyword arguments, samples along the first axis.

        Raises:
            PartError: no such gate in the model, no batches, a gate that was given a part of the tokens.
        """
        gates = [module for module in model.modules() if isinstance(module, AdaptiveTopK)]
        if not gates:
            raise PartError("the model has no adaptive_topk gate whose choices a curriculum could read")
        routings: list[Routing] = []
        hooks = [gate.register_forward_hook(lambda _gate, _given, routing: routings.append(routing)) for gate in gates]
        modes = [(module, module.training) for module in model.modules()]
        found = []
        try:
            model.eval()
            for batch in batches:
                routings.clear()
                samples = len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)
                model(**batch) if isinstance(batch, Mapping) else model(batch)
                found.append(torch.stack([two_expert_share(routing, samples) for routing in routings], 1).cpu())
        finally:
            for hook in hooks:
                hook.remove()
            for module, mode in modes:
                module.training = mode
        if not found:
            raise PartError("there are no batches to measure")
        self.complexity = torch.cat(found)
        return self

    def order(self) -> Int[Tensor, "S"]:
        """The samples' numbers, simplest first; equals by their mean share, then in the order in which they were measured.

        Raises:
            PartError: before :meth:`fit`.
        """
        if not hasattr(self, "complexity"):
            raise PartError("the curriculum has measured nothing yet; call fit(model, batches) first")
        shares = self.complexity.double()
        both = torch.cat([shares, 1 - shares], 1)
        mean = shares.mean(1)
        likeness = F.cosine_similarity(both, both[mean.argmin()][None])
        by_mean = mean.argsort(stable=True)
        return by_mean[likeness[by_mean].argsort(descending=True, stable=True)]


def two_expert_share(routing: Routing, samples: int) -> Float[Tensor, "S"]:
    """Of a routing of the tokens of so many samples, one after the other: the share of each one's real tokens with two experts."""
    used = (routing.weights != 0).sum(1)
    if len(used) % samples:
        raise PartError(f"the gate was given {len(used)} tokens of {samples} samples: a curriculum reads gates that see all tokens")
    used = used.view(samples, -1)
    return (used > 1).sum(1) / (used > 0).sum(1).clamp(min=1)
