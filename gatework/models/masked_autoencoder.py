"""``MaskedAutoencoder``: pictures with hidden patches, completed."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import build_pattern
from gatework.depth.base import Block
from gatework.depth.stack import Stack
from gatework.models.trunk import patches


class MaskedAutoencoder(nn.Module):
    """Hidden patches of a picture from those that are shown.

    ``forward(x (B, C + 1, H, W)) -> (B, hidden C patch^2)``: of x the last channel is 1 where the picture is hidden and 0 where it
    is shown, and what the others hold where it is hidden is not looked at. The output is the pixels of the hidden patches, patch by
    patch in the order of reading, each channel by channel and row by row.

    Patches pass a linear stem; a learned vector stands in for each hidden one, in front of the encoder, which so sees all places
    (Pai et al., 2024, arXiv 2404.02446; He et al., 2022, show the encoder the others only). Fixed sine and cosine positions are
    added, ``layers`` blocks encode, then come a norm, as many blocks that decode, a norm and a linear head. There is no class
    token.

    Args:
        input_shape: (C, H, W) of a picture, without the batch.
        hidden: number of patches that are hidden in every picture.
        patch: side of a patch.
        d_model: width, a multiple of 4.
        layers: number of blocks of the encoder, and of the decoder.
        heads, d_ff, mixer, feedforward: as in :class:`gatework.models.Classifier`. A CRATE encoder has
            ``mixer="crate_mssa(causal=false)", feedforward="crate_ista"``.
        decoder: ``same`` has blocks like the encoder's; ``inverse`` undoes them as CRATE does, each layer ``x = E norm(x)`` (a
            matrix without a bias or a residual), then ``x = x - mixer(norm(x))``.

    All norms are layer norms, as in the paper, those of the blocks too.

    Initialisation: the stem Xavier uniform, the stand-in and the head normal with standard deviation 0.02 (the paper's Xavier would
    start a narrow model far above the pixels' variance), E Kaiming uniform; the parts as their papers say.

    Raises:
        PartError: for sizes that do not fit.

    Example:
        >>> x = torch.ones(2, 2, 8, 8)
        >>> x[:, 1, :, :2] = 0  # A column of patches is shown.
        >>> MaskedAutoencoder((1, 8, 8), hidden=12, d_model=32)(x).shape
        torch.Size([2, 48])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("input_shape", "hidden", "patch")

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        hidden: int,
        patch: int = 2,
        d_model: int = 64,
        layers: int = 2,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: Any = "attention(causal=false)",
        feedforward: Any = "glu",
        decoder: Literal["same", "inverse"] = "same",
    ) -> None:
        super().__init__()
        channels, *sides = input_shape
        if len(sides) != 2 or min(input_shape) < 1 or patch < 1 or any(side % patch for side in sides):
            raise PartError(f"input_shape is (channels, height, width), sides divisible by patch {patch}, not {tuple(input_shape)}")
        grid = sides[0] // patch, sides[1] // patch
        tokens, pixels = math.prod(grid), channels * patch**2
        if not 1 <= hidden <= tokens:
            raise PartError(f"hidden must be between 1 and the {tokens} patches of a picture, got {hidden}")
        if d_model < 4 or d_model % 4 or layers < 1:
            raise PartError(f"d_model must be a multiple of 4 and layers at least 1, got {d_model} and {layers}")
        if decoder not in ("same", "inverse"):
            raise PartError(f"decoder must be same or inverse, got {decoder!r}")
        self.input_shape, self.hidden, self.patch = tuple(input_shape), hidden, patch
        context: dict[str, Any] = {"d_model": d_model, "heads": heads, "n_layers": layers, "tokens": tokens, "grid": grid}
        if d_ff is not None:
            context["d_ff"] = d_ff

        def blocks() -> Stack:
            mixers = build_pattern(mixer, "mixer", layers, **context)
            feedforwards = build_pattern(feedforward, "feedforward", layers, **context)
            return Stack([_block(m, f, d_model) for m, f in zip(mixers, feedforwards, strict=True)])

        self.stem = nn.Linear(pixels, d_model)
        nn.init.xavier_uniform_(self.stem.weight)
        nn.init.zeros_(self.stem.bias)
        self.stand_in = nn.Parameter(0.02 * torch.randn(d_model))
        self.positions: Tensor
        self.register_buffer("positions", _positions(grid, d_model), persistent=False)
        self.encoder = blocks()
        self.norm = nn.LayerNorm(d_model)
        self.decoder: nn.Module
        if decoder == "same":
            self.decoder = blocks()
        else:
            self.decoder = nn.Sequential(*(_Inverse(m, d_model) for m in build_pattern(mixer, "mixer", layers, **context)))
        self.head_norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, pixels)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @property
    def blocks(self) -> nn.ModuleList:
        """The encoder's blocks, first to last."""
        return self.encoder.blocks

    def forward(self, x: Float[Tensor, "B C1 H W"]) -> Float[Tensor, "B P"]:
        """The pixels of the hidden patches."""
        channels, *sides = self.input_shape
        if tuple(x.shape[1:]) != (channels + 1, *sides):
            wanted = (channels + 1, *sides)
            raise PartError(f"a picture and its mask have the shape {wanted} here, the mask last, not {tuple(x.shape[1:])}")
        hide = x[:, -1:] > 0.5
        where = patches(hide, self.patch).all(-1)
        if not torch.compiler.is_compiling():
            count = hide.flatten(1).sum(1)
            if bool((where.sum(1) != self.hidden).any()) or bool((count != self.hidden * self.patch**2).any()):
                raise PartError(f"this model was built for {self.hidden} hidden patches of side {self.patch} in every picture")
        z = self.norm(self.encoder(self._tokens(x[:, :-1].masked_fill(hide, 0), where)))
        z = self.head_norm(self.decoder(z))
        # The hidden places, in the order of reading.
        places = (~where).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.hidden]
        pixels: Tensor = self.head(z.gather(1, places[..., None].expand(-1, -1, z.shape[2])))
        return pixels.flatten(1)

    def features(self, pictures: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """What the encoder makes of whole pictures, normed, the mean over the places: for a linear probe."""
        features: Tensor = self.norm(self.encoder(self._tokens(pictures, None))).mean(1)
        return features

    def codes(self, pictures: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B T D"]]:
        """The tokens of whole pictures behind each of the encoder's layers, for looking at their sparsity and coding rate."""
        z, found = self._tokens(pictures, None), []
        for block in self.blocks:
            z = block(z)
            found.append(z)
        return found

    def _tokens(self, pictures: Tensor, where: Tensor | None) -> Tensor:
        tokens: Tensor = self.stem(patches(pictures, self.patch))
        if where is not None:
            tokens = torch.where(where[..., None], self.stand_in.to(tokens.dtype), tokens)
        return tokens + self.positions


class _Inverse(nn.Module):
    """A layer of a CRATE decoder."""

    def __init__(self, mixer: nn.Module, d_model: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(d_model), nn.Linear(d_model, d_model, bias=False)
        self.mixer_norm, self.mixer = nn.LayerNorm(d_model), mixer
        nn.init.kaiming_uniform_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.norm(x))
        y: Tensor = x - self.mixer(self.mixer_norm(x))
        return y


def _block(mixer: Any, feedforward: Any, d_model: int) -> Block:
    """A block with layer norms."""
    block: Any = Block(mixer, feedforward, d_model)
    block.mixer_norm = nn.LayerNorm(d_model)
    if block.feedforward_norm is not None:
        block.feedforward_norm = nn.LayerNorm(d_model)
    return cast(Block, block)


def _positions(grid: tuple[int, int], width: int) -> Float[Tensor, "T D"]:
    """Sines and cosines of the row in one half of the channels, of the column in the other, wavelengths 2 pi to 2 pi 10000."""
    rates = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = (torch.arange(size)[:, None] * rates for size in grid)
    rows, columns = (torch.cat([angles.sin(), angles.cos()], 1) for angles in (rows, columns))
    both = [rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)]
    return torch.cat(both, 2).flatten(0, 1)
