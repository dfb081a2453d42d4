"""``ClickThrough``: a factorisation machine on categorical fields, with a deep part where one is wanted (DeepFM)."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import build


class ClickThrough(nn.Module):
    """Logits of a binary label from one value per categorical field.

    Rendle, Factorization Machines, ICDM 2010; Guo et al., DeepFM, IJCAI 2017, arXiv 1703.04247. Feature f (a value of a field)
    has a weight w_f and a vector v_f, and x names one feature per field:

        logit = bias + sum_f w_f + sum_(f < g) <v_f, v_g> + mlp(v concatenated over the fields)

    w_f and v_f are one row of the table, so that an embedding gate scales both and a dropped feature leaves nothing. (The
    release of OptFS has no w_f.)

    Args:
        features: rows of the table, all fields together.
        fields: features per example.
        d_model: width of the vectors v_f.
        deep: hidden layers of the deep part, 0 for a plain factorisation machine.
        d_ff: width of its hidden layers, 4 d_model where None.
        activation: of its hidden layers.
        embedding_gate: gates the rows, called with rows and ids (``optfs``); None gates nothing.

    Initialisation: v is normal with standard deviation ``d_model**-0.5 / 2``, w and the bias are 0, the deep part is
    PyTorch's.

    Raises:
        PartError: for sizes that do not fit, or an activation without a deep part.

    Example:
        >>> ClickThrough(features=40, fields=4)(torch.randint(40, (8, 4))).shape
        torch.Size([8])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("features", "fields")
    slots: ClassVar[dict[str, str]] = {"embedding_gate": "component"}

    remap: Tensor | None

    def __init__(
        self,
        features: int,
        fields: int,
        d_model: int = 16,
        deep: int = 0,
        d_ff: int | None = None,
        activation: Any = None,
        embedding_gate: Any = None,
    ) -> None:
        super().__init__()
        if min(features, fields, d_model) < 1 or deep < 0:
            given = f"{features}, {fields}, {d_model} and {deep}"
            raise PartError(f"features, fields and d_model must be at least 1 and deep at least 0, got {given}")
        if activation is not None and not deep:
            raise PartError("an activation needs a deep part: set deep to 1 or more")
        self.fields = fields
        self.table = nn.Parameter(torch.zeros(features, 1 + d_model))
        nn.init.normal_(self.table[:, 1:], std=d_model**-0.5 / 2)
        self.bias = nn.Parameter(torch.zeros(()))
        self.gate: Any = None
        if embedding_gate is not None:
            self.gate = build(embedding_gate, "component", features=features, d_model=d_model)
            if not callable(getattr(self.gate, "export", None)):
                raise PartError(f"{type(self.gate).__name__} gates no embedding; write embedding_gate=optfs")
        width, layers = fields * d_model, []
        for _ in range(deep):
            d_ff = d_ff or 4 * d_model
            layers += [nn.Linear(width, d_ff), build(activation or "relu", "activation")]
            width = d_ff
        self.deep = nn.Sequential(*layers, nn.Linear(width, 1)) if deep else None
        self.register_buffer("remap", None)

    def forward(self, x: Int[Tensor, "B F"]) -> Float[Tensor, "B"]:
        """Logits; ``x`` holds one row of the table per field."""
        if x.shape[1] != self.fields:
            raise PartError(f"this model was built for {self.fields} fields, not {x.shape[1]}")
        rows = nn.functional.embedding(x if self.remap is None else self.remap[x], self.table)
        if self.gate is not None:
            rows = self.gate(rows, x)
        weight, v = rows[..., 0], rows[..., 1:]
        pairs = (v.sum(1).square() - v.square().sum(1)).sum(1) / 2
        logits = self.bias + weight.sum(1) + pairs
        return logits if self.deep is None else logits + self.deep(v.flatten(1)).squeeze(1)

    def fold(self) -> ClickThrough:
        """A copy without the gate and without the rows that it drops; outputs equal those of hard gates, bit for bit.

        Raises:
            PartError: there is no gate.
        """
        if self.gate is None:
            raise PartError("there is no embedding gate to fold")
        folded = copy.deepcopy(self)
        remap, rows = self.gate.export(self.table)
        folded.gate, folded.table = None, nn.Parameter(rows)
        folded.register_buffer("remap", remap)
        return folded
