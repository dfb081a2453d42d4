"""``image_regression``: a picture of mixed frequency as a function of its coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from gatework.bench.tasks.base import Predict, RegressionTask, Split
from gatework.core.errors import GateworkError


class ImageRegression(RegressionTask):
    """From a pixel's place in the unit square to its value, in a picture with a smooth half and a fine checkerboard half.

    Of ``side`` x ``side`` pixels, whose centres are (i + 1/2) / side, the half whose first coordinate is below 1/2 shows a sum
    of six random waves of at most two periods a side, scaled to mean 0 and variance 1; the other half a checkerboard of +1 and
    -1 with squares of ``square`` pixels. Three fifths of the pixels, drawn at random, are trained on, one fifth each validate
    and test: the score is that of pixels that were never seen, so that a table which remembers pixels one by one scores no
    better than the picture's variance of 1. With squares of one pixel that would be all there is to learn; the neighbours of a
    pixel have to tell something of it.

    Where a grid's lines meet the squares' borders, a checkerboard is hardly a picture of fine detail to a hash grid: all the
    multipliers of its hash are odd, so that corners which collide have coordinates of equal parity of their sum, and squares of
    equal colour. Few rows then draw the whole board. With a side of 256 and squares of 6 the grids of the usual resolutions
    (powers of two) do not fit it.

    Args:
        side: pixels a side.
        square: pixels a side of a square of the checkerboard.
        seed: of the waves and of the split.

    Raises:
        GateworkError: a side below 8 or odd, or squares larger than half of it.
    """

    name = "image_regression"
    backbone = "coordinates"
    EVALUATION_BATCH = 4096
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 600_000,
        "tune_tokens": 200_000,
        "batch_size": 1024,
        "learning_rates": (1e-3, 3e-2),
        "baseline": "experts=1, log2_size=12",
        "model": {},
    }

    def __init__(self, side: int = 256, square: int = 6, seed: int = 0) -> None:
        if side < 8 or side % 2 or not 1 <= square <= side // 2:
            raise GateworkError(f"a picture needs an even side of at least 8 and squares of 1 to side / 2, got {side} and {square}")
        generator = torch.Generator().manual_seed(seed)
        index = torch.arange(side)
        row, column = (axis.flatten() for axis in torch.meshgrid(index, index, indexing="ij"))
        place = (torch.stack([row, column], 1) + 0.5) / side
        waves = torch.rand(6, 2, generator=generator) * 4 - 2
        phases = torch.rand(6, generator=generator) * 2 * math.pi
        smooth = torch.sin(2 * math.pi * place @ waves.T + phases).sum(1)
        left = row < side // 2
        smooth = (smooth - smooth[left].mean()) / smooth[left].std(correction=0)
        board = 1 - 2 * ((row // square + column // square) % 2)
        value = torch.where(left, smooth, board)[:, None]
        order = torch.randperm(side * side, generator=generator)
        held = side * side // 5
        parts = {"validation": order[:held], "test": order[held : 2 * held], "train": order[2 * held :]}
        super().__init__({name: (place[chosen], value[chosen]) for name, chosen in parts.items()})

    def model_arguments(self) -> dict[str, Any]:
        """Two coordinates, one channel."""
        return {"coordinates": 2, "channels": 1}

    def evaluate(self, predict: Predict, split: Split, max_batches: int | None = None) -> dict[str, float]:
        """``mse`` over the split's pixels (also as ``loss``), and ``psnr`` in decibels for a range of values of 2, the
        checkerboard's."""
        scores = super().evaluate(predict, split, max_batches)
        return scores | {"psnr": 10 * math.log10(4 / max(scores["mse"], 1e-12))}
