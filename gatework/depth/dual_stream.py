"""``DualStream``: a residual stream in two parts, one that the mixers write and one that the feed-forwards write.

Kerce and Fox, The Dual-Stream Transformer: Channelized Architecture for Interpretable Language Modeling, 2026, arXiv 2603.07461.
Everything reads the sum, and each branch writes to one side:

    token stream    x_t <- x_t + mixer(norm(x_t + x_e))           x_t starts as the input
    context stream  x_e <- x_e + feedforward(norm(x_t + x_e))     x_e starts as 0

The sum x_t + x_e is the stream of a plain pre-norm stack, so the policy changes no function and costs an addition per branch; what
it gives is the two sides by themselves. The heads are kept apart by the mixer, :class:`gatework.mixers.ChannelizedAttention`.

Reconstructed: of the paper only the abstract and summaries could be read. Those say which side is written by what, and the loss
without one of the two (36% and 9.5% higher without the token and the context stream), but not whether it was left out of every
reading or of the last: here of the last.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State, in_backward
from gatework.core.registry import register
from gatework.depth.base import Block, BlockPolicy


@register("dual_stream", paper="dual_stream")
class DualStream(BlockPolicy):
    """The plain stack with its residual stream in two, by who writes it.

    Args:
        blocks: the layers, run first to last. A feed-forward that owns its residual writes what it changes.
        read: what the policy returns in evaluation: ``both`` streams' sum, or the ``token`` or ``context`` stream alone, to see
            what is lost without the other. Training always returns the sum.

    Metrics: ``token`` and ``context``, the root mean square of each stream at the end, over real tokens.

    Decoding: each block's mixer keeps its own state, as in the plain stack; the streams of a token are made in one pass through
    the layers and nothing is kept of them.

    Source: arXiv 2603.07461.

    Raises:
        ValueError: an unknown stream.
    """

    def __init__(self, blocks: list[Block] | nn.ModuleList, read: Literal["both", "token", "context"] = "both") -> None:
        super().__init__(blocks)
        if read not in ("both", "token", "context"):
            raise ValueError(f"read must be both, token or context, got {read!r}")
        self.read = read

    def extra_repr(self) -> str:
        """The settings."""
        return f"read={self.read}"

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the two streams through all blocks; their sum, or what ``read`` says."""
        token, context = self.streams(x, state, mask, segments)
        if not in_backward():
            self.metrics = _sizes(token, context, mask)
        if self.training or self.read == "both":
            return token + context
        return token if self.read == "token" else context

    def streams(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]]:
        """The token stream and the context stream at the end."""
        token, context = x, torch.zeros_like(x)
        for block, block_state in zip(self.blocks, self.block_states(state), strict=True):
            token, context = self.run(partial(_layer, cast(Block, block)), token, block_state, context, mask, segments)
        return token, context


def _layer(
    block: Block, token: Tensor, state: State | None, context: Tensor, mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both streams after a block."""
    token = token + block.mix(token + context, state=state, mask=mask, segments=segments)
    return token, context + block.transform(token + context, mask=mask)


def _sizes(token: Tensor, context: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    said: dict[str, Any] = {}
    for name, stream in (("token", token), ("context", context)):
        squares = stream.detach().to(torch.promote_types(stream.dtype, torch.float32)).square().mean(-1)
        if mask is not None:
            said[name] = ((squares * mask).sum() / mask.sum().clamp(min=1)).sqrt()
        elif squares.numel():
            said[name] = squares.mean().sqrt()
    return said
