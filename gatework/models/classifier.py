"""``Classifier``: an MLP, a small ConvNet or a vision transformer made of the parts."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import build, build_pattern
from gatework.models.trunk import patches, trunk
from gatework.weights import apply


class Classifier(nn.Module):
    """A classifier of small pictures or signals: stem and ``blocks`` run in order, then a linear ``head``.

    - ``mlp``: the input is flattened; each block is a linear layer of width ``d_model`` and the activation. With a
      ``feedforward`` the first block is the linear stem and every further one is ``x + feedforward(norm(x))``.
    - ``convnet``: each block is a 3-wide convolution with the activation and a pooling by 2 (as long as there is
      something to pool), widths doubling from ``d_model / 4`` up to ``d_model``; global average pooling; 1-D and 2-D
      inputs.
    - ``vit``: ``patch``-wide patches (linear), learned positions, ``layers`` pre-norm blocks of ``mixer`` and
      ``feedforward`` under a ``depth`` policy, RMS norm, mean over the patches.

    Args:
        input_shape: (C, H, W) or (C, L), without the batch.
        classes: number of classes; 1 is the single output of a regression.
        backbone: which of the three.
        d_model: width.
        layers: number of blocks.
        activation: of ``mlp`` and ``convnet``; each block gets its own.
        heads, d_ff, mixer, feedforward, depth: as in :class:`gatework.models.Decoder` (``vit``; ``feedforward`` also
        ``mlp``). The mixer need not be causal.
        patch: side of a patch in the ``vit``.
        weight: where the blocks' matrices come from, all of them (``ternary``); None are plain parameters.

    Raises:
        PartError: for a setting that the backbone has no place for, or sizes that do not fit.

    Example:
        >>> Classifier((1, 8, 8), classes=10, backbone="vit", d_model=32)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("input_shape", "classes")

    def __init__(
        self,
        input_shape: tuple[int, ...],
        classes: int,
        backbone: Literal["mlp", "convnet", "vit"] = "mlp",
        d_model: int = 128,
        layers: int = 2,
        activation: Any = None,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: Any = None,
        feedforward: Any = None,
        depth: Any = None,
        patch: int = 2,
        weight: Any = None,
    ) -> None:
        super().__init__()
        if backbone not in ("mlp", "convnet", "vit"):
            raise PartError(f"no backbone {backbone!r}; there are mlp, convnet, vit")
        if len(input_shape) not in (2, 3) or min(input_shape) < 1:
            raise PartError(f"input_shape is (channels, length) or (channels, height, width), not {tuple(input_shape)}")
        if classes < 1 or layers < 1:
            raise PartError(f"a classifier needs at least 1 class and 1 layer, got {classes} and {layers}")
        places = {"mlp": {"activation", "feedforward"}, "convnet": {"activation"}, "vit": {"mixer", "feedforward", "depth"}}
        given = {"activation": activation, "mixer": mixer, "feedforward": feedforward, "depth": depth}
        for name, value in given.items():
            if value is not None and name not in places[backbone]:
                raise PartError(f"{name!r} has no place in a classifier with backbone={backbone}")
        self.backbone, self.input_shape = backbone, tuple(input_shape)
        context: dict[str, Any] = {"d_model": d_model, "heads": heads, "n_layers": layers}
        if d_ff is not None:
            context["d_ff"] = d_ff
        self.depth: nn.Module | None = None
        if backbone == "mlp":
            self._blocks = nn.ModuleList(self._mlp(d_model, layers, activation or "relu", feedforward, context))
        elif backbone == "convnet":
            self._blocks = nn.ModuleList(self._convnet(d_model, layers, activation or "relu"))
        else:
            self._vit(patch, mixer or "attention(causal=false)", feedforward or "glu", depth or "stack", layers, context)
        self.head = nn.Linear(d_model, classes)
        if weight is not None:
            apply(self.blocks, "*", weight)

    def _mlp(self, d_model: int, layers: int, activation: Any, feedforward: Any, context: dict[str, Any]) -> list[nn.Module]:
        width = 1
        for size in self.input_shape:
            width *= size
        first = nn.Sequential(nn.Flatten(), nn.Linear(width, d_model), build(activation, "activation"))
        if feedforward is None:
            rest = [nn.Sequential(nn.Linear(d_model, d_model), build(activation, "activation")) for _ in range(layers - 1)]
            return [first, *rest]
        if layers < 2:
            raise PartError("an mlp with a feedforward needs at least 2 layers: the first is its linear stem")
        return [first, *(_Residual(f, d_model) for f in build_pattern(feedforward, "feedforward", layers - 1, **context))]

    def _convnet(self, d_model: int, layers: int, activation: Any) -> list[nn.Module]:
        convolution, pool = (nn.Conv2d, nn.MaxPool2d) if len(self.input_shape) == 3 else (nn.Conv1d, nn.MaxPool1d)
        if d_model % 4:
            raise PartError(f"d_model {d_model} of a convnet is not divisible by 4")
        blocks: list[nn.Module] = []
        channels, side = self.input_shape[0], min(self.input_shape[1:])
        for layer in range(layers):
            width = d_model if layer == layers - 1 else min(d_model, (d_model // 4) << layer)
            steps = [convolution(channels, width, 3, padding=1), build(activation, "activation")]
            if side >= 4:
                steps.append(pool(2))
                side //= 2
            blocks.append(nn.Sequential(*steps))
            channels = width
        return blocks

    def _vit(self, patch: int, mixer: Any, feedforward: Any, depth: Any, layers: int, context: dict[str, Any]) -> None:
        for size in self.input_shape[1:]:
            if size % patch:
                raise PartError(f"the input's side {size} is not divisible by patch {patch}")
        d_model, grid = context["d_model"], tuple(size // patch for size in self.input_shape[1:])
        tokens, width = math.prod(grid), self.input_shape[0] * patch ** len(grid)
        self.patch = patch
        self.stem = nn.Linear(width, d_model)
        self.positions = nn.Parameter(torch.empty(tokens, d_model))
        nn.init.normal_(self.positions, std=0.02)
        # What a mixer may need to know: how many tokens there are, and the rows and columns of a picture's.
        places: dict[str, Any] = {"tokens": tokens} | ({"grid": grid} if len(grid) == 2 else {})
        self.depth = trunk(
            mixer, feedforward, depth, d_model=d_model, layers=layers, heads=context["heads"], d_ff=context.get("d_ff"), **places
        )
        self.norm = nn.RMSNorm(d_model, eps=1e-6)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, first to last."""
        if self.depth is None:
            return self._blocks
        blocks: nn.ModuleList = self.depth.blocks  # type: ignore[assignment]
        return blocks

    @property
    def layer_chain(self) -> list[nn.Module]:
        """The modules of an ``mlp`` or a ``convnet``, which run one after the other (the mean over positions as ``nn.Flatten``);
        none of a ``vit``."""
        return [] if self.backbone == "vit" else [*self._blocks, nn.Flatten(), self.head]

    def forward(self, x: Float[Tensor, B *shape]) -> Float[Tensor, "B C"]:
        """Logits of the classes."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise PartError(f"this classifier was built for inputs of shape {self.input_shape}, not {tuple(x.shape[1:])}")
        if self.backbone == "vit":
            assert self.depth is not None
            h = self.depth(self.stem(patches(x, self.patch)) + self.positions)
            logits: Tensor = self.head(self.norm(h).mean(1))
            return logits
        for block in self._blocks:
            x = block(x)
        logits = self.head(x.flatten(2).mean(-1) if self.backbone == "convnet" else x)
        return logits


class _Residual(nn.Module):
    """``x + feedforward(norm(x))``, or the feed-forward alone where it owns its residual."""

    def __init__(self, feedforward: nn.Module, d_model: int) -> None:
        super().__init__()
        self.norm = None if feedforward.owns_residual else nn.RMSNorm(d_model, eps=1e-6)
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is None:
            out: Tensor = self.feedforward(x)
            return out
        return x + self.feedforward(self.norm(x))
