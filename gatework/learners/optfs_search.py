"""``OptFSSearch``: search which features to keep, go back to early weights, and train them with what was kept.

Lyu et al., Optimizing Feature Set for Click-Through Rate Prediction, WWW 2023, arXiv 2301.10909, for models with ``optfs``
gates, whose ``search`` says what share of the run searches and whose ``epochs`` cut it into pieces:

    piece 0            weights and gates learn
    start of piece 1   the weights are remembered
    end of the search  gates harden, weights go back to what was remembered, the optimizer forgets its averages
    rest of the run    the weights learn, the gates stay

Everything but the gates goes back, buffers as well (the release puts back embeddings, linear layers and batch norms). The
release makes a new Adam for the last phase with a constant rate; here the schedule goes on, and a cosine ends at 0. Two Adams,
one for weights and one for gates, are one Adam with two groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.registry import register
from gatework.learners.backprop import Backprop
from gatework.learners.base import Batch, Loss


@register("optfs_search", paper="optfs")
class OptFSSearch(Backprop):
    """Back-propagation with the phases of OptFS: search, rewind, retrain.

    Where the optimizer's weight decay would reach the gates' ``c``, they move into a group of their own without it. A gate's
    ``search`` must be below 1, so that there is a rest of the run; half is a good value.

    Args:
        model: has at least one ``optfs`` gate.
        loss_fn: ``loss_fn(model(x), y)`` -> scalar mean loss.
        optimizer: over the model's parameters.
        schedule: stepped once after each optimizer step.
        total_steps: length of the run in optimizer steps, search and retraining together.
        clip_norm: clip the gradient norm over all the optimizer's parameters to this; None does not clip.
        validate: called with the model (in evaluation mode, without gradients) after each piece of the retraining that is as
            long as one of the search; returns a score, higher is better. At the first piece that is no better than the best,
            the best weights come back and ``step`` moves nothing any more. None trains to the end.

    Raises:
        ValueError: if the model has no ``optfs`` gate or one whose search takes the whole run, its gates' schedules differ,
            the optimizer does not hold the gates, ``total_steps`` is below 1, ``clip_norm`` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        optimizer: Optimizer,
        schedule: LRScheduler | None = None,
        total_steps: int = 1,
        clip_norm: float | None = None,
        validate: Callable[[nn.Module], float] | None = None,
    ) -> None:
        super().__init__(model, loss_fn, optimizer, schedule, total_steps, clip_norm)
        found = {name: m for name, m in model.named_modules() if getattr(m, "part_name", None) == "optfs"}
        if not found:
            raise ValueError("optfs_search needs a model with an optfs gate, such as embedding_gate=optfs(search=0.5)")
        gates: list[Any] = list(found.values())
        if gates[0].search == 1:
            raise ValueError("optfs_search needs gates that leave steps for retraining, such as optfs(search=0.5), not search=1")
        if any((gate.search, gate.epochs) != (gates[0].search, gates[0].epochs) for gate in gates):
            raise ValueError("the optfs gates of one model must have the same search and epochs")
        self.gates, self.validate = gates, validate
        self.kept_out = {f"{name}.{own}".lstrip(".") for name, gate in found.items() for own in gate.state_dict()}
        self.early: dict[str, Tensor] | None = None
        self.best: tuple[float, dict[str, Tensor]] | None = None
        self.stopped = False
        self._spare_from_decay()

    def _spare_from_decay(self) -> None:
        """Move the gates into groups without weight decay; the schedule takes these on."""
        own = {id(gate.c) for gate in self.gates}
        groups = list(self.optimizer.param_groups)
        if not own <= {id(p) for group in groups for p in group["params"]}:
            raise ValueError("the optimizer does not hold the gates; give it model.parameters()")
        for place, group in enumerate(groups):
            moved = [p for p in group["params"] if id(p) in own]
            if not moved or not group.get("weight_decay"):
                continue
            group["params"] = [p for p in group["params"] if id(p) not in own]
            self.optimizer.add_param_group(group | {"params": moved, "weight_decay": 0.0})
            for name in ("base_lrs", "lr_lambdas"):
                if hasattr(self.schedule, name):
                    getattr(self.schedule, name).append(getattr(self.schedule, name)[place])

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """As in back-propagation; between two steps the phase may change."""
        if self.stopped:
            return self.estimate(batch)
        gate, before = self.gates[0], self.steps
        values = super().step(batch)
        old, new = (gate.epoch(steps, self.total_steps) for steps in (before, self.steps))
        if old == 0 and new >= 1:
            self.early = self._weights()
        if old < gate.epochs and new == gate.epochs:
            self._rewind()
        elif self.validate is not None and new == gate.epochs:
            self._stop_early()
        return values

    def _weights(self) -> dict[str, Tensor]:
        """A copy of all that is not the gates'."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items() if name not in self.kept_out}

    def _rewind(self) -> None:
        assert self.early is not None
        for gate in self.gates:
            gate.harden()
        self.model.load_state_dict(self.early, strict=False)
        self.optimizer.state.clear()
        self.early = None

    def _stop_early(self) -> None:
        search = self.gates[0].search_steps(self.total_steps)
        piece = max(1, search // self.gates[0].epochs)
        if (self.steps - search) % piece:
            return
        assert self.validate is not None
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        with torch.no_grad():
            score = self.validate(self.model)
        for module in training:
            module.training = True
        if self.best is None or score > self.best[0]:
            self.best = score, self._weights()
        else:
            self.model.load_state_dict(self.best[1], strict=False)
            self.stopped = True

    def state_dict(self) -> dict[str, Any]:
        """All that the rule keeps, the remembered weights with it."""
        return super().state_dict() | {"early": self.early, "best": self.best, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit.

        Raises:
            ValueError: if it was taken with a schedule and this learner has none, or the other way round.
        """
        super().load_state_dict(state)
        self.early, self.best, self.stopped = state["early"], state["best"], state["stopped"]
