"""The parts put into an existing pretrained model.

``describe(model)`` says what surgery found; each conversion (``gateskip``, ``depth``) is one call in place that returns a
:class:`Conversion`; ``save`` and ``load`` keep a converted model.
"""

from gatework.surgery.checkpoint import load, save
from gatework.surgery.conversion import Conversion
from gatework.surgery.depth import depth, gateskip
from gatework.surgery.layout import Layout, describe

__all__ = ["Conversion", "Layout", "depth", "describe", "gateskip", "load", "save"]
