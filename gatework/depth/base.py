"""``Block``: one pre-norm layer made of a sequence mixer and a feed-forward, and what depth policies share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gatework.core.contracts import DepthPolicy, DepthState, FeedForward, SequenceMixer, State


class Block(nn.Module):
    """One layer: ``x = x + mixer(norm(x))``, then ``x = x + feedforward(norm(x))`` (RMS norms, eps 1e-6).

    A feed-forward that owns its norm and residual takes ``x`` and returns the new ``x``. The two *branches* are
    public, so that a depth policy can run, gate or skip each alone: :meth:`mix` and :meth:`transform` return what the
    branch adds to the stream.
    """

    def __init__(self, mixer: SequenceMixer, feedforward: FeedForward, d_model: int) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.mixer = mixer
        self.feedforward_norm = None if feedforward.owns_residual else nn.RMSNorm(d_model, eps=1e-6)
        self.feedforward = feedforward

    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the mixer branch adds to the stream ``x``."""
        return self.mixer(self.mixer_norm(x), state=state, mask=mask, segments=segments, keep=keep)

    def transform(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """What the feed-forward branch adds to the stream ``x``."""
        if self.feedforward_norm is None:
            return self.feedforward(x, mask=mask) - x
        return self.feedforward(self.feedforward_norm(x), mask=mask)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Run the layer on the residual stream."""
        x = x + self.mix(x, state=state, mask=mask, segments=segments)
        if self.feedforward_norm is None:
            return self.feedforward(x, mask=mask)
        return x + self.transform(x, mask=mask)


class BlockPolicy(DepthPolicy):
    """A depth policy over :class:`Block` layers whose decoding state is the list of the mixers' states.

    With ``gradient_checkpointing`` set, training keeps of each block its input only and recomputes the rest in the backward pass.
    """

    #: Whether to, and how; both under the names that ``transformers`` sets.
    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    def __init__(self, blocks: list[Block] | nn.ModuleList) -> None:
        super().__init__()
        if not len(blocks):
            raise ValueError("a depth policy needs at least one block")
        self.blocks = blocks if isinstance(blocks, nn.ModuleList) else nn.ModuleList(blocks)

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The blocks' sequence mixers, first to last."""
        return [cast(Block, block).mixer for block in self.blocks]

    def run(self, layer: Callable[..., Any], x: Tensor, state: State | None, *rest: Any) -> Any:
        """``layer(x, state, *rest)``, checkpointed if asked for; a layer leaves nothing behind but what it returns."""
        keeps = state is not None and state.keeps
        if not (self.gradient_checkpointing and self.training and not keeps and torch.is_grad_enabled()):
            return layer(x, state, *rest)
        # A reentrant checkpoint has no gradient for the losses that parts leave beside their output.
        return (self._gradient_checkpointing_func or checkpoint)(layer, x, state, *rest, use_reentrant=False)

    def block_states(self, state: State | None) -> Sequence[State | None]:
        """The state of each block, None without a state; refuses states that are not of this stack's :meth:`init_state`."""
        if state is None:
            return [None] * len(self.blocks)
        if not isinstance(state, DepthState):
            raise ValueError(f"{type(self).__name__} continues from its own init_state, not from a {type(state).__name__}")
        if len(state.layers) != len(self.blocks):
            raise ValueError(f"the state has {len(state.layers)} layers, but there are {len(self.blocks)} blocks")
        return state.layers

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> DepthState:
        """An empty decoding state: one mixer state per block."""
        return DepthState([mixer.init_state(batch_size, dtype=dtype, device=device) for mixer in self.mixers])

    def state_bytes(self, length: int) -> int:
        """Bytes per sequence after ``length`` tokens, all blocks together."""
        return sum(mixer.state_bytes(length) for mixer in self.mixers)
