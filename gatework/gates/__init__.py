"""Who is chosen: routers that return a ``Routing``, and gates on channels, which :func:`attach` puts into any model."""

from typing import TYPE_CHECKING, Any

from gatework.core.registry import export as _export
from gatework.gates.adaptive_topk import ComplexityCurriculum as ComplexityCurriculum
from gatework.gates.channels import attach as attach
from gatework.gates.channels import compact as compact
from gatework.gates.channels import fold as fold

globals().update(_parts := _export(__name__))
__all__ = sorted([*_parts, "ComplexityCurriculum", "attach", "compact", "fold"])

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
