"""Backbones made of the parts, and the ``transformers`` classes around the decoder."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gatework.models.classifier import Classifier
from gatework.models.click_through import ClickThrough
from gatework.models.coordinates import CoordinateNetwork
from gatework.models.decoder import Decoder
from gatework.models.entities import EntityModel
from gatework.models.environments import EnvironmentNetwork
from gatework.models.graph_processor import GraphProcessor, compile_algorithm
from gatework.models.masked_autoencoder import MaskedAutoencoder
from gatework.models.mesa import MesaOptimizer
from gatework.models.mixture import Mixture
from gatework.models.multitask import MultiTask
from gatework.models.pfn import PFN
from gatework.models.ranker import Ranker
from gatework.models.sequence_regressor import SequenceRegressor

#: What a task of the bench may ask for, by name. Each class says in ``task_arguments`` which of its arguments the task gives;
#: a study may set the others.
BACKBONES: dict[str, type[Any]] = {
    "classifier": Classifier, "click_through": ClickThrough, "coordinates": CoordinateNetwork, "decoder": Decoder,
    "entities": EntityModel, "environments": EnvironmentNetwork, "graph_processor": GraphProcessor,
    "masked_autoencoder": MaskedAutoencoder, "mixture": Mixture, "multitask": MultiTask, "pfn": PFN, "ranker": Ranker,
    "sequence_regressor": SequenceRegressor,
}

__all__ = [
    "BACKBONES", "PFN", "AdvanceSchedules", "Classifier", "ClickThrough", "CoordinateNetwork", "Decoder", "EntityModel",
    "EnvironmentNetwork", "GateworkConfig", "GateworkForCausalLM", "GraphProcessor", "MaskedAutoencoder", "MesaOptimizer",
    "Mixture", "MultiTask", "Ranker", "SequenceRegressor", "byte_tokenizer", "compile_algorithm",
]

if TYPE_CHECKING:
    from gatework.models.huggingface import GateworkConfig, GateworkForCausalLM
    from gatework.models.training import AdvanceSchedules, byte_tokenizer

#: Where the names are that need transformers.
_LAZY = {
    "GateworkConfig": "huggingface", "GateworkForCausalLM": "huggingface",
    "AdvanceSchedules": "training", "byte_tokenizer": "training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"gatework.models.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'gatework.models' has no attribute {name!r}")
