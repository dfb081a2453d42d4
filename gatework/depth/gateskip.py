"""``GateSkip``: sigmoid gates on every residual branch; tokens whose gate is low skip the branch.

Laitenberger et al., What Layers When: Learning to Skip Compute in LLMs with Residual Gates, 2025, arXiv 2510.13876; official code:
Thiggel/GateSkip. For each branch (the mixer's and the feed-forward's of every block), with u the branch's normed input, h the
stream, sg the stop-gradient:

    g_t = sigmoid(W sg(u_t) + b)                  a vector of d_model gates, or one (scalar)
    a_t = mean over channels of g_t               the token's importance
    h_t <- h_t + g_t * branch(u)_t    if a_t >= tau,    h_t <- h_t    otherwise
    L = task loss + lam_s mean(g^2) + lam_e mean(H(g))      H binary entropy; means over branches, tokens and channels

tau is the q-quantile (linear interpolation) of the importances of the batch's real tokens in this branch, q = 1 - kept budget.

Differences.

- *Thresholds.* A quantile over the batch sees the future and couples the rows, and a single token has none. It is used in
  training only. There each branch keeps a running table of 101 quantiles of its importance, and outside training tau is read
  from that table for whatever budget is set. So outside training the model is causal, independent of the rest of the batch, and
  token by token equals whole. Equal tokens have equal importances where a branch sees little context (in the first mixer, all
  tokens of one kind), and a threshold beside such a value would send all of them the other way after the smallest change: the
  table holds the middle between the least kept and the largest skipped importance, which decides alike about its own batch.
- *Ties.* The paper skips ``a_t <= tau``; here ``a_t < tau``. They differ for importances equal to tau only, and saturated gates
  (all exactly 1) then skip nothing instead of everything.
- *Keys and values of skipped tokens* are computed from the token's own stream (``dense_kv``, the compute-saving path of the
  official code): the mixer sees every token and computes outputs for the kept ones. The masked path of that code, which copies
  the previous layer's keys and values, fits no other mixer than attention and is left out.
- *Padding* is never kept (the official code never skips it); it enters no quantile, loss or metric either way. End-of-text
  tokens, which that code excludes too, are tokens like others here: a depth policy does not see token ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import No, State, in_backward
from gatework.core.registry import register
from gatework.depth.base import Block, BlockPolicy

#: Quantiles in a branch's table, and the tokens over which it averages: enough to know a quantile within a percent, few enough to
#: follow gates that move between steps by more than the tokens of a batch differ.
QUANTILES = 101
TOKENS = 4096
#: Above this share of kept tokens gathering costs more than it saves: the branch runs for all and the rest is masked.
DENSE_ABOVE = 0.9

BRANCHES = ("mixer", "feedforward")


class _BranchGate(nn.Module):
    """Gate logits of one branch."""

    def __init__(self, d_model: int, gate_form: str) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_model, d_model) if gate_form == "mlp" else None
        self.out = nn.Linear(d_model, 1 if gate_form == "scalar" else d_model)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, 5.0)

    def forward(self, u: Tensor) -> Tensor:
        if self.hidden is not None:
            u = self.hidden(u).relu()
        logits: Tensor = self.out(u)
        return logits


class _Pass:
    """What one forward pass collects over its branches: losses, quantile tables, metrics."""

    def __init__(self) -> None:
        self.sparsity: list[Tensor] = []
        self.entropy: list[Tensor] = []
        self.tables: list[Tensor] = []
        self.kept: list[Tensor] = []
        self.gates: list[Tensor] = []
        self.tokens = 0

    def extend(self, more: _Pass) -> None:
        """Add what another part of the pass has collected."""
        for name in ("sparsity", "entropy", "tables", "kept", "gates"):
            getattr(self, name).extend(getattr(more, name))
        self.tokens = max(self.tokens, more.tokens)


@register("gateskip", paper="gateskip")
class GateSkip(BlockPolicy):
    """Residual gates; tokens with a low gate skip the branch.

    Args:
        blocks: the layers, run first to last.
        d_model: width of the stream.
        budget: share of its tokens that each branch computes, in (0, 1]; 1 gates without skipping. :meth:`set_budget` changes it
            at any time, for all branches or some.
        gate_form: ``vector``, one gate per channel (d_model^2 weights and as many multiply-adds per token and branch); ``scalar``,
            one per token (d_model); ``mlp``, a vector from a hidden ReLU layer of d_model units.
        shared: one mixer gate and one feed-forward gate for all layers, instead of each layer's own.
        lam_s: weight of the sparsity loss, which pushes gates down.
        lam_e: weight of the entropy loss, which pushes gates to 0 or 1.
        sparsity: ``l2`` mean g^2, ``l1`` mean g, ``kl`` the divergence of Bernoulli(g) from Bernoulli(budget).
        warmup: share of training over which the kept share falls linearly from 1 to ``budget``; 0 skips from the first step. It
            moves in :meth:`advance`; a training loop that never calls it trains without skipping while ``warmup`` > 0.

    The gate's input is detached: the trunk gets gradients through ``g * branch`` only. A feed-forward that owns its norm is gated
    from the RMS-normed stream (no gain), and its branch is what it adds.

    Initialisation: b = 5 (g = 0.993), W normal with standard deviation 0.01; the hidden layer of ``mlp`` is that of ``nn.Linear``.

    What is skipped is not computed, in training too: the mixer gets ``keep`` (state, keys and values see every token, so decoding
    state is complete), the feed-forward gets the kept tokens only. Outside training a branch skips by its stored threshold; before
    any training or :meth:`calibrating` there is none and nothing is skipped. In training the quantile couples the batch's tokens.

    Losses (training): ``sparsity``, ``entropy``. Metrics: ``kept_mixer``, ``kept_feedforward`` (share of real tokens kept) and
    ``gate_mixer``, ``gate_feedforward`` (mean gate), each with one value per layer.

    Raises:
        ValueError: for a budget outside (0, 1], a warmup outside [0, 1], a negative loss weight, an unknown form.
    """

    capabilities = BlockPolicy.capabilities | {
        "compiles": No("how many tokens are gathered depends on the data"),
    }

    # Importances crowd near 1, where bfloat16 and float16 cannot tell them apart.
    exact = ("budgets", "progress", "quantiles")

    budgets: Tensor
    progress: Tensor
    quantiles: Tensor
    passes: Tensor

    def __init__(
        self,
        blocks: list[Block] | nn.ModuleList,
        d_model: int,
        budget: float = 0.75,
        gate_form: Literal["vector", "scalar", "mlp"] = "vector",
        shared: bool = False,
        lam_s: float = 0.01,
        lam_e: float = 0.01,
        sparsity: Literal["l2", "l1", "kl"] = "l2",
        warmup: float = 0.5,
    ) -> None:
        super().__init__(blocks)
        if gate_form not in ("vector", "scalar", "mlp"):
            raise ValueError(f"gate_form must be vector, scalar or mlp, got {gate_form!r}")
        if sparsity not in ("l2", "l1", "kl"):
            raise ValueError(f"sparsity must be l2, l1 or kl, got {sparsity!r}")
        if lam_s < 0 or lam_e < 0:
            raise ValueError(f"loss weights must be at least 0, got lam_s {lam_s} and lam_e {lam_e}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], got {warmup}")
        self.d_model, self.gate_form, self.sparsity = d_model, gate_form, sparsity
        self.lam_s, self.lam_e, self.warmup = lam_s, lam_e, warmup
        layers = len(self.blocks)
        self.gates = nn.ModuleList(
            nn.ModuleDict({branch: _BranchGate(d_model, gate_form) for branch in BRANCHES}) for _ in range(1 if shared else layers)
        )
        self._calibrating = False
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)  # As `exact` keeps them.
        self.register_buffer("budgets", torch.ones(layers, 2, dtype=exact))
        self.register_buffer("progress", torch.tensor(0.0 if warmup else 1.0, dtype=exact))
        self.register_buffer("quantiles", torch.full((layers, 2, QUANTILES), -torch.inf, dtype=exact))
        self.register_buffer("passes", torch.tensor(0))
        self.set_budget(budget)

    def extra_repr(self) -> str:
        """The settings."""
        shown = f"gate_form={self.gate_form}, sparsity={self.sparsity}, lam_s={self.lam_s}, lam_e={self.lam_e}"
        shown = f"{shown}, warmup={self.warmup}"
        if self.budgets.is_meta:
            return shown
        budgets = [round(budget, 6) for budget in self.budgets.flatten().tolist()]
        return f"budget={budgets[0] if len(set(budgets)) == 1 else budgets}, {shown}"

    def set_budget(self, budget: float, layer: int | None = None, branch: Literal["mixer", "feedforward"] | None = None) -> None:
        """Set the share of tokens kept, of one layer or all, one branch or both; the thresholds follow."""
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be in (0, 1], got {budget}")
        if layer is not None and not 0 <= layer < len(self.blocks):
            raise ValueError(f"layer must be in 0 .. {len(self.blocks) - 1}, got {layer}")
        if branch is not None and branch not in BRANCHES:
            raise ValueError(f"branch must be mixer or feedforward, got {branch!r}")
        layers = slice(None) if layer is None else layer
        branches = slice(None) if branch is None else BRANCHES.index(branch)
        self.budgets[layers, branches] = budget

    def thresholds(self) -> Float[Tensor, "L 2"]:
        """Importances below which a token skips, per layer and (mixer, feed-forward); -inf where nothing is skipped."""
        place = (1 - self.budgets) * (QUANTILES - 1)
        low = place.floor().long().clamp(0, QUANTILES - 2)
        below, above = (self.quantiles.gather(2, (low + i)[..., None])[..., 0] for i in (0, 1))
        thresholds = below + (place - low) * (above - below)
        return torch.where((self.budgets < 1) & below.isfinite(), thresholds, -torch.inf)

    @contextlib.contextmanager
    def calibrating(self) -> Iterator[None]:
        """Learn the quantile tables anew from the forward passes inside the block (of the model around, in eval mode too).

        Each pass skips by its own quantiles, at the budgets that are set, and counts alike:

            with torch.no_grad(), model.depth.calibrating():
                for tokens in batches:
                    model(tokens)
        """
        self.passes.zero_()
        self._calibrating = True
        try:
            yield
        finally:
            self._calibrating = False

    def advance(self, step: int, total_steps: int) -> None:
        """Move the kept share from 1 towards the budget."""
        reach = self.warmup * total_steps
        self.progress.fill_(min(1.0, step / reach) if reach else 1.0)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the residual stream through all blocks, each branch for the tokens it keeps."""
        states = self.block_states(state)
        by_quantile = self.training or self._calibrating
        if by_quantile:
            limits = (1 - self.budgets) * (self.progress if self.training else 1.0)
        else:
            limits = self.thresholds()
        said = _Pass()
        for layer, (block_state, limit) in enumerate(zip(states, limits.tolist(), strict=True)):
            x, more = self.run(partial(self._layer, layer, limit, by_quantile), x, block_state, mask, segments)
            said.extend(more)
        self._report(said, by_quantile)
        return x

    def _layer(
        self, layer: int, limit: list[float], by_quantile: bool, x: Tensor, state: Any, mask: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, _Pass]:
        """The stream after a block, and what its branches have to say."""
        said = _Pass()
        block: Any = self.blocks[layer]
        gates: Any = self.gates[layer % len(self.gates)]
        targets = self.budgets[layer]
        u = block.mixer_norm(x)
        g, keep = self._gate(gates["mixer"], u, mask, limit[0], targets[0], by_quantile, said)
        x = _mix(block, x, u, g, keep, state, mask, segments)
        norm = block.feedforward_norm
        u = F.rms_norm(x, x.shape[-1:], eps=1e-6) if norm is None else norm(x)
        g, keep = self._gate(gates["feedforward"], u, mask, limit[1], targets[1], by_quantile, said)
        return _transform(block, x, u, g, keep, mask), said

    def _gate(
        self, gate: _BranchGate, u: Tensor, mask: Tensor | None, limit: float, budget: Tensor, by_quantile: bool, said: _Pass
    ) -> tuple[Tensor, Tensor | None]:
        """Gates (B, T, D or 1) and which tokens to keep (B, T); None keeps all. ``limit`` is the share to skip, or tau."""
        logits = gate(u.detach())
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        g = logits.sigmoid()
        importance = g.detach().mean(-1)
        real = importance.flatten() if mask is None else importance[mask]
        if self.training:
            z = logits if mask is None else logits[mask]
            said.sparsity.append(self._sparsity(z, budget))
            said.entropy.append(_entropy(z).mean() if len(real) else z.sum())
        keep = None
        if not by_quantile:
            if limit > -torch.inf:
                keep = importance >= limit
        elif len(real):
            steps = torch.linspace(0, 1, QUANTILES, device=real.device, dtype=real.dtype)
            tau = torch.quantile(real, torch.cat([steps, steps.new_tensor([limit])]))
            said.tables.append(_between(real, tau[:-1]))
            said.tokens = len(real)
            if limit > 0:
                keep = importance >= tau[-1]
        if keep is not None and mask is not None:
            keep = keep & mask
        said.kept.append(real.new_ones(()) if keep is None else keep.sum() / max(len(real), 1))
        said.gates.append(real.mean() if len(real) else real.new_ones(()))
        return g, keep

    def _sparsity(self, logits: Tensor, budget: Tensor) -> Tensor:
        g = logits.sigmoid()
        if not g.numel():
            return g.sum()
        if self.sparsity == "l2":
            return g.square().mean()
        if self.sparsity == "l1":
            return g.mean()
        target = budget.clamp(1e-6, 1 - 1e-6)
        return (-_entropy(logits) - g * target.log() - (1 - g) * (1 - target).log()).mean()

    def _report(self, said: _Pass, by_quantile: bool) -> None:
        losses = {}
        if self.training:
            weighted = {"sparsity": (self.lam_s, said.sparsity), "entropy": (self.lam_e, said.entropy)}
            losses = {name: weight * torch.stack(parts).mean() for name, (weight, parts) in weighted.items() if weight}
        if in_backward():
            return
        self.losses = losses
        kept, gates = (torch.stack(values).view(-1, 2) for values in (said.kept, said.gates))
        self.metrics = {
            "kept_mixer": kept[:, 0], "kept_feedforward": kept[:, 1], "gate_mixer": gates[:, 0], "gate_feedforward": gates[:, 1],
        }
        if by_quantile and said.tables:
            with torch.no_grad():
                tables = torch.stack(said.tables).view_as(self.quantiles).to(self.quantiles.dtype)
                rate = 1 / (self.passes + 1)
                if not self._calibrating:
                    rate = rate.clamp(min=min(1.0, said.tokens / TOKENS))
                self.quantiles.copy_(torch.where(self.passes == 0, tables, self.quantiles + rate * (tables - self.quantiles)))
                self.passes.add_(1)


def _between(importance: Tensor, tau: Tensor) -> Tensor:
    """Thresholds that decide as ``tau`` does, halfway between the least kept and the largest skipped importance."""
    ordered = importance.sort().values
    first = torch.searchsorted(ordered, tau).clamp(max=len(ordered) - 1)
    kept, skipped = ordered[first], ordered[(first - 1).clamp(min=0)]
    middle = (kept + skipped) / 2
    return torch.where(middle > skipped, middle, kept)


def _entropy(logits: Tensor) -> Tensor:
    """Binary entropy of sigmoid(logits), with a finite gradient at any logit."""
    size = logits.abs()
    return F.softplus(-size) + size * (-size).sigmoid()


def _few(keep: Tensor) -> tuple[int, bool]:
    """How many are kept, and whether they are few enough to be gathered."""
    kept = int(keep.sum())
    return kept, kept <= DENSE_ABOVE * keep.numel()


def _mix(block: Any, x: Tensor, u: Tensor, g: Tensor, keep: Tensor | None, state: Any, mask: Any, segments: Any) -> Tensor:
    """The stream after the gated mixer branch."""
    if keep is None:
        return _add(x, g, block.mixer(u, state=state, mask=mask, segments=segments))
    kept, few = _few(keep)
    if few:
        if not kept and state is None:
            return x
        # Outputs of skipped tokens are exactly 0.
        return _add(x, g, block.mixer(u, state=state, mask=mask, segments=segments, keep=keep))
    return torch.where(keep[..., None], _add(x, g, block.mixer(u, state=state, mask=mask, segments=segments)), x)


def _transform(block: Any, x: Tensor, u: Tensor, g: Tensor, keep: Tensor | None, mask: Tensor | None) -> Tensor:
    """The stream after the gated feed-forward branch."""
    owns = block.feedforward_norm is None

    def branch(x: Tensor, u: Tensor, mask: Tensor | None) -> Tensor:
        y: Tensor = block.feedforward(x, mask=mask) - x if owns else block.feedforward(u, mask=mask)
        return y

    if keep is None:
        return _add(x, g, branch(x, u, mask))
    kept, few = _few(keep)
    if not kept:
        return x
    if not few:
        # The mask keeps skipped tokens out of routing and statistics, as gathering does.
        return torch.where(keep[..., None], _add(x, g, branch(x, u, keep)), x)
    rows = keep.flatten().nonzero()[:, 0]
    x_N, u_N, g_N = (value.flatten(0, 1).index_select(0, rows) for value in (x, u, g))
    return x.flatten(0, 1).index_copy(0, rows, _add(x_N, g_N, branch(x_N, u_N, None))).view_as(x)


def _add(x: Tensor, g: Tensor, y: Tensor) -> Tensor:
    """``x + g * y`` in the dtype of the stream."""
    return torch.addcmul(x, g.to(x.dtype), y.to(x.dtype))
