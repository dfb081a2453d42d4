"""``MixER``: experts of which each environment takes one, by a context that is learnt for it.

Nzoyem et al., Towards Foundational Models for Dynamical System Reconstruction: Hierarchical Meta-Learning via Mixture of
Experts, 2025, arXiv 2502.05335; the official code (ddrous/MixER, JAX) was read. Environment n has a context c_n:

    G = softmax(W^T [c; 1])    y(x, n) = sum over the e with G_e > max G - 1e-6 of E_e(x, c)

so that one expert answers, and those that tie with it are added, without weights. W gets no gradient:
``gatework.learners.KMeansLstsqGateUpdate`` sets it by clustering the contexts. With ``split_context`` the context is cut
into E equal pieces and expert e sees piece e alone.

The paper's experts are meta-learners for neural ODEs (NCF, CoDA, GEPS); ours are MLPs of the input and the context.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Component, No, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import build, register
from gatework.core.routing import Routing
from gatework.gates.base import cv_squared, monitor, router_logits
from gatework.ops.dispatch import run_experts

#: Experts whose share of the gate is this near to the largest answer together.
TIE = 1e-6


@register("mixer_moe", paper="mixer_moe")
class MixERLayer(Component):
    """Experts chosen per environment by a learnt context.

    ``forward(x (N, d_in), environment (N,)) -> (N, d_out)``; ``environment`` holds numbers from 0 to ``environments`` - 1. Only
    the chosen experts run, each on its own rows.

    Args:
        d_in, d_out: widths of input and output.
        environments: number of environments.
        experts: E.
        context: length d of a context; with ``split_context`` divisible by E.
        d_ff: width of an expert's two hidden layers (SiLU).
        split_context: whether expert e sees only the e-th of E pieces of the context. The gate sees it all.
        gate: None is the gate above, which learns from ``mixer_kmeans`` only. A part expression, class or instance of a gate
            routes the contexts instead, weighs as it says and learns by gradient: the usual mixture to compare with.

    Weights: ``contexts`` (environments, d); ``weight`` (d + 1, E), a buffer, the bias last.

    Initialisation: contexts 0; ``weight`` uniform in +-1 / sqrt(d + 1); all experts start from the same numbers, PyTorch's for
        linear layers. At first all environments take one expert, then.

    Side outputs: metrics ``load``, ``max_violation``, ``dead``, ``entropy`` over the environments, ``cv2``, the squared
        coefficient of variation of the mean shares; with a ``gate`` what that one says.

    Raises:
        ValueError: sizes below 1, a context that E does not divide.
    """

    family = "experts"
    capabilities = Component.capabilities | {
        "compiles": No("rows are sorted by expert, and the lengths of the segments are data"),
    }
    no_weight_decay = ("contexts",)
    weight: Tensor

    def __init__(
        self,
        d_in: int,
        d_out: int,
        environments: int,
        experts: int = 4,
        context: int = 16,
        d_ff: int = 64,
        split_context: bool = False,
        gate: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"d_in": d_in, "d_out": d_out, "environments": environments, "experts": experts, "context": context, "d_ff": d_ff}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if split_context and context % experts:
            raise ValueError(f"a context of {context} cannot be split among {experts} experts")
        self.d_in, self.d_out, self.split_context = d_in, d_out, split_context
        self.piece = context // experts if split_context else context
        self.contexts = nn.Parameter(torch.zeros(environments, context))
        self.gate = None if gate is None else build(gate, "gate", d_model=context, n_experts=experts)
        self.register_buffer("weight", torch.empty(context + 1, experts).uniform_(-1, 1) / (context + 1) ** 0.5)
        first = nn.Sequential(
            nn.Linear(d_in + self.piece, d_ff), nn.SiLU(), nn.Linear(d_ff, d_ff), nn.SiLU(), nn.Linear(d_ff, d_out)
        )
        self.experts = nn.ModuleList([first, *(copy.deepcopy(first) for _ in range(experts - 1))])
        self._only: int | None = None

    def extra_repr(self) -> str:
        """Number of environments and length of a context."""
        environments, context = self.contexts.shape
        return f"environments={environments}, context={context}, split_context={self.split_context}"

    def shares(self, contexts: Float[Tensor, "M d"]) -> Float[Tensor, "M E"]:
        """G: the softmax of the gate, without a gradient."""
        ones = contexts.new_ones(len(contexts), 1)
        return router_logits(torch.cat([contexts.detach(), ones], 1), self.weight.t()).softmax(1)

    def route(self, contexts: Float[Tensor, "M d"]) -> Routing:
        """Which experts answer for contexts."""
        if self._only is not None:
            chosen = torch.full((len(contexts), 1), self._only, device=contexts.device)
            return Routing(contexts.new_ones(len(contexts), 1), chosen, len(self.experts))
        if self.gate is not None:
            routing: Routing = self.gate(contexts)
            return routing
        shares = self.shares(contexts)
        routing = Routing.from_dense((shares > shares.max(1, keepdim=True).values - TIE).to(shares.dtype), probs=shares)
        if not in_backward():
            self.metrics = monitor(routing, None, self.training) | {"cv2": cv_squared(shares.mean(0))}
        return routing

    @contextlib.contextmanager
    def only(self, expert: int) -> Iterator[None]:
        """While it lasts, this expert alone answers for all environments: for the table of every expert's losses.

        Raises:
            PartError: an expert that there is not.
        """
        if not 0 <= expert < len(self.experts):
            raise PartError(f"there are the experts 0 to {len(self.experts) - 1}, not {expert}")
        self._only = expert
        try:
            yield
        finally:
            self._only = None

    def forward(self, x: Float[Tensor, "N D"], environment: Int[Tensor, "N"]) -> Float[Tensor, "N O"]:
        """Outputs for N inputs from known environments.

        Raises:
            PartError: inputs of another width, not one whole number of an environment for each, an environment that there is not.
        """
        if x.dim() != 2 or x.shape[1] != self.d_in:
            raise PartError(f"x is (rows, {self.d_in}), not {tuple(x.shape)}")
        if environment.shape != x.shape[:1] or environment.is_floating_point():
            given = f"{tuple(environment.shape)} of {environment.dtype}"
            raise PartError(f"environment has one whole number for each of the {len(x)} rows, not {given}")
        environments = len(self.contexts)
        if len(x) and not 0 <= int(environment.min()) <= int(environment.max()) < environments:
            seen = f"{int(environment.min())} to {int(environment.max())}"
            raise PartError(f"there are contexts for the environments 0 to {environments - 1}, and the input is from {seen}")
        routing = self.route(self.contexts)
        rows = Routing(routing.weights[environment], routing.experts[environment], len(self.experts))
        seen_by = torch.cat([x, self.contexts[environment].to(x.dtype)], 1)
        return run_experts(seen_by, rows, [self._expert(e) for e in range(len(self.experts))], width=self.d_out)

    def _expert(self, e: int) -> Callable[[Tensor], Tensor]:
        if not self.split_context:
            return self.experts[e]
        start = self.d_in + e * self.piece
        return lambda rows: self.experts[e](torch.cat([rows[:, : self.d_in], rows[:, start : start + self.piece]], 1))


def adapt(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    environments: int,
    steps: int = 200,
    lr: float = 1e-2,
) -> nn.Module:
    """A copy of ``model`` for new environments: their contexts are learnt by gradient, and nothing else is.

    The gate is frozen too, yet a context that moves may move to another expert. A context starts where the loss is lowest, at
    0 or at the mean context of one of the experts' environments (the paper starts all at 0, where the gate knows one expert).

    Args:
        model: has its :class:`MixERLayer` as ``mixer`` and tells by ``environment(x)`` which rows are from which environment; is
            left alone.
        x: inputs from the new environments, numbered from 0.
        y: targets.
        loss_fn: ``loss_fn(model(x), y)`` -> mean loss.
        environments: number of new environments, all of which ``x`` has rows of.
        steps: of Adam.
        lr: learning rate.

    Raises:
        PartError: if an environment has no rows, or there is none, and for another number of targets than inputs.
    """
    if environments < 1 or len(x) != len(y):
        raise PartError(f"at least 1 environment and one target per input are due, got {environments}, {len(x)} and {len(y)}")
    model = copy.deepcopy(model).requires_grad_(False)
    layer: Any = model.mixer
    numbers = model.environment(x)  # type: ignore[operator]
    missing = sorted(set(range(environments)) - set(numbers.tolist()))
    if missing:
        raise PartError(f"the environments {missing} have no rows to adapt to")
    old = layer.contexts.detach()
    with torch.no_grad():
        expert = layer.route(old).experts[:, 0]
        starts = [torch.zeros_like(old[0]), *(old[expert == e].mean(0) for e in range(len(layer.experts)) if (expert == e).any())]
        losses = []
        for start in starts:
            layer.contexts = nn.Parameter(start.repeat(environments, 1))
            output = model(x)
            losses.append(torch.stack([loss_fn(output[numbers == n], y[numbers == n]) for n in range(environments)]))
        best = torch.stack(losses).argmin(0)
    layer.contexts = nn.Parameter(torch.stack(starts)[best])
    optimizer = torch.optim.Adam([layer.contexts], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model


__all__ = ["MixERLayer", "adapt"]
