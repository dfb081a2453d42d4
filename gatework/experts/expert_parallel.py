"""``ExpertParallel``: the experts of a ``moe`` shared out among ranks, tokens sent to where their experts are.

Dynamic gating of Huang et al., Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference, 2023, arXiv
2303.06182, over the expert parallelism of GShard (2006.16668):

1. each rank routes its own tokens and sorts the used slots by (rank of the expert, expert);
2. the ranks exchange how many rows each expert gets (W x E/W integers), then exactly these rows (all-to-all with uneven splits);
3. rows arrive grouped by source rank; each rank groups them by expert and runs its experts, those without rows not at all;
4. the outputs go back the same way, are weighed and summed over each token's slots.

No capacity, no padding, no dropped token; W ranks compute what one would. The backward pass sends gradients by the same exchange
with the splits swapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from gatework.core.contracts import Component, No
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.experts.expert_placement import ExpertPlacement
from gatework.experts.moe import MoE
from gatework.ops.dispatch import Dispatch, dispatch
from gatework.ops.precision import without_autocast


@register("expert_parallel", paper="moe_serving")
class ExpertParallel(Component):
    """A ``moe`` whose experts are shared out among the ranks of a process group.

    ``forward(x (..., d_model), mask, **conditions) -> (..., d_model)``, as the ``moe`` itself, on this rank's own tokens. All ranks
    call it, and the backward pass, equally often; a rank without tokens calls it with none. A capacity counts each rank's tokens
    alone.

    The gate and shared experts are replicated and treated like all dense weights. An expert's gradient is already the sum over
    the tokens of all ranks and must **not** be reduced over the group. With ``DistributedDataParallel``, which averages the
    gradients of the ranks' mean losses, leave the experts out and average them alike::

        names = [name for name, p in model.named_parameters() if any(p is q for q in layer.expert_parameters())]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        for p in layer.expert_parameters():
            p.register_hook(lambda gradient: gradient / ranks)

    Args:
        moe: a layer of stacked weights, alike on all ranks. It is taken over: this rank keeps the rows of ``w_in`` and ``w_out``
            that belong to its experts, in ascending order.
        group: a process group or a device mesh of one dimension; None is the default group, or this process alone where
            ``torch.distributed`` does not run.
        placement: which rank holds which expert; None is contiguous.

    Initialisation: the given layer's.

    Side outputs: the gate's, over this rank's tokens.

    Raises:
        PartError: a number of experts that the ranks do not divide, a placement for other numbers, experts that are modules.
    """

    family = "experts"
    capabilities = Component.capabilities | {
        "compiles": No("tokens are sorted by expert, and the lengths of the segments are data"),
    }

    def __init__(
        self, moe: MoE, group: dist.ProcessGroup | DeviceMesh | None = None, placement: ExpertPlacement | None = None
    ) -> None:
        super().__init__()
        if isinstance(group, DeviceMesh):
            group = group.get_group()
        distributed = dist.is_available() and dist.is_initialized()
        n_ranks, rank = (dist.get_world_size(group), dist.get_rank(group)) if distributed else (1, 0)
        self.group = group
        self.placement = _checked(moe, n_ranks, placement)
        self.moe = moe
        own = self.placement.experts_of(rank)
        for name in ("w_in", "w_out"):
            whole = getattr(moe, name)
            setattr(moe, name, nn.Parameter(whole.detach()[own].clone(), whole.requires_grad))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"experts={self.moe.experts}, ranks={self.placement.n_ranks}"

    def expert_parameters(self) -> list[nn.Parameter]:
        """The weights of this rank's experts, whose gradients no other rank has a share of."""
        return [self.moe.w_in, self.moe.w_out]

    def forward(
        self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None, **conditions: Tensor
    ) -> Float[Tensor, "*B D"]:
        """Transform this rank's tokens."""
        tokens, routing = self.moe.route(x, mask, conditions)
        sent = _Sent(self.moe, tokens, routing, self.placement)
        received_counts = self._exchange_counts(sent.plan.counts)
        n_ranks = self.placement.n_ranks
        there = [sum(counts) for counts in _by_rank(sent.plan.counts, n_ranks)]
        here = [sum(counts) for counts in received_counts]
        # Through the anchor a rank whose tokens need no gradient takes part in the exchanges of the backward pass too.
        anchor = self.moe.w_in
        received: Tensor = _Exchange.apply(sent.rows, anchor, there, here, self.group)
        y = _compute(self.moe, self.moe.w_in, self.moe.w_out, received, received_counts)
        returned: Tensor = _Exchange.apply(y, anchor, here, there, self.group)
        return self.moe.finish(tokens, sent.plan.combine(returned)).view(x.shape)

    def _exchange_counts(self, counts: list[int]) -> list[list[int]]:
        """Of each source rank the rows for each expert of this one."""
        sent = torch.tensor(counts, device=self.moe.w_in.device)
        if self.placement.n_ranks == 1:
            return [counts]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        return _by_rank(received.tolist(), self.placement.n_ranks)


def simulate(moe: MoE, xs: Sequence[Float[Tensor, "_ D"]], placement: ExpertPlacement | None = None) -> list[Tensor]:
    """What W ranks would compute, in one process: ``xs[r]`` are rank r's tokens, the result is its output.

    ``moe`` stays whole, and gets the gradients of all ranks together.

    Args:
        moe: a layer of stacked weights.
        xs: W tensors of tokens.
        placement: which rank holds which expert; None is contiguous.
    """
    n_ranks = len(xs)
    placement = _checked(moe, n_ranks, placement)
    sent = [_Sent(moe, *moe.route(x, None, {}), placement) for x in xs]
    counts = [_by_rank(one.plan.counts, n_ranks) for one in sent]
    rows = [one.rows.split([sum(each) for each in there]) for one, there in zip(sent, counts, strict=True)]
    outputs = []
    for rank in range(n_ranks):
        own = placement.experts_of(rank)
        received = torch.cat([parts[rank] for parts in rows])
        from_each = [there[rank] for there in counts]
        y = _compute(moe, moe.w_in[own], moe.w_out[own], received, from_each)
        outputs.append(y.split([sum(each) for each in from_each]))
    back = [torch.cat([parts[rank] for parts in outputs]) for rank in range(n_ranks)]
    return [moe.finish(one.tokens, one.plan.combine(y)) for one, y in zip(sent, back, strict=True)]


class _Sent:
    """A rank's tokens, and their rows sorted by the rank of their expert, then by expert."""

    def __init__(self, moe: MoE, tokens: Tensor, routing: Routing, placement: ExpertPlacement) -> None:
        order = [expert for rank in range(placement.n_ranks) for expert in placement.experts_of(rank)]
        places = torch.empty(len(order), dtype=torch.long)
        places[order] = torch.arange(len(order))
        experts = places.to(routing.experts.device)[routing.experts]
        self.tokens = tokens
        self.plan: Dispatch = dispatch(Routing(routing.weights, experts, len(order)))
        self.rows = self.plan.gather(tokens.to(moe.compute_dtype(tokens, moe.w_in)))


def _by_rank(counts: list[int], n_ranks: int) -> list[list[int]]:
    each = len(counts) // n_ranks
    return [counts[rank * each : (rank + 1) * each] for rank in range(n_ranks)]


def _compute(moe: MoE, w_in: Tensor, w_out: Tensor, received: Tensor, counts: list[list[int]]) -> Tensor:
    """A rank's experts on the rows that came, by source rank and expert; outputs in the rows' order."""
    each = len(counts[0])
    device = received.device
    flat = torch.tensor([count for source in counts for count in source], dtype=torch.long, device=device)
    experts = torch.arange(each, device=device).repeat(len(counts)).repeat_interleave(flat, output_size=len(received))
    ones = received.new_ones(len(received), 1)
    with without_autocast(received.device):
        dtype = received.dtype
        return moe.run_stacked(received, Routing(ones, experts[:, None], each), w_in.to(dtype), w_out.to(dtype))


def _checked(moe: MoE, n_ranks: int, placement: ExpertPlacement | None) -> ExpertPlacement:
    if moe.listed is not None:
        raise PartError("expert parallelism shares out the stacked weights of a moe, and the experts of this one are modules")
    contiguous = ExpertPlacement.contiguous(moe.experts, n_ranks)
    if placement is None:
        return contiguous
    if (len(placement.ranks), placement.n_ranks) != (moe.experts, n_ranks):
        shown = f"{len(placement.ranks)} experts on {placement.n_ranks} ranks"
        raise PartError(f"the placement is for {shown}, and there are {moe.experts} experts and {n_ranks} ranks")
    return placement


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; the backward pass is the same with the splits swapped."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, anchor: Tensor, there: list[int], here: list[int], group: Any) -> Tensor:
        ctx.splits, ctx.group = (there, here), group
        return _all_to_all(rows, there, here, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        there, here = ctx.splits
        return _all_to_all(d_rows, here, there, ctx.group), None, None, None, None


def _all_to_all(rows: Tensor, there: list[int], here: list[int], group: Any) -> Tensor:
    if len(there) == 1:
        return rows.clone()
    received = rows.new_empty(sum(here), rows.shape[1])
    dist.all_to_all_single(received, rows.contiguous(), here, there, group=group)
    return received


__all__ = ["simulate"]
