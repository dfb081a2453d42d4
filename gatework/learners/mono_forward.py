"""``MonoForward``: every block learns the task by itself, without a backward pass through the others.

Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors (Gong et al.,
2025, arXiv 2501.09238), as examined in Beyond Backpropagation (Spyra, 2025, arXiv 2509.19063). With blocks k = 1..K,
h_0 = x, y the label:

    a_k = block_k(h_{k-1}),    h_k = a_k without its graph, passed up
    G_k = a_k M_k^T            M_k (classes x activities of the block), M_K is the model's head
    L_k = loss(G_k, y)         its gradient reaches block k and M_k, and nothing else

The prediction is G_K, the model's plain output (``last``), or the sum of all G_k (``sum``).

Differences to the papers: the last projection is the model's own head (with its bias, if it has one), so that the
trained model is used as it is, without the learner; all M_k share the optimizer of the weights; what stands before the
first block learns with it, and what stands behind the last with the head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import losses
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.learners.base import Batch, Learner, Loss

#: Called with the number of a block and its output.
See = Callable[[int, Tensor], None]


@register("mono_forward", paper="mono_forward")
class MonoForward(Learner):
    """Each block learns from the loss of its own projection to the classes.

    The gradients of a block come and go before the next block runs, so that the activations of one block at a time are
    kept, whatever the depth. The model has to run each of its ``blocks`` once per pass, first to last.

    The projections M_1 .. M_{K-1} are made at the first batch, ``nn.Linear``-initialised (Kaiming uniform), and join the
    first group of the optimizer: its rate, decay and schedule are theirs. A block's activities are its output's axes
    beyond those of the target: all of them for a label per example, the features for a label per token. They are kept
    in ``state_dict()``, and needed for training and for ``prediction="sum"`` only.

    Args:
        model: maps the batch's input to the output; needs ``blocks`` and a linear ``head``.
        loss_fn: ``loss_fn(G_k, y)`` -> scalar mean loss, for every block.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run in optimizer steps, for the schedules inside parts.
        clip_norm: clip the gradient norm of each block (with its projection) to this; None does not clip.
        prediction: "last", the model's own output, or "sum", the sum of all projections.

    Raises:
        ValueError: if ``total_steps`` is below 1, ``clip_norm`` is not positive, or the model has no blocks or no linear
            head.
    """

    requires = frozenset({"blocks", "head"})

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
        prediction: Literal["last", "sum"] = "last",
    ) -> None:
        super().__init__(model, loss_fn, optimizer, schedule, total_steps, clip_norm)
        if prediction not in ("last", "sum"):
            raise ValueError(f"prediction is last or sum, got {prediction!r}")
        if not isinstance(model.head, nn.Linear):
            raise ValueError(f"MonoForward needs a linear head, not {type(model.head).__name__}")
        self.prediction = prediction
        self.blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
        self.head: nn.Linear = model.head
        self.projections: list[nn.Parameter] = []
        self._seed = int(torch.randint(2**62, ()))  # The first batch comes at any time: what is drawn then is decided now.

    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad``, block after block.

        Returns:
            Detached: ``loss`` (the head's), ``loss/0`` .. (each block's, the last is the head's) and each part's losses
            by path.

        Raises:
            PartError: the model does not run its blocks one after the other, or a block's output has no activities to
                project.
        """
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        x, y = batch
        said: dict[str, Tensor] = {}

        def learn(k: int, logits: Tensor) -> None:
            loss = self.loss_fn(logits, y)
            parts = losses(self.model)
            torch.stack([loss, *parts.values()]).sum().backward()
            said[f"loss/{k}"] = loss.detach()
            said.update((name, value.detach()) for name, value in parts.items())

        def see(k: int, h: Tensor) -> None:
            if len(self.projections) == k:
                self._project(_activities(h, y.dim()).shape[-1])
            learn(k, nn.functional.linear(_activities(h, y.dim()), self.projections[k]))

        last = len(self.blocks) - 1
        with self._between(see):
            logits = self.model(x)
        learn(last, logits)
        return {"loss": said[f"loss/{last}"], **said}

    @contextlib.contextmanager
    def _between(self, see: See) -> Iterator[None]:
        """Show each block's output but the last's to ``see``, and cut the graph there."""
        seen: list[int] = []

        def hook(k: int, *call: Any) -> Tensor | None:
            h: Any = call[-1]
            if len(seen) != k or not isinstance(h, Tensor):
                raise self._disorder()
            seen.append(k)
            if k == len(self.blocks) - 1:
                return None
            see(k, h)
            return h.detach()

        hooks = [block.register_forward_hook(partial(hook, k)) for k, block in enumerate(self.blocks)]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()
        if len(seen) != len(hooks):
            raise self._disorder()

    def _disorder(self) -> PartError:
        return PartError("mono_forward needs a model that runs each of its blocks once, first to last, as depth=stack does")

    def _project(self, width: int) -> None:
        """Make the next projection, for a block of ``width`` activities; the optimizer takes it on."""
        like = self.head.weight
        generator = torch.Generator().manual_seed(self._seed + len(self.projections))
        bound = width**-0.5  # Of nn.Linear: kaiming_uniform_(a=sqrt(5)).
        drawn = torch.rand(self.head.out_features, width, generator=generator, dtype=torch.float64) * 2 * bound - bound
        self.projections.append(nn.Parameter(drawn.to(like)))
        self.optimizer.param_groups[0]["params"].append(self.projections[-1])

    def clip(self) -> None:
        """Clip the gradient norm of each block with its projection; the last block's with all that is left of the model."""
        if self.clip_norm is None:
            return
        owned = {id(p): p for group in self.optimizer.param_groups for p in group["params"]}
        for block, projection in zip(self.blocks[:-1], self.projections, strict=True):
            own = [owned.pop(id(p)) for p in (*block.parameters(), projection) if id(p) in owned]
            nn.utils.clip_grad_norm_(own, self.clip_norm)
        nn.utils.clip_grad_norm_(list(owned.values()), self.clip_norm)

    def output(self, x: Tensor) -> Tensor:
        """The model's own output, or the sum of all projections."""
        if self.prediction == "last":
            return super().output(x)
        kept: list[Tensor] = []
        with self._between(lambda k, h: kept.append(h)):
            total = super().output(x)
        for projection, h in zip(self.projections, kept, strict=False):  # Before the first batch there are none.
            total = total + nn.functional.linear(_activities(h, total.dim() - 1), projection)
        return total

    def state_dict(self) -> dict[str, Any]:
        """All that the rule keeps, the projections with it."""
        return super().state_dict() | {"projections": list(self.projections), "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: if it was taken with a schedule and this learner has none, or the other way round.
        """
        self._seed = state["seed"]
        with torch.no_grad():
            for k, weight in enumerate(state["projections"]):
                if len(self.projections) == k:
                    self._project(weight.shape[1])
                self.projections[k].copy_(weight)
        super().load_state_dict(state)


def _activities(h: Tensor, axes: int) -> Tensor:
    """A block's output (target's axes..., n): what is beyond the target's axes, flattened."""
    if h.dim() <= axes:
        raise PartError(f"a block's output of shape {tuple(h.shape)} has no activities beyond the target's {axes} axes")
    return h.flatten(axes)
