"""Who is chosen: routers and selectors that return a ``Routing``."""

from typing import TYPE_CHECKING, Any

from gatework.core.registry import export as _export

globals().update(_parts := _export(__name__))
__all__ = sorted(_parts)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
