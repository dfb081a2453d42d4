"""VersatileFFN: one feed-forward reused in width (its slices are experts) and in depth (it is looped).

"VersatileFFN: Achieving Parameter Efficiency in LLMs via Adaptive Wide-and-Deep Reuse" (arXiv 2512.14531). With the
stream x after the mixer, ``F(x) = W2 a(W1 norm(x))``, where ``a(u, g) = act(g) * u``, and f_e the same with the hidden
units U_e alone:

    depth    p = onehot(argmax(d + noise)),  d = Wd x;   x_0 = x,  x_i = x_{i-1} + F(x_{i-1});   x_depth = sum_i p_i x_i
    width    r = We x;   the k largest, w = softmax over those;   x_wide = x + sum_j w_j f_{e_j}(x)
    fusion   n = sum_i i p_i,  lam = (L - n) / L;   y = (1 - lam) x_depth + lam x_wide

Training adds Gumbel noise and takes the gradient of ``softmax((d + noise) / tau)`` for p; it reaches Wd through x_depth
and through lam. Both routers see x without its norm.

What is computed, and what is skipped without changing any number:

- A loop runs for the tokens that need it only: tokens are sorted by their n, loop i runs on the first of them (n >= i).
- In training the loops behind n run without a graph: p's gradient needs their values, and their own gradient is exactly
  0, since p is exactly one-hot. So the forward pass costs L loops and the backward pass n, not L.
- The first loop has computed ``a(W1 norm(x))`` for every hidden unit, so a slice costs its part of W2 alone: a third of
  what it costs anew, ``k / E`` of F.

Differences from the released code: it computes slices anew, in evaluation loops all tokens as often as the one that
needs most, never moves tau, and drops the router logits. Here :meth:`VersatileFFN.advance` moves tau (the paper's
``max(5 * 0.99984^step, 0.1)`` reaches its floor at 96% of the run: the decay is derived from the number of steps), and the
balance loss is the Switch loss over the k choices. A padded token passes unchanged and is in no statistic.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gatework.core.contracts import FeedForward, No, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import build, register
from gatework.core.routing import Routing
from gatework.feedforward.base import hidden_width
from gatework.feedforward.glu import GLU
from gatework.gates.base import router_logits, switch_loss
from gatework.ops.dispatch import dispatch, run_experts
from gatework.ops.estimators import gumbel_softmax


@register("versatile_ffn", paper="versatile_ffn")
class VersatileFFN(FeedForward):
    """One GLU reused: its slices are experts, each token chooses its loops.

    It holds its own norm and residual: it takes the residual stream x (..., D) and returns the new stream. The
    parameters are those of a GLU, a norm, and ``D * (experts + loops)`` for the two routers (a router without a choice, of one
    expert or one loop, is left out; with one loop the slices have no weight, and the layer is ``x + F(x)``).

    Args:
        d_model: width D.
        d_ff: hidden width H, a multiple of ``experts``; None is ``8/3 * d_model`` rounded up to a multiple of 8 and of
            ``experts``.
        experts: E, the number of slices of ``d_ff / experts`` hidden units.
        k: slices that a token uses; with 1 their weights are all 1, and the router learns by the balance loss alone.
        loops: L, the largest number of loops.
        layout: ``contiguous`` gives slice e the units e s to (e + 1) s - 1, ``strided`` the units e, e + E, ...
        balance: weight of the experts' balance loss (Switch form, 1 when balanced); the paper's run has 5e-5.
        tau_start: temperature at step 0.
        tau_floor: temperature from 96% of the run on.
        activation: activation of the gate half.
        path: ``both``; ``wide`` and ``deep`` are the ablations (y = x_wide without loops, y = x_depth without slices); ``fixed``
            is the baseline without routers, all ``loops`` for all tokens (y = x_L).
        init_std: standard deviation of all matrices at the start; None is the paper's 0.02, and for models narrower than 900
            ``0.6 / sqrt(d_model)``, the scale of PyTorch's linear layers: from 0.02 they learn far more slowly.

    Side outputs, each of a router that is there: loss ``balance``; metrics ``loops`` (mean n), ``loop_share`` (L: share of the
    tokens with n = 1 ... L), ``expert_share`` (E: share of the slots), all over real tokens; in evaluation only slots of tokens
    with n < L.

    Call ``gatework.core.advance(model, step, total_steps)`` after each optimizer step: without it the temperature stays at
    ``tau_start``.

    Initialisation: every matrix truncated normal, standard deviation ``init_std``, cut at three times that; norm 1.

    Source: arXiv 2512.14531.

    Raises:
        ValueError: sizes that do not fit, an init_std that is not positive.
        PartError: ``peft`` adapters on its layers, whose weights are used in slices.
    """

    owns_residual = True
    capabilities = FeedForward.capabilities | {
        "compiles": No("tokens are sorted by their number of loops and by expert, so the sizes depend on the data"),
    }

    def __init__(
        self,
        d_model: int,
        d_ff: int | None = None,
        experts: int = 8,
        k: int = 2,
        loops: int = 4,
        layout: Literal["contiguous", "strided"] = "contiguous",
        balance: float = 5e-5,
        tau_start: float = 5.0,
        tau_floor: float = 0.1,
        activation: Any = "silu",
        path: Literal["both", "wide", "deep", "fixed"] = "both",
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if layout not in ("contiguous", "strided"):
            raise ValueError(f"layout must be 'contiguous' or 'strided', got {layout!r}")
        if path not in ("both", "wide", "deep", "fixed"):
            raise ValueError(f"path must be 'both', 'wide', 'deep' or 'fixed', got {path!r}")
        if experts < 1 or loops < 1:
            raise ValueError(f"experts and loops must be at least 1, got {experts} and {loops}")
        if not 1 <= k <= experts:
            raise ValueError(f"k must be between 1 and experts {experts}, got {k}")
        if not 0 < tau_floor <= tau_start:
            raise ValueError(f"temperatures need 0 < tau_floor <= tau_start, got {tau_floor} and {tau_start}")
        d_ff = hidden_width(d_model, d_ff, factor=8 / 3, multiple=math.lcm(8, experts))
        if d_ff % experts:
            raise ValueError(f"d_ff {d_ff} is not divisible by experts {experts}")
        init_std = max(0.02, 0.6 / math.sqrt(d_model)) if init_std is None else init_std
        if not init_std > 0:
            raise ValueError(f"init_std must be positive, got {init_std}")
        self.d_model, self.d_ff, self.experts, self.k, self.loops = d_model, d_ff, experts, k, loops
        self.layout, self.balance, self.path = layout, balance, path
        self.tau_start, self.tau_floor, self.init_std = tau_start, tau_floor, init_std
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.up = nn.Linear(d_model, 2 * d_ff, bias=False)  # H rows of values, then H rows of gates.
        self.down = nn.Linear(d_ff, d_model, bias=False)
        self.activation = build(activation, "activation")
        # With one loop lam is 0: the slices have no say.
        self.has_width = path == "wide" or (path == "both" and loops > 1)
        chooses_loops = path in ("both", "deep") and loops > 1
        self.expert_router = nn.Linear(d_model, experts, bias=False) if self.has_width and experts > 1 else None
        self.depth_router = nn.Linear(d_model, loops, bias=False) if chooses_loops else None
        for layer in (self.up, self.down, self.expert_router, self.depth_router):
            if layer is not None:
                _start(layer, init_std)
        self.tau: Tensor
        self.register_buffer("tau", torch.tensor(float(tau_start)))

    @classmethod
    def from_dense(cls, dense: nn.Module, norm: nn.Module | None = None, **settings: Any) -> VersatileFFN:
        """Start from a trained dense feed-forward and the norm in front of it; ``settings`` are constructor arguments.

        The routers start as usual, all else is a copy. With more than one loop no choice of n gives ``x + F(x)`` back, so the loss
        jumps: train on.

        Args:
            dense: a GLU, or a gated unit with the layers ``gate_proj``, ``up_proj``, ``down_proj`` and the function ``act_fn``, as
                the Llama, Mistral and Qwen models of ``transformers`` have it; without biases.
            norm: an RMS norm (``nn.RMSNorm`` or that of ``transformers``), whose eps is taken over; None starts at 1.

        Raises:
            PartError: for another feed-forward, one with biases, a GLU of order 1, another norm.
        """
        names = ("up", "gate", "down") if isinstance(dense, GLU) else ("up_proj", "gate_proj", "down_proj")
        layers: list[Any] = [getattr(dense, name, None) for name in names]
        plain = all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers)
        if not plain or getattr(dense, "order", 2) != 2:
            raise PartError(f"from_dense takes a gated unit of order 2 without biases, not this {type(dense).__name__}")
        up, gate, down = layers
        eps: Any = None if norm is None else getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if norm is not None and ("RMSNorm" not in type(norm).__name__ or eps is None):
            raise PartError(f"from_dense takes an RMS norm with an eps, not this {type(norm).__name__}")
        own: Any = dense.activation if isinstance(dense, GLU) else dense.act_fn
        activation = build(settings.pop("activation", None) or copy.deepcopy(own), "activation")
        with torch.device("meta"):  # A random start of the large weights would take longer than all else.
            new = cls(up.in_features, up.out_features, activation=nn.Identity(), **settings)
        new.to_empty(device=up.weight.device).to(up.weight.dtype)
        new.activation = activation.to(up.weight.device, up.weight.dtype)
        new.tau = torch.full_like(new.tau, new.tau_start, dtype=torch.promote_types(up.weight.dtype, torch.float32))
        with torch.no_grad():
            for router in (new.expert_router, new.depth_router):
                if router is not None:
                    _start(router, new.init_std)
            new.norm.weight.fill_(1.0)
            new.up.weight.copy_(torch.cat([up.weight, gate.weight]))
            new.down.weight.copy_(down.weight)
            if norm is not None:
                new.norm.load_state_dict(norm.state_dict())
                new.norm.eps = eps
        return new

    def advance(self, step: int, total_steps: int) -> None:
        """Lower the temperature geometrically, so that it reaches its floor at 96% of ``total_steps``."""
        ratio = self.tau_floor / self.tau_start
        self.tau.fill_(max(self.tau_start * ratio ** (step / (0.96 * total_steps)), self.tau_floor))

    def active_parameters(self) -> int:
        """Parameters that one token uses: all, without loops (``path="wide"``) but its slices' share of W1 and W2."""
        count = sum(p.numel() for p in self.parameters())
        if self.path != "wide":
            return count
        sliced = sum(p.numel() for layer in (self.up, self.down) for p in layer.parameters())
        return count - sliced + sliced * self.k // self.experts

    def extra_repr(self) -> str:
        """Shown in the module's ``repr``."""
        shown = f"experts={self.experts}, k={self.k}, loops={self.loops}, layout={self.layout!r}, path={self.path!r}"
        return f"{shown}, balance={self.balance}, tau_start={self.tau_start}, tau_floor={self.tau_floor}, init_std={self.init_std}"

    def forward(
        self,
        x: Float[Tensor, "*B D"],
        mask: Bool[Tensor, "*B"] | None = None,
        noise: Float[Tensor, "*B L"] | None = None,
    ) -> Float[Tensor, "*B D"]:
        """The new stream for the stream ``x``.

        Args:
            x: stream after the mixer.
            mask: True for real tokens; the others pass unchanged.
            noise: Gumbel noise of the depth choice in training; None draws it.

        Raises:
            PartError: another width, a mask or noise of another shape; ``peft`` adapters.
        """
        lead = x.shape[:-1]
        if x.shape[-1:] != (self.d_model,):
            raise PartError(f"this layer was built for width {self.d_model}, not for inputs of shape {tuple(x.shape)}")
        for name, given, wanted in (("mask", mask, lead), ("noise", noise, (*lead, self.loops))):
            if given is not None and given.shape != wanted:
                raise PartError(f"{name} has shape {tuple(wanted)} for these inputs, not {tuple(given.shape)}")
        if any(hasattr(layer, "base_layer") for layer in (self.up, self.down, self.expert_router, self.depth_router)):
            raise PartError("peft cannot adapt versatile_ffn, which uses its weights in slices: leave it out by exclude_modules")
        x_ND = x.reshape(-1, self.d_model)
        r_NE, d_NL = self._router_logits(x_ND)
        p_NL = self._choose_depth(d_NL, None if noise is None else noise.reshape(-1, self.loops))
        depth_N = p_NL.detach().argmax(-1) + 1
        if mask is not None:
            depth_N = depth_N * mask.reshape(-1)

        # R real tokens by falling depth (padding has depth 0): loop i works on the first `running[i - 1]` of them.
        counts = torch.bincount(depth_N, minlength=self.loops + 1).tolist()
        running = [sum(counts[i:]) for i in range(1, self.loops + 1)]
        if not running[0]:
            self.losses, self.metrics = {}, {}
            return x
        order = depth_N.argsort(descending=True, stable=True)[: running[0]]
        x_RD, r_RE, p_RL = (t.index_select(0, order) for t in (x_ND, r_NE, p_NL))

        losses: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if self.path != "wide":
            y_RD, first_RH = self._deep(x_RD, p_RL, running)
        if self.depth_router is not None:
            share = torch.tensor(counts[1:], device=x.device) / running[0]
            metrics = {"loops": (share * torch.arange(1, self.loops + 1, device=x.device)).sum(), "loop_share": share}
        if self.has_width:
            # In evaluation the first rows, those with n = L, are pure depth. In training lam's gradient needs both paths.
            skip = running[-1] if self.path == "both" and not self.training else 0
            chosen = self._choose_experts(r_RE[skip:])
            if self.expert_router is not None:
                slots = torch.bincount(chosen.experts.flatten(), minlength=self.experts).to(r_RE.dtype)
                metrics["expert_share"] = slots / slots.sum().clamp(min=1)
                if self.training:
                    losses = {"balance": self.balance * switch_loss(r_RE.softmax(-1), chosen.experts, None)}
            if self.path == "wide":
                y_RD = x_RD + self._wide(self.norm(x_RD), chosen)
            elif skip < len(x_RD):
                wide_RD = x_RD[skip:] + self._wide_of_hidden(first_RH[skip:], chosen)
                mixed_RD = torch.lerp(y_RD[skip:], wide_RD, self._lam(p_RL[skip:]).to(x.dtype))
                y_RD = torch.cat([y_RD[:skip], mixed_RD]) if skip else mixed_RD
        if not in_backward():
            self.losses, self.metrics = losses, metrics
        return x_ND.index_copy(0, order, y_RD).view_as(x)

    def _router_logits(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Expert (N, E) and depth (N, L) logits of the un-normalised stream, in float32 (float64 stays float64); 0 without a
        router."""
        layers = [layer for layer in (self.expert_router, self.depth_router) if layer is not None]
        weight = torch.cat([layer.weight for layer in layers]) if layers else x_ND.new_empty(0, self.d_model)
        logits = router_logits(x_ND, weight)
        split = 0 if self.expert_router is None else self.experts
        r_NE, d_NL = logits[:, :split], logits[:, split:]
        if self.expert_router is None:
            r_NE = logits.new_zeros(len(x_ND), self.experts)
        if self.depth_router is None:
            d_NL = logits.new_zeros(len(x_ND), self.loops)
        return r_NE, d_NL

    def _choose_depth(self, d_NL: Tensor, noise_NL: Tensor | None) -> Tensor:
        """p (N, L), exactly one-hot; without a router the last loop, for the wide ablation the first."""
        if self.depth_router is None:
            last = 0 if self.path == "wide" else self.loops - 1
            return F.one_hot(torch.full_like(d_NL[:, 0], last, dtype=torch.long), self.loops).to(d_NL.dtype)
        if self.training:
            return gumbel_softmax(d_NL, self.tau, hard=True, noise=noise_NL)
        return F.one_hot(d_NL.argmax(-1), self.loops).to(d_NL.dtype)

    def _lam(self, p_RL: Tensor) -> Tensor:
        """``(L - n) / L`` (R, 1), exact in its value because p is."""
        loops = torch.arange(1, self.loops + 1, device=p_RL.device, dtype=p_RL.dtype)
        return (self.loops - (p_RL * loops).sum(-1, keepdim=True)) / self.loops

    def _hidden(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        hidden: Tensor = self.activation(gate) * value
        return hidden

    def _deep(self, x_RD: Tensor, p_RL: Tensor, running: list[int]) -> tuple[Tensor, Tensor]:
        """``x_depth`` of rows sorted by falling depth, and the hidden units of the first loop."""
        values = self.training and torch.is_grad_enabled() and p_RL.requires_grad
        live, done = x_RD, x_RD[:0]  # `done`: the rows behind their last loop, for p's gradient: values without a graph.
        first, results, stages = None, [], []
        for n, following in zip(running, [*running[1:], 0], strict=True):
            if values:
                with torch.no_grad():
                    done = torch.cat([live[n:], done])
                    if len(done):
                        done = done + self.down(self._hidden(done))
            hidden = self._hidden(live[:n])
            first = hidden if first is None else first
            live = live[:n] + self.down(hidden)
            results.append(live[following:])
            if values:
                stages.append(torch.cat([live.detach(), done]))
        assert first is not None
        results.reverse()  # The rows with n = L come first.
        out: Tensor = _Mixture.apply(p_RL, len(stages), *stages, *results) if values else torch.cat(results)
        return out, first

    def _choose_experts(self, r_RE: Tensor) -> Routing:
        """The k largest logits, of equal ones the lower expert, with softmax weights over those k."""
        experts = r_RE.argsort(dim=-1, descending=True, stable=True)[:, : self.k]
        return Routing(r_RE.gather(1, experts).softmax(-1), experts, self.experts)

    def _wide_of_hidden(self, hidden_RH: Tensor, chosen: Routing) -> Tensor:
        """``sum_j w_j f_{e_j}(x)`` from the hidden units that the first loop has computed."""
        plan = dispatch(chosen)
        size = self.d_ff // self.experts
        if self.layout == "contiguous":
            slices = hidden_RH.unflatten(1, (self.experts, size))
        else:
            slices = hidden_RH.unflatten(1, (size, self.experts)).transpose(1, 2)
        expert = torch.arange(self.experts, device=hidden_RH.device)
        owner = expert.repeat_interleave(torch.tensor(plan.counts, device=hidden_RH.device), output_size=plan.n_rows)
        rows = slices.reshape(-1, size).index_select(0, plan.tokens * self.experts + owner)
        parts = zip(rows.split(plan.counts), self._down_slices(), strict=True)
        return plan.combine(torch.cat([F.linear(part, weight) for part, weight in parts if len(part)]))

    def _wide(self, normed_RD: Tensor, chosen: Routing) -> Tensor:
        """``sum_j w_j f_{e_j}(x)`` from the start."""

        def slice_of(up: Tensor, down: Tensor) -> Callable[[Tensor], Tensor]:
            def run(rows: Tensor) -> Tensor:
                value, gate = F.linear(rows, up).chunk(2, dim=-1)
                return F.linear(self.activation(gate) * value, down)

            return run

        parts = zip(self._up_slices(), self._down_slices(), strict=True)
        return run_experts(normed_RD, chosen, [slice_of(up, down) for up, down in parts])

    def _up_slices(self) -> tuple[Tensor, ...]:
        """Each expert's rows of W1, (2 s, D): its values, then its gates."""
        if self.layout == "contiguous":
            split = self.up.weight.reshape(2, self.experts, -1, self.d_model).transpose(0, 1)
        else:
            split = self.up.weight.reshape(2, -1, self.experts, self.d_model).permute(2, 0, 1, 3)
        return split.flatten(1, 2).unbind()

    def _down_slices(self) -> tuple[Tensor, ...]:
        """Each expert's columns of W2, (D, s)."""
        if self.layout == "contiguous":
            return self.down.weight.reshape(self.d_model, self.experts, -1).unbind(1)
        return self.down.weight.reshape(self.d_model, -1, self.experts).unbind(2)


def _start(layer: nn.Linear, std: float) -> None:
    nn.init.trunc_normal_(layer.weight, std=std, a=-3 * std, b=3 * std)


class _Mixture(torch.autograd.Function):
    """``sum_i p_i x_i`` for an exactly one-hot p and rows sorted by it.

    Takes p (R, L), all x_i without a graph (for p's gradient), and the chosen rows of each x_i, last loop first; the
    gradient of all other rows is exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, n_stages: int, *tensors: Tensor) -> Tensor:
        ctx.sizes = [len(chosen) for chosen in tensors[n_stages:]]
        ctx.dtype = p.dtype
        ctx.save_for_backward(*tensors[:n_stages])
        return torch.cat(tensors[n_stages:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stages = ctx.saved_tensors
        grad_p = torch.stack([(grad * stage).sum(-1) for stage in stages], dim=1).to(ctx.dtype)
        return grad_p, None, *([None] * len(stages)), *grad.split(ctx.sizes)
