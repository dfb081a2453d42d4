"""What ``kind`` and ``divcontrol`` share: a linear layer as a sum of gated rank-1 components, in groups."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component
from gatework.core.errors import PartError

#: Standard deviation of the random factors of new tailors.
FRESH = 0.02


class Factors(nn.Module):
    """R components ``u_r s_r v_r^T`` of a matrix (d_out, d_in): ``u`` (d_out, R), ``s`` (R), ``v`` (d_in, R)."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(d_out, rank))
        self.s = nn.Parameter(torch.ones(rank))
        self.v = nn.Parameter(torch.empty(d_in, rank))

    def extra_repr(self) -> str:
        """The sizes."""
        return f"d_in={len(self.v)}, d_out={len(self.u)}, rank={len(self.s)}"

    def forward(self, x: Float[Tensor, "*B I"], gates: Float[Tensor, "*C R"] | None = None) -> Float[Tensor, "*B O"]:
        """``U (s gates (V^T x))``."""
        h = F.linear(x, self.v.t()) * self.s
        return F.linear(h if gates is None else h * gates.to(h.dtype), self.u)


class FactoredLinear(Component):
    """A linear layer of components that all samples share and groups of components that a gate weighs per sample.

        y = U_0 (s_0 * V_0^T x) + sum_k a_k U_k (s_k * V_k^T x) + b

    The shared ones are the learngenes, the others the tailors. Subclasses make ``a`` (B, K) from a condition: ``gates``. A
    group's gate multiplies its hidden units, so that samples with different gates share the matrix products.

    Initialisation: V is normal with standard deviation ``d_in**-0.5``, U with ``(3 (learngenes + tailors))**-0.5``, s is 1, so that
    the weight of one open group has the variance of ``nn.Linear``'s initialisation, 1 / (3 d_in); the bias is uniform within
    ``d_in**-0.5``.
    """

    family = "experts"

    def __init__(self, d_in: int, d_out: int, groups: int, learngenes: int, tailors: int, bias: bool) -> None:
        super().__init__()
        if min(d_in, d_out, groups, learngenes, tailors) < 1:
            given = f"{d_in}, {d_out}, {groups}, {learngenes}, {tailors}"
            raise ValueError(f"d_in, d_out, the number of groups, learngenes and tailors must be at least 1, got {given}")
        self.d_in, self.d_out, self.rank = d_in, d_out, tailors
        self.learngenes = Factors(d_in, d_out, learngenes)
        self.tailors = nn.ModuleList([Factors(d_in, d_out, groups * tailors)])
        self.bias = nn.Parameter(torch.empty(d_out).uniform_(-(d_in**-0.5), d_in**-0.5)) if bias else None
        for factors in self._banks():
            nn.init.normal_(factors.u, std=(3 * (learngenes + tailors)) ** -0.5)
            nn.init.normal_(factors.v, std=d_in**-0.5)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"d_in={self.d_in}, d_out={self.d_out}, groups={self.groups}, tailors={self.rank}, bias={self.bias is not None}"

    @property
    def groups(self) -> int:
        """How many groups of tailors there are."""
        return sum(len(bank.s) for bank in self._banks()[1:]) // self.rank

    def _banks(self) -> list[Factors]:
        return [self.learngenes, *self.tailors]

    @abstractmethod
    def gates(self, condition: Any) -> Float[Tensor, "B K"]:
        """The gate of each group for each sample."""

    def _forward(self, x: Tensor, gates: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[-1] != self.d_in:
            raise PartError(f"x is (samples, ..., {self.d_in}), not {tuple(x.shape)}")
        if len(gates) != len(x):
            raise PartError(f"there are {len(gates)} conditions for {len(x)} samples; one for each is due")
        y = self.learngenes(x)
        banks = self._banks()[1:]
        every = gates.view(len(x), *[1] * (x.dim() - 2), self.groups).split([len(bank.s) // self.rank for bank in banks], -1)
        for bank, some in zip(banks, every, strict=True):
            y = y + bank(x, some.repeat_interleave(self.rank, -1))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **settings: Any) -> Any:
        """A layer that starts from a trained linear layer: its singular values, the largest ones as learngenes.

        The tailors take the next ones, group by group; what is beyond all components is lost, and with as many components as the
        weight has singular values nothing is. A weight that holds several projections (of attention) is to be split first.

        Args:
            linear: gives the weight, the bias, dtype and device.
            settings: the constructor's other arguments.

        Raises:
            PartError: more components than singular values.
        """
        made = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, **settings)
        weight = linear.weight.detach()
        ranks = [len(bank.s) for bank in made._banks()]
        if sum(ranks) > min(weight.shape):
            shape = f"{weight.shape[0]} x {weight.shape[1]}"
            raise PartError(f"a {shape} weight has {min(weight.shape)} singular values, not the {sum(ranks)} that are asked for")
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        made = made.to(weight.device, weight.dtype)
        with torch.no_grad():
            start = 0
            for bank, rank in zip(made._banks(), ranks, strict=True):
                some = slice(start, start + rank)
                for p, value in ((bank.u, u[:, some]), (bank.s, s[some]), (bank.v, vt[some].t())):
                    p.copy_(value)
                start += rank
            if made.bias is not None:
                made.bias.copy_(linear.bias)
        return made

    def _weights(self, condition: Any) -> list[Tensor]:
        """For one condition the components' weights, s times the gate, bank by bank."""
        gates = self.gates(condition)
        if len(gates) != 1:
            raise PartError(f"one condition makes one weight, got {len(gates)}")
        spread = gates[0].repeat_interleave(self.rank).split([len(bank.s) for bank in self._banks()[1:]])
        return [self.learngenes.s, *(bank.s * some.to(bank.s.dtype) for bank, some in zip(self._banks()[1:], spread, strict=True))]

    @torch.no_grad()
    def merge(self, condition: Any) -> nn.Linear:
        """The plain linear layer that this one is at a condition."""
        u, v = self._open(condition)
        return _linear(u @ v.t(), self.bias)

    @torch.no_grad()
    def factors(self, condition: Any) -> nn.Sequential:
        """The same as two linear layers of the open components' rank, ``(d_in + d_out) rank`` weights; s is in the second."""
        u, v = self._open(condition)
        return nn.Sequential(_linear(v.t().contiguous(), None), _linear(u, self.bias))

    def _open(self, condition: Any) -> tuple[Tensor, Tensor]:
        weights = self._weights(condition)
        # What a gate closes is cut; a component whose own s is 0 is none either.
        kept = [weight.nonzero()[:, 0] for weight in weights]
        banks = self._banks()
        u = torch.cat([bank.u[:, some] * weight[some] for bank, weight, some in zip(banks, weights, kept, strict=True)], 1)
        return u, torch.cat([bank.v[:, some] for bank, some in zip(banks, kept, strict=True)], 1)

    def _extended(self, groups: int, keep: bool, freeze: bool, noop: bool) -> Any:
        """A copy with new tailors, behind the present ones or in their place."""
        if groups < 1:
            raise PartError(f"at least 1 new group is due, got {groups}")
        made = copy.deepcopy(self)
        if freeze:
            made.requires_grad_(False)
        fresh = Factors(self.d_in, self.d_out, groups * self.rank).to(self.learngenes.s)
        nn.init.normal_(fresh.v, std=FRESH)
        nn.init.normal_(fresh.u, std=0.0 if noop else FRESH)
        made.tailors = nn.ModuleList([*(made.tailors if keep else []), fresh])
        return made


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    if bias is not None:
        made.bias.copy_(bias)
    return made


__all__ = ["FactoredLinear", "Factors"]
