"""``CrateISTA``: a feed-forward that is one step of sparse coding.

Pai et al., Masked Completion via Structured Diffusion with White-Box Transformers, 2024, arXiv 2404.02446; the step is that of
Yu et al., White-Box Transformers via Sparse Rate Reduction, 2023, arXiv 2306.01129, section 2.4. With a dictionary D (d_model x
d_model) and y = layer norm(x),

    z = relu(y + eta D^T (y - D y) - eta lambda)

which is one step of proximal gradient descent (ISTA), of length eta and started at z = y, on

    1/2 |y - D z|^2 + lambda |z|_1    over z >= 0

There is no residual around it: the new stream is the code z itself, sparse and nowhere negative.

Difference: the official code multiplies D^T y and D^T D y apart; here D^T (y - D y) is one product less.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import FeedForward, in_backward
from gatework.core.errors import PartError
from gatework.core.registry import register


@register("crate_ista", paper="crate_mae")
class CrateISTA(FeedForward):
    """One step of sparse coding in place of the feed-forward and residual.

    It holds its own norm and takes the residual stream x (..., d_model) to the new stream z (..., d_model), which is never
    negative. It belongs behind :class:`gatework.mixers.CrateMSSA`, with which it makes a CRATE layer.

    Args:
        d_model: width of the stream.
        step: eta, the length of the step.
        threshold: lambda, the weight of the sparsity. 0.5 is what the masked autoencoder has; classifiers and language models have
            0.1.

    Parameters: the dictionary (d_model^2) and the layer norm's gain and bias, about an eighth of an MLP of four times the width.

    Initialisation: the dictionary uniform within ``sqrt(6 / d_model)`` (Kaiming), the norm 1 and 0.

    Metrics: ``nonzero``, the share of the outputs of real tokens that are not 0; the paper sees it fall from layer to layer.

    Source: arXiv 2404.02446.

    Raises:
        ValueError: a width below 1, a step that is not positive, a negative threshold.
        PartError: inputs of another width, a mask that is not one bool per token.
    """

    owns_residual = True

    def __init__(self, d_model: int, step: float = 0.1, threshold: float = 0.5) -> None:
        super().__init__()
        if d_model < 1:
            raise ValueError(f"d_model must be at least 1, got {d_model}")
        if not (0 < step < math.inf and 0 <= threshold < math.inf):
            raise ValueError(f"step must be positive and threshold at least 0, both finite, got {step} and {threshold}")
        self.d_model, self.step, self.threshold = d_model, step, threshold
        self.norm = nn.LayerNorm(d_model)
        self.dictionary = nn.Parameter(torch.empty(d_model, d_model))
        nn.init.kaiming_uniform_(self.dictionary)

    def extra_repr(self) -> str:
        """The settings."""
        return f"d_model={self.d_model}, step={self.step}, threshold={self.threshold}"

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """The codes of all tokens; ``mask`` keeps padding out of the metric."""
        if x.shape[-1:] != (self.d_model,):
            raise PartError(f"CrateISTA was built for width {self.d_model}, not for inputs of shape {tuple(x.shape)}")
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            wanted = tuple(x.shape[:-1])
            raise PartError(f"mask has one bool per token, shape {wanted}, not {tuple(mask.shape)} of {mask.dtype}")
        y = self.norm(x)
        missing = y - F.linear(y, self.dictionary)
        z = F.relu(y + self.step * F.linear(missing, self.dictionary.t()) - self.step * self.threshold)
        if not in_backward():
            used = (z.detach() > 0).to(torch.float32).mean(-1)
            if mask is not None:
                self.metrics = {"nonzero": (used * mask).sum() / mask.sum().clamp(min=1)}
            else:
                self.metrics = {"nonzero": used.mean()} if used.numel() else {}
        return z
