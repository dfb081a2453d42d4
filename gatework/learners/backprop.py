"""``Backprop``: plain back-propagation of the model's loss, the baseline of every other learning rule."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import losses
from gatework.core.registry import register
from gatework.learners.base import Batch, Learner, Loss


@register("backprop")
class Backprop(Learner):
    """Plain back-propagation: the loss's gradient, clipped, one optimizer step.

    The objective is ``loss_fn(model(x), y)`` plus all losses that parts leave behind (``core.losses``). ``step``
    never waits for the device: the returned losses are detached tensors.

    Args:
        model: maps the batch's input to the output.
        loss_fn: ``loss_fn(model(x), y)`` -> scalar mean loss.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run in optimizer steps, for the schedules inside parts.
        clip_norm: clip the gradient norm over all the optimizer's parameters to this; None does not clip.
        accumulate: split each batch along its first axis into this many pieces, run one after the other, so that
            one piece's activations are kept at a time; the gradient is that of the pieces' mean losses, weighted by
            their rows (for a loss that is a mean over rows: the whole batch's).

    Raises:
        ValueError: if ``total_steps`` or ``accumulate`` is below 1 or ``clip_norm`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
        accumulate: int = 1,
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {accumulate}")
        super().__init__(model, loss_fn, optimizer, schedule, total_steps, clip_norm)
        self.accumulate = accumulate

    def estimate(self, batch: Batch) -> dict[str, Tensor]:
        """Fill ``p.grad`` with the gradient of the objective.

        Returns:
            Detached: ``loss`` (the task's) and each part's losses by path.
        """
        self.model.zero_grad(set_to_none=True)
        self.optimizer.zero_grad(set_to_none=True)
        x, y = batch
        if self.accumulate == 1:
            return self._backward(x, y, 1.0)
        total: dict[str, Tensor] = {}
        for piece_x, piece_y in zip(x.chunk(self.accumulate), y.chunk(self.accumulate), strict=True):
            for name, value in self._backward(piece_x, piece_y, len(piece_x) / len(x)).items():
                total[name] = total[name] + value if name in total else value
        return total

    def _backward(self, x: Tensor, y: Tensor, share: float) -> dict[str, Tensor]:
        parts = {"loss": self.loss_fn(self.model(x), y)} | losses(self.model)
        if share != 1.0:
            parts = {name: value * share for name, value in parts.items()}
        objective = parts["loss"]
        for name, value in parts.items():
            if name != "loss":
                objective = objective + value
        objective.backward()
        return {name: value.detach() for name, value in parts.items()}
