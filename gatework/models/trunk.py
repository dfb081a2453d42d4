"""What backbones share: the blocks that they are made of, and the patches that they cut pictures into."""

from __future__ import annotations

import itertools
from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from gatework.core.contracts import DepthPolicy, capability
from gatework.core.errors import PartError
from gatework.core.registry import build, build_pattern
from gatework.depth.base import Block


def trunk(
    mixer: Any, feedforward: Any, depth: Any, *, d_model: int, layers: int, heads: int, d_ff: int | None,
    purpose: str = "", needs: tuple[str, ...] = (), **known: Any,
) -> DepthPolicy:
    """Blocks under a depth policy, from part expressions.

    Args:
        mixer: sequence mixer(s), a pattern that repeats along the layers.
        feedforward: feed-forward(s), likewise.
        depth: depth policy.
        d_model, layers, heads, d_ff: sizes; None leaves each feed-forward its default.
        purpose: what the blocks are for ("a language model"), for the error.
        needs: capabilities that every mixer must have.
        known: what else is offered to the parts (``tokens``, ``grid``).

    Raises:
        PartError: sizes below 1, unknown parts, sizes that do not fit, a mixer that does not serve the purpose.
    """
    for name, value in {"d_model": d_model, "layers": layers, "heads": heads}.items():
        if value < 1:
            raise PartError(f"{name} must be at least 1, got {value}")
    context: dict[str, Any] = {"d_model": d_model, "heads": heads, "n_layers": layers} | known
    if d_ff is not None:
        context["d_ff"] = d_ff
    mixers = build_pattern(mixer, "mixer", layers, **context)
    for part, name in itertools.product(mixers, needs):
        if not (answer := capability(part, name)):
            wanted, lacks = ("a causal mixer", "is") if name == "causal" else (f"a mixer that {name}", "does")
            raise PartError(f"{purpose} needs {wanted}, and this {type(part).__name__} {lacks} not ({answer})")
    feedforwards = build_pattern(feedforward, "feedforward", layers, **context)
    blocks = nn.ModuleList(Block(m, f, d_model) for m, f in zip(mixers, feedforwards, strict=True))
    policy: DepthPolicy = build(depth, "depth", blocks=blocks, **context)
    return policy


def patches(x: Shaped[Tensor, "B C *sides"], side: int) -> Shaped[Tensor, "B T P"]:
    """The pieces of ``side`` samples of signals (B, C, L), or the squares of pictures (B, C, H, W) in the order of reading, each
    flattened channel by channel and row by row."""
    if x.dim() == 3:
        return x.unflatten(2, (-1, side)).permute(0, 2, 1, 3).flatten(2)
    return x.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
