"""Backbones made of the parts, and the ``transformers`` classes around the decoder."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gatework.models.classifier import Classifier
from gatework.models.decoder import Decoder

__all__ = ["Classifier", "Decoder", "GateworkConfig", "GateworkForCausalLM"]

if TYPE_CHECKING:
    from gatework.models.huggingface import GateworkConfig, GateworkForCausalLM


def __getattr__(name: str) -> Any:
    if name in ("GateworkConfig", "GateworkForCausalLM"):
        return getattr(importlib.import_module("gatework.models.huggingface"), name)
    raise AttributeError(f"module 'gatework.models' has no attribute {name!r}")
