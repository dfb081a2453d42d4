"""The parts put into an existing pretrained model.

``describe(model)`` says what surgery found; each conversion (``gateskip``, ``depth``, ``recursive``, ``ternary``, ``pack``,
``phatgoose``, ``versatile_ffn``, ``lizard``) is one call in place that returns a :class:`Conversion`; ``save`` and ``load`` keep a
converted model; ``distill`` trains it towards the original; ``attention_transfer`` is the first stage of ``lizard``;
``PhatgooseGates`` prepares an adapter of ``peft`` for ``phatgoose``.
"""

from gatework.surgery.checkpoint import load, save
from gatework.surgery.conversion import Conversion
from gatework.surgery.depth import depth, gateskip
from gatework.surgery.distill import distill
from gatework.surgery.layout import Layout, describe
from gatework.surgery.lizard import attention_transfer, lizard
from gatework.surgery.phatgoose import PhatgooseGates, phatgoose
from gatework.surgery.recursive import recursive
from gatework.surgery.ternary import pack, ternary
from gatework.surgery.versatile_ffn import versatile_ffn

__all__ = [
    "Conversion", "Layout", "PhatgooseGates", "attention_transfer", "depth", "describe", "distill", "gateskip", "lizard", "load",
    "pack", "phatgoose", "recursive", "save", "ternary", "versatile_ffn",
]
