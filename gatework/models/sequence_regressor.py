"""``SequenceRegressor``: from a sequence of vectors to a vector at every place, by any causal mixer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import DepthPolicy, State
from gatework.core.errors import PartError
from gatework.models.trunk import trunk


class SequenceRegressor(nn.Module):
    """A causal model of vectors: linear in, blocks run by a depth policy, RMS norm, linear out.

    ``forward(x (B, T, inputs)) -> (B, T, outputs)``; output t sees the inputs up to t.

    Args:
        inputs: width of an input vector.
        outputs: width of an output vector.
        d_model, layers, heads, d_ff, mixer, feedforward, depth: as in :class:`gatework.models.Decoder`.

    Initialisation: PyTorch's for the two linear layers; every part starts as its paper says.

    Raises:
        PartError: unknown parts, sizes that do not fit, a mixer that is not causal.

    Example:
        >>> SequenceRegressor(inputs=6, outputs=6, d_model=32, layers=1, mixer="gla")(torch.zeros(2, 9, 6)).shape
        torch.Size([2, 9, 6])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("inputs", "outputs")

    def __init__(
        self,
        inputs: int,
        outputs: int,
        d_model: int = 64,
        layers: int = 2,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: Any = "attention",
        feedforward: Any = "glu",
        depth: Any = "stack",
    ) -> None:
        super().__init__()
        if min(inputs, outputs) < 1:
            raise PartError(f"inputs and outputs must be at least 1, got {inputs} and {outputs}")
        self.inputs = inputs
        self.stem = nn.Linear(inputs, d_model)
        self.depth: DepthPolicy = trunk(
            mixer, feedforward, depth, d_model=d_model, layers=layers, heads=heads, d_ff=d_ff,
            purpose="a model that predicts a sequence", needs=("causal",),
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-6)
        self.head = nn.Linear(d_model, outputs)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers, first to last."""
        blocks: nn.ModuleList = self.depth.blocks  # type: ignore[assignment]
        return blocks

    def forward(
        self,
        x: Float[Tensor, "B T I"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T O"]:
        """An output at every place; ``state``, ``mask`` and ``segments`` as in :class:`gatework.models.Decoder`."""
        if x.dim() != 3 or x.shape[-1] != self.inputs:
            raise PartError(f"this model was built for inputs of shape (batch, time, {self.inputs}), not {tuple(x.shape)}")
        h = self.depth(self.stem(x), state=state, mask=mask, segments=segments)
        y: Tensor = self.head(self.norm(h))
        return y

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """An empty decoding state; dtype and device default to the parameters'."""
        return self.depth.init_state(batch_size, dtype=dtype, device=device)

    def state_bytes(self, length: int) -> int:
        """Bytes that decoding keeps per sequence after ``length`` vectors."""
        return self.depth.state_bytes(length)
