"""``Ranker``: will this user click this item? A score from the item, the query and what the user did before."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import build, check, lookup
from gatework.ops.dispatch import run_experts


class Ranker(nn.Module):
    """Logits of clicks; experts that score, weighed by a gate.

    ``forward(ids (B, 2 + M)) -> (B,)``: the query, the item in question, then M places for the items of the user's history, 0
    where there is none. With embeddings q, t, s_j (one table serves the items of both places) and their mean over the history:

        v = [mean_j s_j ; q ; t]    logit = sum_e g_e f_e(v)    f_e: 3 d_model -> d_ff -> 1, ReLU

    as in Attention Weighted Mixture of Experts, 2023, arXiv 2306.05011. A gate with the conditions ``history``,
    ``history_mask`` and ``query`` (``attention_weighted``) is built with the embeddings' width and given s, which of them
    there are, and q; any other one routes v. A mixture whose gate is a softmax over all experts is
    ``gate=topk(k=8, normalize=none)``. Without a gate one network of the experts' joint width scores alone.

    Args:
        items: number of items; their ids are 1 .. items.
        queries: number of queries; their ids are 0 .. queries - 1.
        history: M.
        d_model: width of the embeddings.
        experts: E.
        d_ff: hidden width of an expert; None is ``2 d_model``.
        gate: part expression of a gate; None is a single network of hidden width ``experts d_ff``.

    Initialisation: embeddings are normal with standard deviation 1, the rest is PyTorch's default.

    Raises:
        PartError: for sizes below 1, a gate with conditions that a ranker does not have.

    Example:
        >>> Ranker(items=20, queries=5, history=4, gate="attention_weighted")(torch.ones(3, 6, dtype=torch.long)).shape
        torch.Size([3])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("items", "queries", "history")

    def __init__(
        self,
        items: int,
        queries: int,
        history: int,
        d_model: int = 16,
        experts: int = 8,
        d_ff: int | None = None,
        gate: Any = None,
    ) -> None:
        super().__init__()
        d_ff = 2 * d_model if d_ff is None else d_ff
        if min(items, queries, history, d_model, experts, d_ff) < 1:
            given = f"{items}, {queries}, {history}, {d_model}, {experts}, {d_ff}"
            raise PartError(f"items, queries, history, d_model, experts and d_ff must be at least 1, got {given}")
        self.length = 2 + history
        self.items = nn.Embedding(items + 1, d_model, padding_idx=0)
        self.queries = nn.Embedding(queries, d_model)
        self.gate: Any = None
        count, width = (1, experts * d_ff) if gate is None else (experts, d_ff)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3 * d_model, width), nn.ReLU(), nn.Linear(width, 1)) for _ in range(count)
        )
        if gate is not None:
            wanted = _conditions(gate)
            if odd := set(wanted) - {"history", "history_mask", "query"}:
                raise PartError(f"a ranker has a history and a query, and this gate needs {', '.join(sorted(odd))}")
            self.gate = build(gate, "gate", d_model=d_model if wanted else 3 * d_model, n_experts=experts)

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B"]:
        """Logits of clicks."""
        if ids.shape[1] != self.length:
            raise PartError(f"a row holds the query, the item and {self.length - 2} places of history, not {ids.shape[1]} ids")
        query, target, history = self.queries(ids[:, 0]), self.items(ids[:, 1]), self.items(ids[:, 2:])
        there = ids[:, 2:] != 0
        pooled = (history * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
        v = torch.cat([pooled, query, target], 1)
        if self.gate is None:
            logit: Tensor = self.experts[0](v)
            return logit[:, 0]
        given = {"history": history, "history_mask": there, "query": query}
        routing = self.gate(v, **{name: given[name] for name in self.gate.conditions})
        return run_experts(v, routing, list(self.experts))[:, 0]


def _conditions(gate: Any) -> tuple[str, ...]:
    part = gate if isinstance(gate, nn.Module | type) else lookup(check(gate, "gate").name, "gate").cls
    names: tuple[str, ...] = getattr(part, "conditions", ())
    return names
