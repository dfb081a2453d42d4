"""``BlockSparsityGate``: predicts from a batch which blocks of a model's weights to use, and runs the model with those.

Chen et al., Efficient Personalized Federated Learning via Sparse Model-Adaptation, ICML 2023, arXiv 2305.02776 (pFedGate).
Every parameter tensor is flattened and cut into consecutive blocks of ceil(n / min(n, S)) elements, the last one shorter; n_b is
the size of block b. One small net per client says how much each block is worth to it:

    a = mean over the batch of sigmoid(batch_norm(W flatten(switch_norm(x)))),    clipped below at a_min = min(max(1/S, 0.1), s)
    weights used: theta_b * a_b * mask_b

``mask`` keeps about a share s of the parameters, chosen separately among linear layers and among all others, with n = sum of
the n_b of that group:

- ``blocks``: the first block of every tensor is kept. Of the others, in descending value v_b = round(10 (a_b + n_b / n) / 2)
  (ties: lowest index first), each is taken that still fits into a capacity of round(n (s - a_min)), the rest is left out.
- ``fractions``: of every block the leading share a_min, and what is left of n s goes to the blocks in descending a_b / n_b, the
  last one in part; of each block the leading elements are kept.

The gradient reaches theta (times the gate: exactly 0 where masked) and the gate net.

Differences to the released code: its knapsack of ``blocks`` takes n over the blocks in the knapsack only, which leaves a part
of the budget unused (0.44 of the weights at s = 0.5, S = 5); it multiplies the weights in ``fractions`` with the share kept,
we with a_b; its default takes the scores before the clip as multipliers, we take a_b, as the paper has it; ties fall as its
sort leaves them. Its switch norm has a scale and a shift, its linear map a bias, which the linear map and the batch norm behind
make useless; they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from gatework.core.contracts import Component, No, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.gates.base import router_logits
from gatework.ops.precision import without_autocast


@dataclass(frozen=True)
class _Tensor:
    """One parameter of the model: its blocks are begin .. end - 1, of ``size`` elements each but the last."""

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    size: int
    linear: bool


@register("block_sparsity", paper="pfedgate")
class BlockSparsityGate(Component):
    """Gates on blocks of another model's weights, chosen by the batch.

    ``forward(model, x)`` is the model's output with gated weights.
    The gate knows the model's parameters by name and shape and owns none of them: one gate per client, one model for all.
    Rows of linear layers and output channels of convolutions (of one group) whose weights are masked are not computed; they
    hold the bias.

    The gates are a batch's, so an example's output depends on the others of its batch. For use after training take those of a
    client: ``scores = gate.eval().scores(all of its inputs)``, then ``gate(model, x, scores)``. A batch of one example is
    normalised by the running statistics, in training too.

    Args:
        model: whose parameters are gated; only names and shapes are kept.
        input_shape: of one input, (d,), (channels, length) or (channels, height, width).
        budget: s, the share of the parameters that is used, in (0, 1]; the blocks that are always kept come to 1 / splits of
            the parameters at least.
        splits: S, blocks per tensor, at least 2.
        selection: whole ``blocks`` or ``fractions`` of them.
        size_prior: whether the size of a block counts for its value; without, v_b = round(10 a_b).
        transform: multiply the weights with the sigmoids of a second net (a linear map and a batch norm of its own) instead of
            with a; the gradient then reaches the first through the mask, straight: mask * (1 + a - stop(a)).

    Initialisation: the linear map is PyTorch's, the batch norm starts as the identity, so that every a is about 1/2.

    Side outputs: metric ``density``, the share of the parameters that is used.

    Raises:
        ValueError: for a model without parameters or arguments outside these ranges.
    """

    family = "gate"
    capabilities = Component.capabilities | {
        "compiles": No("which rows are computed is data"),
        "batch_invariant": No("the gates are means over the batch"),
    }

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        budget: float = 0.5,
        splits: int = 5,
        selection: Literal["blocks", "fractions"] = "blocks",
        size_prior: bool = True,
        transform: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < budget <= 1 or splits < 2:
            raise ValueError(f"budget is a share in (0, 1] and splits at least 2, got {budget} and {splits}")
        if selection not in ("blocks", "fractions"):
            raise ValueError(f"selection must be 'blocks' or 'fractions', got {selection!r}")
        if not input_shape or min(input_shape) < 1:
            raise ValueError(f"input_shape is the shape of one input, such as (1, 8, 8), not {tuple(input_shape)}")
        self.budget, self.splits, self.selection, self.size_prior = budget, splits, selection, size_prior
        self.input_shape, self.least = tuple(input_shape), min(max(1 / splits, 0.1), budget)
        self.tensors, sizes = _cut(model, splits)
        if not sizes:
            raise ValueError("the model has no parameters")
        self.register_buffer("sizes", torch.tensor(sizes), persistent=False)
        channels = input_shape[0] if len(input_shape) > 1 else 1
        self.norm = _SwitchNorm(channels)
        width = math.prod(input_shape)
        self.heads = nn.ModuleList(_Head(width, len(sizes)) for _ in range(1 + transform))

    sizes: Tensor

    def extra_repr(self) -> str:
        """Blocks, budget and how blocks are chosen."""
        shown = f"blocks={len(self.sizes)}, budget={self.budget}, splits={self.splits}, selection={self.selection}"
        return f"{shown}, size_prior={self.size_prior}"

    def scores(self, x: Float[Tensor, "B *shape"]) -> Float[Tensor, "heads blocks"]:
        """The batch's a, clipped; with ``transform`` also its multipliers, in a second row. At least float32.

        Raises:
            PartError: inputs of another shape, or none.
        """
        if tuple(x.shape[1:]) != self.input_shape or not len(x):
            raise PartError(f"this gate was built for batches of inputs of shape {self.input_shape}, not {tuple(x.shape)}")
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        with without_autocast(x.device):
            x = self.norm(x.reshape(len(x), self.norm.channels, -1)).flatten(1)
            means = [torch.sigmoid(head(x)).mean(0) for head in self.heads]
        return torch.stack([means[0].clamp(min=self.least), *means[1:]])

    @torch.no_grad()
    def select(self, scores: Float[Tensor, "heads blocks"]) -> Int[Tensor, "blocks"]:
        """How many elements of each block are kept, leading ones first: in ``blocks`` all or none.

        Raises:
            PartError: scores of another gate.
        """
        if scores.shape != (len(self.heads), len(self.sizes)):
            wanted = (len(self.heads), len(self.sizes))
            raise PartError(f"this gate's scores have shape {wanted} (heads, blocks), not {tuple(scores.shape)}")
        # Scores that are not numbers choose nothing, and make weights that are not: the loss will say so.
        a, kept = scores[0].double().nan_to_num().tolist(), [0] * len(self.sizes)
        sizes = self.sizes.tolist()
        for linear in (True, False):
            tensors = [t for t in self.tensors if t.linear == linear]
            group = [b for t in tensors for b in range(t.begin, t.end)]
            total = sum(sizes[b] for b in group)
            if self.selection == "fractions":
                shares = _fractions({b: a[b] for b in group}, sizes, self.least, total * (self.budget - self.least))
                for b, share in shares.items():
                    kept[b] = round(sizes[b] * share)
                continue
            first = {t.begin for t in tensors}
            worth = {b: (a[b] + sizes[b] / total) / 2 if self.size_prior else a[b] for b in group if b not in first}
            capacity = round(total * (self.budget - self.least))
            chosen = _knapsack({b: round(10 * value) for b, value in worth.items()}, sizes, capacity)
            for b in first | chosen:
                kept[b] = sizes[b]
        return torch.tensor(kept, device=self.sizes.device)

    def weights(self, model: nn.Module, scores: Float[Tensor, "heads blocks"]) -> dict[str, Tensor]:
        """The model's parameters as ``scores`` gate them, by name.

        Raises:
            PartError: the model's parameters are not those that the gate was built for; scores of another gate.
        """
        return self._gated(model, scores)[0]

    def _gated(self, model: nn.Module, scores: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The gated parameters, and which rows of them are not masked altogether (of those that have masked ones)."""
        given = {name: p for name, p in model.named_parameters() if p.numel()}
        if {t.name: t.shape for t in self.tensors} != {name: tuple(p.shape) for name, p in given.items()}:
            raise PartError("the model's parameters are not those of the model that the gate was built for")
        kept, a = self.select(scores), scores[0]
        factors = a if len(scores) == 1 else scores[1] * (1 + a - a.detach())
        gated, alive = {}, {}
        for t in self.tensors:
            theta = given[t.name]
            inside = torch.arange(theta.numel(), device=kept.device) % t.size < _spread(kept, t, theta.numel())
            factor = _spread(factors, t, theta.numel()) * inside
            gated[t.name] = theta * factor.to(theta.dtype).view(t.shape)
            rows = inside.view(t.shape[0] if t.shape else 1, -1).any(1)
            if len(t.shape) > 1 and not rows.all():
                rows[0] |= ~rows.any()  # A convolution without an output channel is none: one row of zeros stays.
                alive[t.name] = rows.nonzero().squeeze(1)
        if not in_backward():
            self.metrics = {"density": kept.sum() / self.sizes.sum()}
        return gated, alive

    def forward(
        self, model: nn.Module, x: Float[Tensor, "B *shape"], scores: Float[Tensor, "heads blocks"] | None = None
    ) -> Any:
        """The model's output for ``x`` with gated weights; the gates are those of ``x``, or of ``scores`` where given."""
        gated, alive = self._gated(model, self.scores(x) if scores is None else scores)
        with _LeaveOutRows({id(gated[name]): rows for name, rows in alive.items()}):
            return functional_call(model, gated, (x,))

    def report(self, scores: Float[Tensor, "heads blocks"]) -> dict[str, float]:
        """The share of the elements that are kept: of each parameter, by name, and of all (``total``)."""
        kept = self.select(scores)
        shares = {t.name: float(kept[t.begin : t.end].sum() / self.sizes[t.begin : t.end].sum()) for t in self.tensors}
        return shares | {"total": float(kept.sum() / self.sizes.sum())}


def _cut(model: nn.Module, splits: int) -> tuple[list[_Tensor], list[int]]:
    """The parameters with their blocks, and the blocks' sizes."""
    tensors: list[_Tensor] = []
    sizes: list[int] = []
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        n = p.numel()
        if not n:
            continue
        size = math.ceil(n / min(n, splits))
        begin, count = len(sizes), math.ceil(n / size)
        sizes += [size] * (count - 1) + [n - size * (count - 1)]
        tensors.append(_Tensor(name, tuple(p.shape), begin, len(sizes), size, isinstance(owner, nn.Linear)))
    return tensors, sizes


def _spread(values: Tensor, t: _Tensor, n: int) -> Tensor:
    """A tensor's blocks' values, one per element (n,)."""
    return values[t.begin : t.end].repeat_interleave(t.size)[:n]


def _knapsack(values: Mapping[int, int], sizes: list[int], capacity: int) -> set[int]:
    """Greedy: in descending value, lowest index first, each that still fits."""
    chosen = set()
    for b in sorted(values, key=lambda b: (-values[b], b)):
        if sizes[b] <= capacity:
            capacity -= sizes[b]
            chosen.add(b)
    return chosen


def _fractions(values: Mapping[int, float], sizes: list[int], least: float, capacity: float) -> dict[int, float]:
    """The share kept of each block: ``least``, and more by value per element, lowest index first."""
    shares = dict.fromkeys(values, least)
    for b in sorted(values, key=lambda b: (-values[b] / sizes[b], b)):
        more = min(sizes[b] * (1 - least), capacity)
        shares[b] += more / sizes[b]
        capacity -= more
    return shares


class _SwitchNorm(nn.Module):
    """Luo et al., Differentiable Learning-to-Normalize via Switchable Normalization, ICLR 2019, for (B, C, L).

    Mean and variance are learned mixtures (softmax of three numbers each) of those of the instance, the layer and the batch;
    in evaluation, and for a batch of one, the batch's are running ones.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, momentum: float = 0.9, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels, self.momentum, self.eps = channels, momentum, eps
        self.mean_weight, self.var_weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1))
        self.register_buffer("running_var", torch.zeros(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean_in, var_in = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=min(1, x.shape[-1] - 1))
        square = var_in + mean_in**2
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = square.mean(1, keepdim=True) - mean_ln**2
        mean_bn, var_bn = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        if self.training and len(x) > 1:
            mean_bn = mean_in.mean(0, keepdim=True)
            var_bn = square.mean(0, keepdim=True) - mean_bn**2
            if not in_backward():
                with torch.no_grad():
                    self.running_mean.lerp_(mean_bn.to(self.running_mean.dtype), 1 - self.momentum)
                    self.running_var.lerp_(var_bn.to(self.running_var.dtype), 1 - self.momentum)
        mean_weight, var_weight = self.mean_weight.to(x.dtype).softmax(0), self.var_weight.to(x.dtype).softmax(0)
        mean = mean_weight[0] * mean_in + mean_weight[1] * mean_ln + mean_weight[2] * mean_bn
        var = var_weight[0] * var_in + var_weight[1] * var_ln + var_weight[2] * var_bn
        return (x - mean) / (var + self.eps).sqrt()


class _Head(nn.Module):
    """A linear map and a batch norm: logits per example and block."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        self.scale, self.shift = nn.Parameter(torch.ones(blocks)), nn.Parameter(torch.zeros(blocks))
        self.register_buffer("running_mean", torch.zeros(blocks))
        self.register_buffer("running_var", torch.ones(blocks))

    def forward(self, x: Tensor) -> Tensor:
        logits = router_logits(x, self.weight)
        mean, var = self.running_mean.to(logits.dtype), self.running_var.to(logits.dtype)
        if self.training and len(x) > 1:
            mean, var = logits.mean(0), logits.var(0, correction=0)
            if not in_backward():
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), 0.1)
                    self.running_var.lerp_((var * len(x) / (len(x) - 1)).to(self.running_var.dtype), 0.1)
        scale, shift = self.scale.to(logits.dtype), self.shift.to(logits.dtype)
        return (logits - mean) * (var + 1e-5).rsqrt() * scale + shift


class _LeaveOutRows(TorchFunctionMode):
    """Linear maps and convolutions with these weights (by ``id``) compute these rows only; the others hold the bias."""

    PRODUCTS: tuple[Callable[..., Any], ...] = (F.linear, F.conv1d, F.conv2d, F.conv3d)

    def __init__(self, rows: dict[int, Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.PRODUCTS or kwargs or len(args) < 2:
            return func(*args, **kwargs)
        x, weight, bias, rest = args[0], args[1], args[2] if len(args) > 2 else None, args[3:]
        rows = self.rows.get(id(weight))
        if rows is None or (len(rest) > 3 and rest[3] != 1):  # Groups tie rows to a part of the inputs.
            return func(*args)
        part = func(x, weight[rows], None if bias is None else bias[rows], *rest)
        axis = -1 if func is F.linear else part.dim() - weight.dim() + 1
        shape = list(part.shape)
        shape[axis] = len(weight)
        if bias is None:
            whole = part.new_zeros(shape)
        else:
            whole = bias.to(part.dtype).view([-1 if i == axis % part.dim() else 1 for i in range(part.dim())]).expand(shape)
        return whole.index_copy(axis, rows, part)
