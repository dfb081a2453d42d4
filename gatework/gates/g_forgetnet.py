"""``GForgetNet``: a gate on what a recurrent processor remembers of its last step, and a penalty that closes it.

Bohde et al., On the Markov Property of Neural Algorithmic Reasoning: Analyses and Methods, 2024, arXiv 2403.04929. A processor that
runs an algorithm step by step reads its encoded inputs x_t, which hold what the last step has decoded, and its own last state:

    baseline      h_t = Proc(x_t, h_{t-1})
    ForgetNet     h_t = Proc(x_t, 0)
    G-ForgetNet   h_t = Proc(x_t, g_t * h_{t-1})    g_t = sigmoid(W_x x_t + W_h h_{t-1} + b)    loss + penalty * mean g_t

The steps of most algorithms depend on their present state alone, which the decoded outputs hold: h_{t-1} only adds what does not
carry over to other inputs. But early in training the decoded outputs are wrong, and h_{t-1} is the way in which gradients and
information pass; the gate, half open at the start, lets it pass until the penalty has closed it.

The official code was not released when this was written. The gate is a linear map of each node's own features; that the penalty is
the mean gate, and its weight of 0.1, are ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.gates.base import loss_weight


@register("g_forgetnet", paper="g_forgetnet")
class GForgetNet(Component):
    """A gate by token and channel on the last step's state.

    ``forward(x (..., inputs), h (..., d_model)) -> g * h``, g = sigmoid(W [x, h] + b).

    Args:
        inputs: width of the inputs x of the step.
        d_model: width of the state h.
        penalty: weight of the mean gate in the objective.

    Initialisation: W as PyTorch's linear layers, b = 0: the gate is about half open. With b at minus infinity nothing passes
    (ForgetNet), at infinity all (the baseline).

    Side outputs: loss ``gate``, penalty times the mean gate of the last call (:meth:`penalise` for that of several steps); metric
    ``gate``, the mean gate.

    Raises:
        ValueError: widths below 1, a negative penalty.
        PartError: inputs of other widths.
    """

    family = "gate"

    def __init__(self, inputs: int, d_model: int, penalty: float = 0.1) -> None:
        super().__init__()
        if min(inputs, d_model) < 1:
            raise ValueError(f"inputs and d_model must be at least 1, got {inputs} and {d_model}")
        self.inputs, self.d_model, self.penalty = inputs, d_model, loss_weight(penalty)
        self.gate = nn.Linear(inputs + d_model, d_model)
        nn.init.zeros_(self.gate.bias)

    def extra_repr(self) -> str:
        """The penalty."""
        return f"penalty={self.penalty}"

    def values(self, x: Float[Tensor, "*B I"], h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The gates g."""
        if x.shape[-1:] != (self.inputs,) or h.shape[-1:] != (self.d_model,) or x.shape[:-1] != h.shape[:-1]:
            wanted = f"(..., {self.inputs}) and (..., {self.d_model})"
            given = f"{tuple(x.shape)} and {tuple(h.shape)}"
            raise PartError(f"inputs and state have the shapes {wanted} with the same rows, not {given}")
        gates: Tensor = self.gate(torch.cat([x, h.to(x.dtype)], -1)).sigmoid()
        return gates

    def forward(self, x: Float[Tensor, "*B I"], h: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What is remembered."""
        gates = self.values(x, h)
        self.penalise(gates.float().mean() if gates.dtype.itemsize < 4 else gates.mean())
        return gates * h

    def penalise(self, mean: Float[Tensor, ""]) -> None:
        """Leave the loss and the metric of a mean gate, such as that over all steps of a run."""
        if not in_backward():
            self.losses = {"gate": self.penalty * mean} if self.training else {}
            self.metrics = {"gate": mean.detach()}
