"""``CoordinateNetwork``: a field, from coordinates to values, drawn by hash grids."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.experts.hash_experts import HeterogeneousHashExperts


class CoordinateNetwork(nn.Module):
    """Values at points of [0, 1]^d: features of one or several hash grids, then a head that all points share.

    ``forward(x (N, coordinates)) -> (N, channels)``. With ``experts=1`` it is a plain hash-grid field, with ``coarsest`` equal
    to ``n_max`` a mixture of equal experts, else one of experts that differ in resolution
    (:class:`gatework.experts.HeterogeneousHashExperts`).

    Args:
        coordinates: d, 1 to 3.
        channels: numbers per value.
        features, experts, gate, levels, log2_size, n_min, n_max, coarsest: of the experts layer.
        d_ff: hidden width of each expert's MLP and of the head's.

    Raises:
        PartError: for sizes that do not fit.

    Example:
        >>> CoordinateNetwork(2, 3, experts=2)(torch.rand(5, 2)).shape
        torch.Size([5, 3])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("coordinates", "channels")

    def __init__(
        self,
        coordinates: int,
        channels: int,
        experts: int = 4,
        gate: Any = "hash",
        features: int = 16,
        levels: int = 6,
        log2_size: int = 10,
        n_min: int = 4,
        n_max: int = 128,
        coarsest: int = 8,
        d_ff: int = 32,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise PartError(f"channels must be at least 1, got {channels}")
        try:
            self.field = HeterogeneousHashExperts(
                coordinates, features, experts, gate, levels, log2_size, n_min, n_max, coarsest, d_ff
            )
        except ValueError as error:
            raise PartError(str(error)) from error
        self.head = nn.Sequential(nn.Linear(features, d_ff), nn.ReLU(), nn.Linear(d_ff, channels))

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N C"]:
        """Values at N points."""
        values: Tensor = self.head(self.field(x))
        return values
