"""``voronoi_loss``: how far a fitted mixture of experts is from the true one, whatever the order and number of its atoms.

Nguyen, Nguyen and Ho, 2023, arXiv 2305.03288, equations 4 and 7 (there with the infimum over the gauge); the same with the
square for the multinomial model, 2310.14188. Each fitted atom i belongs to the cell A_j of the nearest true atom j, and

    D1 = sum_j sum_{i in A_j} e^{b0_i} ||(db1, da, db, dv)_ij|| + sum_j | sum_{i in A_j} e^{b0_i} - e^{b0*_j} |

For too many experts, D2 replaces the norm in cells with more than one atom by ``||(db1, db)||^r + ||(da, dv)||^{r/2}``,
r = 4 for two atoms and 6 for three (beyond that 2 |A_j|, which is a conjecture).

The softmax does not change when one vector is added to all b1 and one number to all b0. The paper takes the infimum over
both; here the fitted atoms are moved so that in one cell the weighted mean of b1 and the weight are the true ones, and the
least value over the cells is taken: 0 exactly where the infimum is 0, and of its order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Atoms:
    """The parameters of a mixture of experts, expert by expert.

    Attributes:
        bias: (E,) b0, the logarithms of the weights.
        values: (E, p) tensors by name; ``gate`` is b1.
        slow: names of those whose distances have the exponent r in cells with more than one atom, where the others have r / 2.
            Without any, the distance there is squared.
        shifts: the gate is a softmax that does not change when one vector is added to all rows of ``gate``.
    """

    bias: Float[Tensor, "E"]
    values: dict[str, Float[Tensor, "E p"]]
    slow: tuple[str, ...]
    shifts: bool = True


@dataclass
class Voronoi:
    """A fitted mixture against the true one.

    Attributes:
        loss: D1, or D2 with ``overfitted``.
        errors: by name the sum over cells of ``e^{b0_i}`` times the distance, without the exponents; ``weight`` is the sum over
            cells of the difference of their weights.
        cells: (E,) the true atom of each fitted one.
    """

    loss: float
    errors: dict[str, float]
    cells: Tensor


@torch.no_grad()
def voronoi_loss(fitted: Atoms, true: Atoms, overfitted: bool = False) -> Voronoi:
    """The Voronoi loss of ``fitted`` against ``true``.

    Args:
        fitted: E atoms.
        true: E* atoms of the same kind.
        overfitted: use D2, whose exponents belong to cells with more than one atom.

    Raises:
        ValueError: the two are not of one kind.
    """
    if fitted.values.keys() != true.values.keys():
        raise ValueError(f"the fitted model has {sorted(fitted.values)}, the true one {sorted(true.values)}")
    best: Voronoi | None = None
    for start in range(len(fitted.bias)):
        for reference in range(len(true.bias)):
            found = _aligned(fitted, true, start, reference, overfitted)
            if best is None or found.loss < best.loss:
                best = found
    assert best is not None
    return best


def _aligned(fitted: Atoms, true: Atoms, start: int, reference: int, overfitted: bool) -> Voronoi:
    """The loss in the gauge in which the cell of ``reference``, found with its gate at that of atom ``start``, is right."""
    values, bias = dict(fitted.values), fitted.bias
    if fitted.shifts:
        values["gate"] = values["gate"] - values["gate"][start] + true.values["gate"][reference]
        members = _cells(values, true) == reference
        if members.any():
            weights = bias[members].softmax(0)[:, None]
            values["gate"] = values["gate"] - (weights * values["gate"][members]).sum(0) + true.values["gate"][reference]
    cells = _cells(values, true)
    members = cells == reference
    if members.any():
        bias = bias - bias[members].logsumexp(0) + true.bias[reference]
    mass = bias.exp()
    masses = torch.zeros_like(true.bias).index_add_(0, cells, mass)
    errors = {name: float((mass * (value - true.values[name][cells]).norm(dim=1)).sum()) for name, value in values.items()}
    errors["weight"] = float((masses - true.bias.exp()).abs().sum())
    differences = {name: value - true.values[name][cells] for name, value in values.items()}
    distance = torch.cat(list(differences.values()), 1).norm(dim=1)
    if overfitted:
        sizes = torch.bincount(cells, minlength=len(true.bias))[cells]
        shared = distance.square()
        if fitted.slow:
            slow = torch.cat([differences[name] for name in differences if name in fitted.slow], 1).norm(dim=1)
            fast = torch.cat([differences[name] for name in differences if name not in fitted.slow], 1).norm(dim=1)
            shared = slow ** (2.0 * sizes) + fast**sizes
        distance = torch.where(sizes > 1, shared, distance)
    return Voronoi(float((mass * distance).sum()) + errors["weight"], errors, cells)


def _cells(values: dict[str, Tensor], true: Atoms) -> Tensor:
    ours = torch.cat(list(values.values()), 1)
    theirs = torch.cat([true.values[name] for name in values], 1)
    return torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


__all__ = ["Atoms", "Voronoi", "voronoi_loss"]
