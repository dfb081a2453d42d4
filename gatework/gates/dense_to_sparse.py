"""``DenseToSparse``: the gate of EvoMoE, which starts with all experts and ends with one.

Nie et al., EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate, 2021, arXiv 2112.14397, second
phase (the first, which grows the experts out of a trained feed-forward, is :func:`gatework.experts.spawn_experts`):

    z = W x    g = softmax((z + Gumbel noise) / tau)    chosen = 1[g > 1e-3]    weights = chosen softmax(z)
    loss = balancing E^2 mean_e( mean_t weights_te  mean_t chosen_te )
    exp:    tau(t) = max(tau_max (tau_min / tau_max)^(t / T), tau_min)
    linear: tau(t) = max(tau_max - (tau_max - tau_min) t / T, tau_min)

A hot gate chooses everybody, a cold one the winner of the noisy race alone. After the share ``hard`` of the training only the
winner counts: chosen = onehot(argmax g). Evaluation takes the most probable expert without noise, with its probability as weight.
The weights are never renormalised: their sum tells the layer how much of the distribution it has run.

Difference from the released code: it dispatches by an (N, E, N) tensor; here an expert runs on the tokens that chose it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import Gate, in_backward
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import check_tokens, mean_over, router_logits, top_k
from gatework.gates.smooth import sparse_metrics, sparse_routing
from gatework.ops.estimators import gumbel_noise

#: An expert is chosen whose share of the noisy softmax is above.
THRESHOLD = 1e-3


@register("dense_to_sparse", paper="dts_gate")
class DenseToSparse(Gate):
    """Gumbel-softmax routing to all experts at first and to one at last.

    ``core.advance`` moves the temperature; T is the share ``decay`` of the run's steps. The dense phase costs what E experts cost.

    Args:
        d_model: width of the tokens.
        n_experts: E.
        tau_max: temperature at the start; the released code has 1.0 as its default, the paper's runs about 2.
        tau_min: temperature from T on; 0.5 and about 0.3 there.
        schedule: ``exp`` or ``linear`` in between.
        decay: T as a share of all steps.
        hard: share of all steps after which only the winner counts; None: never.
        noisy_weights: the weights of the chosen are g, with its noise, instead of softmax(z).
        balancing: weight of the balance loss.
        dense_eval: evaluation chooses as training does, without the noise, instead of the most probable expert alone.

    Initialisation: W is normal with standard deviation 0.02.

    Side outputs: loss ``balance`` (training); metrics ``load``, ``max_violation``, ``dead``, ``entropy``, ``chosen`` (mean number
        of experts that a token uses).

    Raises:
        ValueError: temperatures that are not positive or rise, shares outside (0, 1], a negative balance weight; 1000 experts or
            more, of which a hot gate would choose none.
    """

    exact = ("temperature",)

    temperature: Tensor
    winner_only: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        tau_max: float = 2.0,
        tau_min: float = 0.3,
        schedule: Literal["exp", "linear"] = "exp",
        decay: float = 0.6,
        hard: float | None = 0.8,
        noisy_weights: bool = False,
        balancing: float = 1e-2,
        dense_eval: bool = False,
    ) -> None:
        super().__init__()
        if min(d_model, n_experts) < 1 or not balancing >= 0:
            given = f"{d_model}, {n_experts} and {balancing}"
            raise ValueError(f"d_model and n_experts must be at least 1 and balancing 0, got {given}")
        if n_experts * THRESHOLD >= 1:
            raise ValueError(f"n_experts must be below {1 / THRESHOLD:.0f}, for a hot gate to choose all of them, got {n_experts}")
        if not 0 < tau_min <= tau_max:
            raise ValueError(f"temperatures are positive and fall from tau_max to tau_min, got {tau_max} and {tau_min}")
        if schedule not in ("exp", "linear"):
            raise ValueError(f"schedule must be 'exp' or 'linear', got {schedule!r}")
        if not 0 < decay <= 1 or not (hard is None or 0 < hard <= 1):
            raise ValueError(f"decay and hard are shares of the training in (0, 1], got {decay} and {hard}")
        self.d_model, self.n_experts, self.tau_max, self.tau_min = d_model, n_experts, tau_max, tau_min
        self.schedule, self.decay, self.hard = schedule, decay, hard
        self.noisy_weights, self.balancing, self.dense_eval = noisy_weights, balancing, dense_eval
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)
        self.register_buffer("temperature", torch.tensor(float(tau_max)))
        self.register_buffer("winner_only", torch.tensor(False))

    def extra_repr(self) -> str:
        """The sizes and the schedule."""
        shown = f"d_model={self.d_model}, n_experts={self.n_experts}, tau_max={self.tau_max}, tau_min={self.tau_min}"
        shown += f", schedule={self.schedule}, decay={self.decay}, hard={self.hard}, noisy_weights={self.noisy_weights}"
        return f"{shown}, balancing={self.balancing}, dense_eval={self.dense_eval}"

    @property
    def k(self) -> int:
        """The most experts that a token uses, now and in this mode."""
        one = bool(self.winner_only) or not (self.training or self.dense_eval)
        return 1 if one else self.n_experts

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N tokens; draws noise from the global generator while training."""
        check_tokens(x, mask, self.d_model)
        logits = router_logits(x, self.weight)
        probs, noisy = logits.softmax(1), logits
        if self.training:
            noisy = logits + gumbel_noise(logits)
        shares = (noisy / self.temperature.to(noisy.dtype)).softmax(1)
        winner = F.one_hot(top_k(noisy, 1)[:, 0], self.n_experts).to(probs.dtype)
        if self.training or self.dense_eval:
            chosen = torch.where(self.winner_only, winner, (shares > THRESHOLD).to(probs.dtype))
        else:
            chosen = winner
        weights = chosen * (shares if self.noisy_weights and self.training else probs)
        routing = sparse_routing(weights, mask, logits, probs)
        losses = {}
        if self.training and self.balancing:
            together = mean_over(weights, mask) * mean_over(chosen, mask)
            losses["balance"] = self.balancing * self.n_experts**2 * together.mean()
        if not in_backward():
            self.losses, self.metrics = losses, sparse_metrics(routing, mask, self.training)
        return routing

    @torch.no_grad()
    def advance(self, step: int, total_steps: int) -> None:
        """Set the temperature, and whether only the winner counts, after ``step`` steps of ``total_steps``."""
        past = step / (self.decay * total_steps)
        if past >= 1:
            tau = self.tau_min
        elif self.schedule == "exp":
            tau = self.tau_max * (self.tau_min / self.tau_max) ** past
        else:
            tau = self.tau_max - (self.tau_max - self.tau_min) * past
        self.temperature.fill_(tau)
        self.winner_only.fill_(self.hard is not None and step >= self.hard * total_steps)
