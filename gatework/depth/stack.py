"""The plain stack: every block, in order, for every token."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatework.core.contracts import State
from gatework.core.registry import register
from gatework.depth.base import BlockPolicy


@register("stack")
class Stack(BlockPolicy):
    """Every block in order, for every token: the plain Transformer's execution.

    Args:
        blocks: the layers, run first to last.

    Decoding: each block's mixer keeps its own state; nothing is skipped, so the states are complete by construction.
    """

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the residual stream through all blocks."""
        for block, block_state in zip(self.blocks, self.block_states(state), strict=True):
            x = self.run(block, x, block_state, mask, segments)
        return x
