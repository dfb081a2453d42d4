"""What optimizers and schedules share: their slots, the multi-tensor step and its plain loop, exact resuming."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from gatework.core.contracts import No

_LOW = (torch.bfloat16, torch.float16)


class Optimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` in the ``optim`` slot: ``Optimizer(params, lr=..., ..., foreach=True)``.

    Everything it keeps is in ``param_groups`` or ``state`` (nothing in Python attributes), so that ``state_dict``
    resumes bit for bit; state is loaded in the dtype it was saved in. Every group has ``foreach``.

    An element-wise method writes three things and inherits ``step``:

    - :meth:`check` refuses hyper-parameters that make no sense, of the defaults and of every group;
    - :meth:`init_state` makes the buffers of one parameter;
    - :meth:`update` moves a list of parameters, written once with ``torch._foreach_*``.

    ``step`` counts steps per parameter, hands :meth:`update` all parameters of a group that have the same device,
    dtype and count at once (``foreach``) or one by one (the plain loop: the same numbers, less memory), and sees to
    what is not the method's business: complex parameters come as pairs of real numbers; bf16 and fp16 parameters come as
    float32 copies with float32 states, and the result is rounded back; parameters without a gradient are left alone;
    sparse gradients are refused.
    """

    slot: ClassVar[str] = "optim"
    family: ClassVar[str] = "optim"
    capabilities: ClassVar[Mapping[str, bool | No]] = {"float64": True, "separable": True}
    #: The range of ``lr`` that the bench searches, where ``lr`` is no plain learning rate and a study's own range makes no
    #: sense for it.
    learning_rates: ClassVar[tuple[float, float] | None] = None

    def check(self, group: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for a hyper-parameter of ``group`` (defaults filled in) that makes no sense."""

    def init_state(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        """The buffers of a parameter before its first step; ``p`` is real, and float32 or wider."""
        raise NotImplementedError

    def update(
        self, params: list[Tensor], grads: list[Tensor], state: Mapping[str, list[Tensor]], step: int, group: Mapping[str, Any]
    ) -> None:
        """Move ``params`` and ``state`` in place; ``grads`` must not be changed.

        Args:
            params: real tensors, float32 or wider.
            grads: of the same shapes and dtypes.
            state: the buffers of :meth:`init_state`, each as a list along ``params``.
            step: how many steps these parameters have taken, this one included.
            group: their hyper-parameters.
        """
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, its hyper-parameters checked.

        Raises:
            ValueError: from :meth:`check`.
        """
        self.check(self.defaults | param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: for a sparse gradient; no parameter has moved then.
        """
        loss = evaluated(closure)
        for group, params in self.work():
            self._move(params, self.state[params[0]].get("step", 0) + 1, group)
        return loss

    def work(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The parameters that have a gradient, with their group, in lists that move together: alike in device, dtype and
        step count (``foreach``), or one by one (the plain loop), in the same order.

        Raises:
            RuntimeError: for a sparse gradient.
        """
        found = []
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients; use torch.optim.SparseAdam")
                taken = self.state[p].get("step", 0) if p in self.state else 0
                alike.setdefault((p.device, p.dtype, taken), []).append(p)
            for params in alike.values():
                found += [(group, params)] if group["foreach"] else [(group, [p]) for p in params]
        return found

    def _move(self, params: list[Tensor], step: int, group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        with widened(params) as (moved, grads):
            for p, state in zip(moved, states, strict=True):
                if not state:
                    state.update(self.init_state(p, group))
                state["step"] = step
            self.update(moved, grads, {name: [s[name] for s in states] for name in states[0] if name != "step"}, step, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit.

        Unlike PyTorch's, it leaves the dtype of the state alone (float32 moments of bf16 parameters are not rounded) and
        shares no memory with ``state_dict``.
        """
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, params, strict=True):
            for name, value in self.state[p].items() if p in self.state else ():
                if isinstance(value, Tensor):
                    exact = value if name == "step" else state_dict["state"][key][name].to(p.device)
                    self.state[p][name] = exact.clone()


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """The closure's loss, evaluated with gradients on; None without a closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


@contextlib.contextmanager
def widened(params: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Parameters and gradients as methods see them: complex ones as pairs of real numbers, bf16 and fp16 ones as float32
    copies whose values are rounded back at the end."""
    grads: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
    if params[0].is_complex():
        yield [torch.view_as_real(p) for p in params], [torch.view_as_real(g.resolve_conj().resolve_neg()) for g in grads]
    elif params[0].dtype in _LOW:
        moved = [p.float() for p in params]
        yield moved, [g.float() for g in grads]
        torch._foreach_copy_(params, moved)
    else:
        yield params, grads


class Schedule(LRScheduler):
    """A ``torch.optim.lr_scheduler.LRScheduler`` in the ``schedule`` slot, stepped once per optimizer step."""

    slot: ClassVar[str] = "schedule"
    family: ClassVar[str] = "schedule"
    capabilities: ClassVar[Mapping[str, bool | No]] = {}


def check_numbers(group: Mapping[str, Any], **ranges: tuple[float, float]) -> None:
    """Check that hyper-parameters are finite numbers in ``[low, high)``; ``betas`` and the like element by element.

    Raises:
        ValueError: naming the first that is not.
    """
    for name, (low, high) in ranges.items():
        values = group[name] if isinstance(group[name], tuple | list) else [group[name]]
        for value in values:
            if not (low <= value < high and math.isfinite(value)):
                wanted = f"at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g})"
                raise ValueError(f"{name} must be {wanted}, got {group[name]}")


__all__ = ["Optimizer", "Schedule", "check_numbers", "evaluated", "widened"]
