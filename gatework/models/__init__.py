"""Backbones made of the parts."""

from gatework.models.classifier import Classifier
from gatework.models.decoder import Decoder

__all__ = ["Classifier", "Decoder"]
