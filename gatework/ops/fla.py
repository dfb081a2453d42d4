"""The kernels of flash-linear-attention (``pip install flash-linear-attention``) behind our own operations, on CUDA.

Yang and Zhang, FLA: A Triton-Based Library for Hardware-Efficient Implementations of Linear Attention Mechanism, 2024,
https://github.com/fla-org/flash-linear-attention; signatures as of version 0.5. ``gated_linear_recurrence`` and
``gated_delta_rule`` ask :func:`available` and hand over, with the same shapes and the same state, (B, H, K, V) in float32.

Not handed over: float32 and float64 (the kernels would round products to TF32, or refuse), ``torch.compile`` (they break the
graph), packed documents, decays along the values or one per head without the delta rule, heads wider than 256, and a few tokens
without gradients, which are stepped. The results differ from ours by half precision's rounding.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger("gatework")

#: Channels of a head that the kernels take.
WIDEST = 256


@functools.cache
def _kernels() -> dict[str, Callable[..., Any]]:
    """The kernels by name; empty where the library is not installed. Says so once."""
    try:
        found = {
            name: getattr(importlib.import_module(f"fla.ops.{module}"), name)
            for module, name in (
                ("gla", "chunk_gla"), ("delta_rule", "chunk_delta_rule"), ("gated_delta_rule", "chunk_gated_delta_rule"),
            )
        }
    except (ImportError, AttributeError) as error:
        logger.info("linear recurrences on CUDA run as PyTorch operations: %s", error)
        return {}
    logger.info("linear recurrences in half precision on CUDA run as kernels of flash-linear-attention")
    return found


def available(*heads: Float[Tensor, "B T H _"]) -> bool:
    """Whether the kernels take queries, keys and values like these."""
    fits = all(x.is_cuda and x.dtype == heads[0].dtype and 0 < x.shape[-1] <= WIDEST and x.shape[0] for x in heads)
    return fits and heads[0].dtype in (torch.bfloat16, torch.float16) and not torch.compiler.is_compiling() and bool(_kernels())


def linear_recurrence(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    scale: float | None,
    state: Float[Tensor, "B H K V"] | None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """As ``gated_linear_recurrence`` with decays along the keys."""
    out, last = _kernels()["chunk_gla"](q, k, v, g=log_decay.float(), scale=scale, **_carried(state))
    return out, last


def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, "B T H"] | None,
    scale: float | None,
    state: Float[Tensor, "B H K V"] | None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """As ``gated_delta_rule``."""
    settings = {"beta": beta.to(q.dtype), "scale": scale} | _carried(state)
    if log_decay is None:
        out, last = _kernels()["chunk_delta_rule"](q, k, v, **settings)
    else:
        out, last = _kernels()["chunk_gated_delta_rule"](q, k, v, g=log_decay.float(), **settings)
    return out, last


def _carried(state: Tensor | None) -> dict[str, Any]:
    return {"initial_state": None if state is None else state.float(), "output_final_state": True}
