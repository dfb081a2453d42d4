"""``ExpertBuffer``: fast memory for S of E experts; the others wait in slow memory or in a file.

Huang et al., Towards MoE Deployment: Mitigating Inefficiencies in Mixture-of-Expert (MoE) Inference, 2023, arXiv 2303.06182,
section on expert buffering. The experts of one batch run in ascending order. One that is not resident is loaded into the place
of another:

- ``lifo``, the paper's: a resident expert that the current batch does not use, else any; of these the one loaded last. Experts
  come in ascending order again and again, so what was loaded last is needed last.
- ``mru`` and ``lru``: the one used last, or the longest ago. ``fifo``: the one loaded first.
- ``belady``: the one needed again last, or never (the lower index of several). No policy misses less, and it needs the future.

On the cyclic scan 0 .. E-1 with S < E, lru and fifo never hit, lifo hits S - 1 times in each cycle after the first, and mru is
as good as belady.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gatework.core.contracts import Activation
from gatework.core.errors import PartError
from gatework.core.routing import Routing
from gatework.experts.moe import MoE

#: Who makes room for an expert that is loaded.
POLICIES = ("lifo", "mru", "lru", "fifo", "belady")

#: Gives an expert's weights, in fast memory.
Load = Callable[[int], tuple[Tensor, ...]]


class ExpertBuffer:
    """Holds S experts and counts hits, misses and the bytes moved.

    Each layer has a buffer of its own. :func:`hold` makes an experts layer run from one; :func:`replay` runs a recorded trace.

    Args:
        n_experts: E.
        size: S.
        policy: who makes room.
        load: gives an expert's weights; None for a simulation, which moves nothing.
        expert_bytes: what one miss moves.
        future: for ``belady``, all experts that will be asked for, in order.

    Attributes:
        hits: accesses that found their expert.
        misses: those that had to load it; the first of each expert are compulsory.

    Raises:
        PartError: a size below 1, an unknown policy, ``belady`` without the future, another policy with it, a future access to an
            expert that there is not.
    """

    def __init__(
        self,
        n_experts: int,
        size: int,
        policy: str = "lifo",
        load: Load | None = None,
        expert_bytes: int = 0,
        future: Sequence[int] | None = None,
    ) -> None:
        if size < 1:
            raise PartError(f"a buffer holds at least 1 expert, not {size}")
        if policy not in POLICIES:
            raise PartError(f"no policy {policy!r}; there are {', '.join(POLICIES)}")
        if (policy == "belady") != (future is not None):
            raise PartError(f"belady is the policy that needs the future accesses, got the policy {policy!r} and future={future!r}")
        for expert in {*(future or ())} - {*range(n_experts)}:
            raise PartError(f"there are the experts 0 to {n_experts - 1}, and {expert} is among the future accesses")
        self.n_experts, self.size, self.policy = n_experts, size, policy
        self.load, self.expert_bytes = load, expert_bytes
        self.hits = self.misses = 0
        self.resident: dict[int, tuple[Tensor, ...]] = {}
        self._batch: set[int] = set()
        self._used: dict[int, int] = {}  # The access at which each was used last, and at which it was loaded.
        self._loaded: dict[int, int] = {}
        self._next: list[list[int]] = [[] for _ in range(n_experts)]  # Coming accesses of each, the nearest at the end.
        for access, expert in reversed(list(enumerate(future or ()))):
            self._next[expert].append(access)

    def __repr__(self) -> str:
        return f"ExpertBuffer({self.size} of {self.n_experts} experts, {self.policy}, hits={self.hits}, misses={self.misses})"

    @property
    def bytes_moved(self) -> int:
        """What all misses have loaded."""
        return self.misses * self.expert_bytes

    @property
    def hit_rate(self) -> float:
        """Hits over accesses; 0 without any."""
        return self.hits / max(self.hits + self.misses, 1)

    def begin(self, experts: Iterable[int]) -> None:
        """Say which experts the batch uses that comes now."""
        self._batch = set(experts)

    def access(self, expert: int) -> tuple[Tensor, ...]:
        """The weights of an expert, loaded into the place of another if need be."""
        if not 0 <= expert < self.n_experts:
            raise PartError(f"there are the experts 0 to {self.n_experts - 1}, not {expert}")
        if self._next[expert]:
            self._next[expert].pop()
        if expert in self.resident:
            self.hits += 1
        else:
            if len(self.resident) == self.size:
                del self.resident[self._victim()]
            self.resident[expert] = self.load(expert) if self.load is not None else ()
            self._loaded[expert] = self.hits + self.misses
            self.misses += 1
        self._used[expert] = self.hits + self.misses
        return self.resident[expert]

    def _victim(self) -> int:
        if self.policy == "lifo":
            idle = self.resident.keys() - self._batch
            return max(idle or self.resident, key=self._loaded.__getitem__)
        if self.policy == "belady":
            # A negative tie-breaker makes the lower index win.
            return max(self.resident, key=lambda e: (self._next[e][-1] if self._next[e] else float("inf"), -e))
        if self.policy == "fifo":
            return min(self.resident, key=self._loaded.__getitem__)
        return (max if self.policy == "mru" else min)(self.resident, key=self._used.__getitem__)


def replay(counts: Int[Tensor, "batches E"], size: int, policy: str = "lifo", expert_bytes: int = 0) -> ExpertBuffer:
    """Run a trace of :func:`gatework.experts.expert_trace.record` through a buffer and return it, with its counts.

    Args:
        counts: rows of each expert in each batch of one layer; those with any are accessed, in ascending order.
        size: S.
        policy: who makes room.
        expert_bytes: what one miss moves.
    """
    batches = [row.nonzero().flatten().tolist() for row in counts]
    future = [expert for batch in batches for expert in batch] if policy == "belady" else None
    buffer = ExpertBuffer(counts.shape[1], size, policy, expert_bytes=expert_bytes, future=future)
    for batch in batches:
        buffer.begin(batch)
        for expert in batch:
            buffer.access(expert)
    return buffer


def hold(
    layer: MoE,
    size: int,
    policy: str = "lifo",
    file: str | Path | None = None,
    device: torch.device | str | None = None,
) -> ExpertBuffer:
    """Make a trained ``moe`` keep only ``size`` of its experts in fast memory, from now on and for inference alone.

    The layer's stacked weights leave its parameters, and its outputs stay what they were. A batch that uses more experts than
    fit loads them one after the other.

    Args:
        layer: a ``moe`` of stacked weights; changed in place.
        size: S.
        policy: any but ``belady``, which needs to know the future.
        file: where the experts wait: a ``safetensors`` file, written now, of which one expert at a time is read; None leaves them
            in the memory in which they are.
        device: where the resident ones are and run, the device of the layer's input; None is that of the weights.

    Returns:
        The buffer, with its counts.

    Raises:
        PartError: for a layer whose experts are listed modules or held already.
    """
    if layer.listed is not None:
        raise PartError("a buffer holds the stacked weights of a moe, and the experts of this one are modules")
    stacks = {name: getattr(layer, name).detach() for name in ("w_in", "w_out")}
    device = stacks["w_in"].device if device is None else torch.device(device)
    if file is not None:
        save_file({name: stack.contiguous() for name, stack in stacks.items()}, file)
    load = partial(_from_memory, stacks, device) if file is None else partial(_from_file, Path(file), device)
    expert_bytes = sum(stack[0].numel() * stack.element_size() for stack in stacks.values())
    buffer = ExpertBuffer(layer.experts, size, policy, load, expert_bytes)
    del layer.w_in, layer.w_out
    layer.listed = nn.ModuleList([_Held(buffer, e, layer.activation, layer.glu) for e in range(layer.experts)])
    layer.engine = "segments"  # Experts in ascending order.
    layer.gate.register_forward_hook(partial(_begin, buffer))
    return buffer


def _from_memory(stacks: dict[str, Tensor], device: torch.device, expert: int) -> tuple[Tensor, ...]:
    # A copy even where the device is the same: it stands for the move, and the buffer's bytes are its own.
    return tuple(torch.empty_like(stack[expert], device=device).copy_(stack[expert]) for stack in stacks.values())


def _from_file(file: Path, device: torch.device, expert: int) -> tuple[Tensor, ...]:
    with safe_open(file, "pt") as held:
        return tuple(held.get_slice(name)[expert].to(device) for name in ("w_in", "w_out"))


def _begin(buffer: ExpertBuffer, gate: nn.Module, inputs: Any, routing: Routing) -> None:
    buffer.begin(routing.counts().nonzero().flatten().tolist())


class _Held(nn.Module):
    """One expert, whose weights the buffer has or gets."""

    def __init__(self, buffer: ExpertBuffer, expert: int, activation: Activation, glu: bool) -> None:
        super().__init__()
        self.buffer, self.expert, self.glu, self.activation = buffer, expert, glu, activation

    def forward(self, x: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """The expert's output."""
        w_in, w_out = self.buffer.access(self.expert)
        h = nn.functional.linear(x, w_in)
        h = self.activation.gated(h) if self.glu else self.activation(h)
        return nn.functional.linear(h.to(x.dtype), w_out)


__all__ = ["POLICIES", "ExpertBuffer", "hold", "replay"]
