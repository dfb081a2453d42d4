"""``OptFS``: one gate per feature value, searched with a sharpening sigmoid and hardened to keep or drop.

Lyu et al., Optimizing Feature Set for Click-Through Rate Prediction, WWW 2023, arXiv 2301.10909. A feature is one value of
one categorical field, with an embedding row e_f and one parameter c_f:

    search:   q_f = sigmoid(beta c_f) / sigmoid(c_0)        e_f is used as q_f e_f
    hard:     q_f = 1[c_f > 0] / sigmoid(c_0)
    beta in epoch t of T:  final_beta^(t / (T - 1))         loss += penalty * sum_f sigmoid(beta c_f)

All c_f start at c_0, so that the first epoch starts from the plain model (q = 1). Interactions need no gates of their own:
products of two gated embeddings carry q_f q_g. The derivative of q_f is beta s (1 - s) / sigmoid(c_0), s = sigmoid(beta c_f).

The paper retrains the weights from an early state with the hard gates: the learner ``optfs_search``. The released code moves
beta by whole epochs over the data; here the search is a share of the run, cut into ``epochs`` equal pieces. In the release
the IPNN variant forgets to hand beta to its gates; gates here hold their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Component, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register


@register("optfs", paper="optfs")
class OptFS(Component):
    """Gates on the rows of an embedding table: ``forward(embeddings, ids)``.

    ``embeddings (..., D)`` are the rows that ``ids (...)`` name, whatever made them; the result is of the same shape
    and dtype. ``core.advance`` moves beta and, where ``search`` is below 1, hardens the gates when the search is over; from
    then on ``c`` is frozen. :meth:`export` gives the table without the dropped rows.

    Args:
        features: number of feature values F, the rows of the table.
        penalty: weight of the number of features kept (softly) in the loss. It sums over the whole table although a batch
            touches few rows; the paper's 1e-8 is for millions of features, small tables want 1e-4 to 1e-3.
        epochs: pieces T of the search, at least 2.
        final_beta: beta of the last piece, at least 1.
        initial: c_0, the start of every c.
        search: share of the run that searches, in (0, 1]; 1 never hardens by itself (:meth:`harden` does).

    Initialisation: every ``c`` is ``initial``, so that every gate is exactly 1; ``beta`` is 1.

    Side outputs: loss ``features`` (training, while the gates search), metric ``kept`` (share of the features with c > 0).

    Raises:
        ValueError: for arguments outside these ranges.
    """

    family = "gate"
    exact = ("beta",)

    start: Tensor
    beta: Tensor
    hard: Tensor

    def __init__(
        self,
        features: int,
        penalty: float = 1e-8,
        epochs: int = 20,
        final_beta: float = 200.0,
        initial: float = 0.5,
        search: float = 1.0,
    ) -> None:
        super().__init__()
        if features < 1 or epochs < 2:
            raise ValueError(f"features must be at least 1 and epochs at least 2, got {features} and {epochs}")
        if not penalty >= 0 or not final_beta >= 1 or not initial > 0:
            given = f"{penalty}, {final_beta} and {initial}"
            raise ValueError(f"penalty must be at least 0, final_beta at least 1 and initial positive, got {given}")
        if not 0 < search <= 1:
            raise ValueError(f"search is a share of the run in (0, 1], got {search}")
        self.features, self.penalty, self.epochs = features, penalty, epochs
        self.final_beta, self.initial, self.search = final_beta, initial, search
        self.c = nn.Parameter(torch.full((features,), float(initial)))
        # Of the same dtype as c, always: what rounds the one rounds the other.
        self.register_buffer("start", torch.tensor(float(initial)))
        self.register_buffer("beta", torch.tensor(1.0))
        self.register_buffer("hard", torch.tensor(False))

    def extra_repr(self) -> str:
        """The sizes, the penalty and the schedule."""
        shown = f"features={self.features}, penalty={self.penalty}, epochs={self.epochs}, final_beta={self.final_beta}"
        return f"{shown}, initial={self.initial}, search={self.search}"

    def _open(self, c: Tensor) -> Tensor:
        """Soft gates before they are scaled: 1 is open."""
        return torch.sigmoid(self.beta.to(c.dtype) * c)

    @property
    def scale(self) -> float:
        """1 / sigmoid(c_0), which the kept rows are multiplied with."""
        return 1 + math.exp(-self.initial)

    def values(self, ids: Int[Tensor, "*shape"] | None = None) -> Tensor:
        """The gates q of ``ids``, of their shape; of all features (F,) without. At least float32."""
        c = self.c if ids is None else nn.functional.embedding(ids, self.c[:, None]).squeeze(-1)
        c = c.to(torch.promote_types(c.dtype, torch.float32))
        # Both sigmoids go through the same kernel: where c = c_0 and beta = 1 the gate is 1 to the last bit.
        soft = self._open(c) / torch.sigmoid(torch.zeros_like(c) + self.start)
        return torch.where(self.hard, (c > 0).to(c.dtype) * self.scale, soft)

    def forward(self, embeddings: Float[Tensor, "*shape D"], ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        """Scale each row by its feature's gate.

        Raises:
            PartError: not one id per row.
        """
        if ids.shape != embeddings.shape[:-1]:
            wanted = tuple(embeddings.shape[:-1])
            raise PartError(f"rows of shape {tuple(embeddings.shape)} have ids of shape {wanted}, not {tuple(ids.shape)}")
        gated = embeddings * self.values(ids)[..., None].to(embeddings.dtype)
        if not in_backward():
            searching = self.training and self.c.requires_grad and self.penalty > 0
            self.losses = {"features": self.penalty * self._open(self.c).sum()} if searching else {}
            self.metrics = {"kept": (self.c.detach() > 0).float().mean()}
        return gated

    def epoch(self, step: int, total_steps: int) -> int:
        """The piece of the search, from 0, after ``step`` of ``total_steps`` steps; ``epochs`` where the search is over."""
        return min(step * self.epochs // self.search_steps(total_steps), self.epochs)

    def search_steps(self, total_steps: int) -> int:
        """How many steps of a run the search takes, at least 1."""
        return max(1, round(self.search * total_steps))

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Sharpen the gates; harden them where the search is over before the run is."""
        t = self.epoch(step, total_steps)
        self.beta.fill_(self.final_beta ** (min(t, self.epochs - 1) / (self.epochs - 1)))
        if t == self.epochs and self.search < 1:
            self.harden()

    def harden(self) -> None:
        """Make every gate 0 or 1 / sigmoid(c_0), for good, and freeze ``c``."""
        self.hard.fill_(True)
        self.c.requires_grad_(False)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.c.requires_grad_(not bool(self.hard))

    @torch.no_grad()
    def export(self, table: Float[Tensor, "F D"]) -> tuple[Int[Tensor, "F"], Float[Tensor, "K D"]]:
        """The hard gates folded into a table without the dropped rows.

        Returns:
            ``remap`` and ``rows``: row 0 is zero and stands for every dropped feature, the others are the kept features' rows
            times 1 / sigmoid(c_0). ``rows[remap[ids]]`` equals ``forward(table[ids], ids)`` with hard gates, bit for bit.

        Raises:
            ValueError: if the table has not ``features`` rows.
        """
        if table.shape[0] != self.features:
            raise ValueError(f"the table has {table.shape[0]} rows, the gate {self.features} features")
        kept = self.c > 0
        remap = torch.where(kept, kept.cumsum(0), 0)
        scale = torch.full_like(self.c[:1], self.scale, dtype=torch.promote_types(self.c.dtype, torch.float32))
        rows = torch.cat([torch.zeros_like(table[:1]), table[kept] * scale.to(table.dtype)])
        return remap, rows
