"""``AttentionWeighted``: experts chosen by a history, as strongly as the history says.

Attention Weighted Mixture of Experts with Contrastive Learning for Personalized Ranking in E-commerce, 2023, arXiv 2306.05011.
Of a token's behaviours s_1..s_M (mask m) and its query q, both of width D:

    z_j = [s_j ; q ; s_j * q]    u_j = MLP_g(z_j) in R^E    alpha_j = MLP_a(z_j) in R
    g = g_0 + sum_j m_j alpha_j u_j                          y = sum_e g_e f_e(x)

No softmax, neither over behaviours nor over experts: the intensity is kept, a weight may be negative, and two histories add up,
``g(S1 + S2) - g_0 = (g(S1) - g_0) + (g(S2) - g_0)``. While training, a second gate g' sees each behaviour with probability
``1 - drop`` (at least one of them), and

    L = -contrast * mean_b log( exp(cos(g_b, g'_b) / t) / sum_c exp(cos(g_b, g'_c) / t) )

draws a user's two gates together and pushes those of the others in the batch away. The experts' input stays whole.

Reconstructed from the abstract: the default vector g_0, the layer sizes, ``drop``, t and ``contrast`` are ours, and so is leaving
tokens without behaviours out of the contrast (their two gates are both g_0 whatever they are compared with).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import Gate, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import check_tokens, mean_over, normalized
from gatework.ops.precision import without_autocast


@register("attention_weighted", paper="aw_moe")
class AttentionWeighted(Gate):
    """A dense gate made of each token's history, with signed weights.

    ``forward(x, mask, history (N, M, D), history_mask (N, M), query (N, D))``; the token x itself decides nothing and may have any
    width. The order of the behaviours has no influence, nor has what stands where ``history_mask`` is False. Computed in float32
    (float64 stays).

    Args:
        d_model: D, width of behaviours and query.
        n_experts: E.
        hidden: hidden width of the two MLPs (3 D -> hidden -> E and 1, ReLU inside).
        contrast: weight of the contrastive loss; 0 switches it off.
        drop: probability with which the loss hides a behaviour.
        temperature: t of the loss.

    Initialisation: PyTorch's default for linear layers; g_0 is 1 / E, so that an empty history starts as the experts' mean.

    Side outputs: the loss ``contrast`` (training); the metrics ``load``, each expert's share of the absolute weights, and
    ``negative``, the share of weights below 0.

    Raises:
        ValueError: sizes below 1, a negative weight, drop outside [0, 1), a temperature that is not positive.
    """

    conditions = ("history", "history_mask", "query")

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        hidden: int = 32,
        contrast: float = 0.1,
        drop: float = 0.3,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        if min(d_model, n_experts, hidden) < 1:
            raise ValueError(f"d_model, n_experts and hidden must be at least 1: {d_model}, {n_experts}, {hidden}")
        if not contrast >= 0 or not 0 <= drop < 1 or not temperature > 0:
            given = f"{contrast}, {drop}, {temperature}"
            raise ValueError(f"contrast must be at least 0, drop in [0, 1) and temperature positive, got {given}")
        self.d_model, self.n_experts, self.k = d_model, n_experts, n_experts
        self.contrast, self.drop, self.temperature = contrast, drop, temperature
        self.gate = nn.Sequential(nn.Linear(3 * d_model, hidden), nn.ReLU(), nn.Linear(hidden, n_experts))
        self.activation = nn.Sequential(nn.Linear(3 * d_model, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.default = nn.Parameter(torch.full((n_experts,), 1 / n_experts))

    def extra_repr(self) -> str:
        """The sizes and the loss."""
        shown = f"d_model={self.d_model}, n_experts={self.n_experts}"
        return f"{shown}, contrast={self.contrast}, drop={self.drop}, temperature={self.temperature}"

    def forward(
        self,
        x: Float[Tensor, "N D"],
        mask: Bool[Tensor, "N"] | None = None,
        history: Float[Tensor, "N M W"] | None = None,
        history_mask: Bool[Tensor, "N M"] | None = None,
        query: Float[Tensor, "N W"] | None = None,
    ) -> Routing:
        """Route N tokens."""
        if history is None or history_mask is None or query is None:
            raise PartError("attention_weighted needs each token's history, history_mask and query beside the tokens")
        if history.shape[-1] != self.d_model:
            raise PartError(f"the gate was built for behaviours of width {self.d_model}, not {history.shape[-1]}")
        check_tokens(x, mask, x.shape[-1])
        check_history(len(x), history, history_mask, query)
        dtype = torch.promote_types(torch.promote_types(history.dtype, self.default.dtype), torch.float32)
        with without_autocast(x.device):
            parts = self._parts(history.to(dtype), history_mask, query.to(dtype))
            weights = parts.sum(1) + self.default
            losses = {}
            if self.training and self.contrast:
                seen = self._view(history_mask)
                other = torch.where(seen[..., None], parts, 0).sum(1) + self.default
                real = history_mask.any(1) if mask is None else history_mask.any(1) & mask
                losses["contrast"] = self.contrast * contrastive_loss(weights, other, self.temperature, real)
        if mask is not None:
            weights = torch.where(mask[:, None], weights, 0)
        experts = torch.arange(self.n_experts, device=x.device).expand(len(weights), -1)
        if not in_backward():
            share = normalized(weights.detach().abs())
            below = mean_over((weights.detach() < 0).to(share.dtype), mask).mean()
            self.losses, self.metrics = losses, {"load": mean_over(share, mask), "negative": below}
        return Routing(weights, experts, self.n_experts, weights)

    def _parts(self, history: Tensor, history_mask: Tensor, query: Tensor) -> Float[Tensor, "N M E"]:
        """``m_j alpha_j u_j``; hidden behaviours may hold anything, NaN too."""
        behaviours = history.masked_fill(~history_mask[..., None], 0)
        asked = query[:, None].expand_as(behaviours)
        pairs = torch.cat([behaviours, asked, behaviours * asked], -1)
        parts = self._run(self.activation, pairs) * self._run(self.gate, pairs)
        return parts.masked_fill(~history_mask[..., None], 0)

    def _run(self, network: Any, pairs: Tensor) -> Tensor:
        first, _, last = network
        h = F.linear(pairs, first.weight.to(pairs.dtype), first.bias.to(pairs.dtype)).relu()
        return F.linear(h, last.weight.to(pairs.dtype), last.bias.to(pairs.dtype))

    def _view(self, history_mask: Bool[Tensor, "N M"]) -> Bool[Tensor, "N M"]:
        """Each behaviour with probability 1 - drop, but at least one where there is any."""
        draw = torch.rand(history_mask.shape, device=history_mask.device).masked_fill(~history_mask, -1)
        kept = draw >= self.drop
        if history_mask.shape[1]:
            kept = kept | (draw == draw.amax(1, keepdim=True))
        return kept & history_mask


def check_history(n: int, history: Tensor, history_mask: Tensor, query: Tensor) -> None:
    """Refuse histories and queries that are not those of n tokens.

    Raises:
        PartError: another shape than (n, M, D), (n, M) and (n, D), or a ``history_mask`` of numbers.
    """
    many, width = history.shape[1:] if history.dim() == 3 else ("M", history.shape[-1])
    for name, value, wanted in (
        ("history", history, (n, many, width)), ("history_mask", history_mask, (n, many)), ("query", query, (n, width)),
    ):  # fmt: skip
        if tuple(value.shape) != wanted:
            raise PartError(f"{name} has shape ({', '.join(map(str, wanted))}) for {n} tokens, not {tuple(value.shape)}")
    if history_mask.dtype != torch.bool:
        raise PartError(f"history_mask holds bools, True where a behaviour is real, not {history_mask.dtype}")


def contrastive_loss(
    gates: Float[Tensor, "N E"], others: Float[Tensor, "N E"], temperature: float, mask: Bool[Tensor, "N"] | None = None
) -> Float[Tensor, ""]:
    """``-mean_b log( exp(cos(g_b, g'_b) / t) / sum_c exp(cos(g_b, g'_c) / t) )``: at least 0, log N where all gates are equal.

    Args:
        gates: g.
        others: g', the same tokens' gates from another view.
        temperature: t.
        mask: which tokens take part, on both sides; 0 without any.
    """
    cosines = F.normalize(gates, dim=1) @ F.normalize(others, dim=1).t() / temperature
    if mask is not None:
        cosines = cosines.masked_fill(~mask[None], torch.finfo(cosines.dtype).min)
    return mean_over(cosines.logsumexp(1) - cosines.diagonal(), mask)
