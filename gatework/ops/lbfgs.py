"""``minimize``: a smooth function of a few parameters to its minimum by L-BFGS, as maximum-likelihood fits need it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def minimize(
    objective: Callable[[], Tensor], parameters: Iterable[Tensor], iterations: int = 500, tolerance: float = 1e-9
) -> float:
    """Minimise ``objective()`` over ``parameters`` in place (L-BFGS with a strong Wolfe line search, full batch).

    Args:
        objective: the scalar to minimise; its mean over examples, so that ``tolerance`` means the same at every sample size.
        parameters: leaves that ask for gradients, best in float64.
        iterations: at most so many.
        tolerance: stop where no gradient entry is larger.

    Returns:
        The value that was reached.
    """
    leaves = list(parameters)
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=iterations, max_eval=2 * iterations, tolerance_grad=tolerance, tolerance_change=0.0, history_size=20,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        return float(objective())
