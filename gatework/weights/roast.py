"""``Roast``: weights read tile by tile from one shared array.

Desai et al., Efficient Model Compression with Random Operation Access Specific Tile (ROAST) Hashing, 2022, arXiv 2207.10702, with
the corrections of STABLE-RPS (2023, arXiv 2310.11611) to the initialisation and the gradient: see
:mod:`gatework.weights.stable_rps` for the equations. The tiles lie over the matrix of every weight alike (the library cuts
embeddings into pieces of rows), and the weights are gathered for a plain product: the paper's fused kernel is not here.
"""

from __future__ import annotations

from typing import Literal

from gatework.core.registry import register
from gatework.weights.stable_rps import SharedArray


@register("roast", paper="roast")
class Roast(SharedArray):
    """Weights read tile by tile from one short shared array.

    ``stable_rps`` with the map ``roast``: each tile of a weight is a stretch of the array that begins at a hashed place, so that
    neighbours in a tile are neighbours in memory. Tiles overlap, so even at ratio 1 not every weight can be expressed
    (``stable_rps`` can). Gradient scaling and initialisation are those of ``stable_rps``; so are memory, saving and packing.

    Args:
        ratio: numbers in the array over weights, above 0.
        tile: rows and columns of a tile; the array must be longer than a tile.
        scaler: what the gradient of the array is divided by, ``v1`` to ``v5`` or ``none``.
        init: the array starts uniform in (-init, init); None takes the weights' own root mean square spread.
        seed: of the hashes.

    Raises:
        PartError: as ``stable_rps``.
    """

    def __init__(
        self,
        ratio: float = 0.125,
        tile: tuple[int, int] = (16, 16),
        scaler: Literal["v1", "v2", "v3", "v4", "v5", "none"] = "v1",
        init: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(ratio, "roast", tile, scaler, init, seed)
