"""Mixture-of-experts layers."""

from typing import TYPE_CHECKING, Any

from gatework.core.registry import export as _export
from gatework.experts.divcontrol import AlignmentLoss as AlignmentLoss
from gatework.experts.spawn import spawn_experts as spawn_experts

globals().update(_parts := _export(__name__))
__all__ = sorted([*_parts, "AlignmentLoss", "spawn_experts"])

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
