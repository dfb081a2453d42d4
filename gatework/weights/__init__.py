"""Where a weight comes from: :func:`apply` a part to weights of any model, :func:`fold` or :func:`pack` it."""

from typing import TYPE_CHECKING, Any

from gatework.core.registry import export as _export
from gatework.weights.base import Packed as Packed
from gatework.weights.base import Report as Report
from gatework.weights.base import apply as apply
from gatework.weights.base import fold as fold
from gatework.weights.base import pack as pack
from gatework.weights.base import stored_bytes as stored_bytes

globals().update(_parts := _export(__name__))
__all__ = sorted([*_parts, "Packed", "Report", "apply", "fold", "pack", "stored_bytes"])

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
