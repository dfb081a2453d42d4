"""``EnvironmentNetwork``: regression in many environments, by experts that a context per environment chooses."""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.experts.mixer_moe import MixERLayer


class EnvironmentNetwork(nn.Module):
    """Outputs for inputs from known environments: a :class:`gatework.experts.MixERLayer` behind one input tensor.

    ``forward(x (N, 1 + inputs)) -> (N, outputs)``; the first column is the number of the environment. With ``experts=1`` it is
    a single meta-learner; with ``learner=mixer_kmeans`` it is MixER; with a ``gate`` (``topk(k=1)``) the usual mixture, whose
    gate learns by gradient. :func:`gatework.experts.mixer_moe.adapt` makes a copy for new environments.

    Args:
        inputs, outputs: widths, the environment's number left out.
        environments: number of environments.
        experts, context, d_ff, split_context, gate: of the layer.

    Raises:
        PartError: for sizes that do not fit.
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("inputs", "outputs", "environments")

    def __init__(
        self,
        inputs: int,
        outputs: int,
        environments: int,
        experts: int = 4,
        context: int = 16,
        d_ff: int = 64,
        split_context: bool = False,
        gate: Any = None,
    ) -> None:
        super().__init__()
        try:
            self.mixer = MixERLayer(inputs, outputs, environments, experts, context, d_ff, split_context, gate)
        except ValueError as error:
            raise PartError(str(error)) from error

    def environment(self, x: Float[Tensor, "N C"]) -> Int[Tensor, "N"]:
        """The numbers of the inputs' environments."""
        return x[:, 0].round().long()

    def forward(self, x: Float[Tensor, "N C"]) -> Float[Tensor, "N O"]:
        """Outputs for N inputs."""
        if x.shape[1:] != (self.mixer.d_in + 1,):
            raise PartError(f"x has rows of an environment's number and {self.mixer.d_in} values, not the shape {tuple(x.shape)}")
        outputs: Tensor = self.mixer(x[:, 1:], self.environment(x))
        return outputs
