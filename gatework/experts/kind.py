"""``KINDLinear``: a linear layer whose weight is shared knowledge plus knowledge of one class.

Xie et al., KIND: Knowledge Integration and Diversion in Diffusion Models, 2024 (ICML 2025, "for Training Decomposable Models"),
arXiv 2408.07337. With R_g shared components (learngenes), R_t components of each of C classes (tailors), c the sample's class:

    W_c = U_0 diag(s_0) V_0^T + U_c diag(s_c) V_c^T        y = W_c x + b

U (out, R), s (R), V (in, R) are trained directly, in the form of a singular value decomposition; nothing enforces orthogonality. In
a batch of mixed classes every sample moves the learngenes and the tailors of its own class. Without a class the learngenes act
alone. For new classes the learngenes stay and new tailors are trained.

The paper's code was not published: the outline is the paper's, ranks, initial scale and the start of new tailors are ours. A weight
decay shrinks both factors of a product, and tailors of absent classes too; give the factors none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.core.registry import register
from gatework.experts.factored import FactoredLinear


class ClassGate(nn.Module):
    """Opens the group of a sample's class: 0 or 1.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def extra_repr(self) -> str:
        """The size."""
        return f"classes={self.classes}"

    def forward(self, classes: Int[Tensor, "B"]) -> Float[Tensor, "B C"]:
        """One-hot rows.

        Raises:
            PartError: classes that are no whole numbers, one that there is not.
        """
        if classes.is_floating_point() or classes.dim() != 1:
            raise PartError(f"classes are (samples,) whole numbers, not {tuple(classes.shape)} of {classes.dtype}")
        wrong = (classes < 0) | (classes >= self.classes)
        if not torch.compiler.is_compiling() and wrong.any():
            raise PartError(f"there is no class {int(classes[wrong][0])}; classes are 0 to {self.classes - 1}")
        return (classes[:, None] == torch.arange(self.classes, device=classes.device)).float()


@register("kind", paper="kind")
class KINDLinear(FactoredLinear):
    """A linear layer of shared components and components of each class.

    ``forward(x (B, ..., d_in), condition (B)) -> (B, ..., d_out)``; ``condition`` holds the samples' classes, None lets the
    learngenes act alone. All tailors are computed, and those of other classes multiplied by 0; ``merge`` and ``factors``
    give one class alone, which costs no more than its rank.

    Args:
        d_in: width of the input.
        d_out: width of the output.
        classes: C.
        learngenes: R_g, components that all classes share.
        tailors: R_t, components of each class.
        bias: whether there is a bias, which all classes share.

    Initialisation: V is normal with standard deviation ``d_in**-0.5``, U with ``(3 (learngenes + tailors))**-0.5``, s is 1: each
        W_c has the variance 1 / (3 d_in) of ``nn.Linear``'s start. The bias is uniform within ``d_in**-0.5``. ``from_linear``
        starts from a trained layer.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, d_in: int, d_out: int, classes: int = 10, learngenes: int = 8, tailors: int = 2, bias: bool = True
    ) -> None:
        super().__init__(d_in, d_out, classes, learngenes, tailors, bias)
        self.gate = ClassGate(classes)

    def gates(self, condition: Int[Tensor, "B"] | int | None) -> Float[Tensor, "B C"]:
        """1 for a sample's class, 0 for the others; without a class one row of zeros."""
        if condition is None:
            return self.learngenes.s.new_zeros(1, self.groups)
        found: Tensor = self.gate(torch.atleast_1d(torch.as_tensor(condition, device=self.learngenes.s.device)))
        return found

    def forward(self, x: Float[Tensor, "B *T I"], condition: Int[Tensor, "B"] | None = None) -> Float[Tensor, "B *T O"]:
        """Apply each sample's own weight.

        Raises:
            PartError: x of another width, another number of classes than samples, a class that there is not.
        """
        gates = self.gates(condition)
        return self._forward(x, gates.expand(len(x), -1) if condition is None else gates)

    def transfer(self, classes: int, freeze: bool = True, noop: bool = True) -> KINDLinear:
        """A layer for other classes: the learngenes and the bias of this one, with new tailors.

        Args:
            classes: how many.
            freeze: the new tailors alone are trained.
            noop: new tailors start with U = 0, so that the layer starts as its learngenes; else U is normal with standard deviation
                0.02, as V is. s is 1.
        """
        made = self._extended(classes, keep=False, freeze=freeze, noop=noop)
        made.gate = ClassGate(classes)
        return made

    def extend(self, classes: int, freeze: bool = True, noop: bool = True) -> KINDLinear:
        """A layer for more classes: as ``transfer``, behind the present classes, which stay as they are."""
        made = self._extended(classes, keep=True, freeze=freeze, noop=noop)
        made.gate = ClassGate(self.groups + classes)
        return made
