"""``masked_digits``: scikit-learn's 8x8 handwritten digits with hidden patches, to be completed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, RegressionTask
from gatework.bench.tasks.digits import Digits
from gatework.core.errors import GateworkError
from gatework.models.masked_autoencoder import patches


class MaskedDigits(RegressionTask):
    """The hidden pixels of a digit from those that are shown; the score is the mean squared error of the hidden ones.

    The pictures and splits are those of ``digits``. Patches are hidden at random, as many in each picture (as masked autoencoders
    are trained: He et al., 2022; Pai et al., 2024, arXiv 2404.02446), anew each time that a picture is trained on, and once for all
    in the validation and test pictures. An input has the picture, with 0 in hidden places, and a channel with 1 there; the target
    is the hidden pixels, patch by patch.

    Args:
        split_seed: seed of the split.
        patch: side of a patch.
        ratio: share of the patches that are hidden; the number shown is rounded down.
        normalize: scale each hidden patch to mean 0 and variance 1 (eps 1e-6), so that what counts is its pattern.

    Raises:
        GateworkError: sizes that do not fit; if scikit-learn, which bundles the data, is not installed.
    """

    name = "masked_digits"
    backbone = "masked_autoencoder"
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 100_000,
        "tune_tokens": 40_000,
        "batch_size": 64,
        "learning_rates": (5e-4, 2e-2),
        "baseline": "mixer=attention(causal=false), feedforward=glu",
        "model": {"d_model": 64, "layers": 3},
        "match": "none",
    }

    def __init__(self, split_seed: int = 0, patch: int = 2, ratio: float = 0.75, normalize: bool = False) -> None:
        if patch not in (1, 2, 4):
            raise GateworkError(f"pictures of 8 x 8 have patches of side 1, 2 or 4, not {patch}")
        tokens = (8 // patch) ** 2
        self.patch, self.normalize = patch, normalize
        self.hidden = tokens - int(tokens * (1 - ratio)) if 0 < ratio < 1 else 0
        if not 0 < self.hidden < tokens:
            raise GateworkError(f"ratio {ratio} of {tokens} patches must hide and show at least one")
        self.digits = Digits(split_seed)
        generator = torch.Generator().manual_seed(split_seed)
        super().__init__({name: self.hide(x, generator) for name, (x, _) in self.digits.splits.items()})

    def hide(self, pictures: Tensor, generator: torch.Generator) -> Batch:
        """Inputs and targets of pictures (N, 1, 8, 8), with patches hidden at random."""
        side = 8 // self.patch
        order = torch.rand(len(pictures), side * side, generator=generator).argsort(1)
        hidden = torch.zeros(order.shape, dtype=torch.bool).scatter(1, order[:, : self.hidden], True)
        channel = hidden.view(-1, 1, side, side).repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        y = patches(pictures, self.patch)[hidden]
        if self.normalize:
            y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=min(1, y.shape[1] - 1)) + 1e-6).sqrt()
        return torch.cat([pictures.masked_fill(channel, 0), channel.to(pictures.dtype)], 1), y.view(len(pictures), -1)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Passes over the training pictures, each in an order and with hidden patches of its own."""
        generator = torch.Generator().manual_seed(seed)
        for pictures, _ in self.digits.batches(seed, batch_size):
            yield self.hide(pictures, generator)

    def model_arguments(self) -> dict[str, Any]:
        """Shape of a picture, how many patches of it are hidden and how large they are."""
        return {"input_shape": (1, 8, 8), "hidden": self.hidden, "patch": self.patch}
