"""``record``: which experts a model used, batch by batch, for :class:`ExpertBuffer` and :class:`ExpertPlacement`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gatework.core.contracts import Gate, in_backward
from gatework.core.routing import Routing


@contextmanager
def record(model: nn.Module) -> Iterator[dict[str, Int[Tensor, "batches E"]]]:
    """Count the rows of every expert in each call of each gate of ``model`` while the block runs.

    Recomputation by activation checkpointing is not counted, nor is what a capacity drops afterwards left out.

    Yields:
        By the gate's path in the model, (batches, E) on the CPU; filled when the block ends. A gate that was not called is missing.
    """
    seen: dict[str, list[Tensor]] = {}
    found: dict[str, Tensor] = {}
    gates = [(path, module) for path, module in model.named_modules() if isinstance(module, Gate)]
    handles = [gate.register_forward_hook(partial(_note, seen, path)) for path, gate in gates]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        found.update({path: torch.stack(counts) for path, counts in seen.items()})


def _note(seen: dict[str, list[Tensor]], path: str, gate: nn.Module, inputs: Any, routing: Routing) -> None:
    if not in_backward():
        seen.setdefault(path, []).append(routing.counts().cpu())


__all__ = ["record"]
