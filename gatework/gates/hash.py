"""``HashGate``: routes points of space by a small hash grid of their coordinates.

Mi and Xu, Learning Heterogeneous Mixture of Scene Experts for Large-scale Neural Radiance Fields (Switch-NeRF++), 2025,
arXiv 2505.02005:

    p = softmax(MLP(LN(encoding(x))))    e* = argmax p    routing: e* with weight p_e*

Only the code of the predecessor Switch-NeRF was read, which names the balance loss: that of Switch Transformers, with the
weight 5e-4 in its runs. Sizes of the grid and of the MLP (one hidden layer of ReLU) are ours. No capacity: nothing is dropped.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.contracts import Gate, in_backward
from gatework.core.registry import register
from gatework.core.routing import Routing
from gatework.gates.base import check_tokens, monitor, router_logits, switch_loss, top_k
from gatework.ops.hash_grid import HashGridEncoding


@register("hash", paper="hash_experts")
class HashGate(Gate):
    """Top-1 routing of coordinates in [0, 1]^d by a hash grid and an MLP.

    Neighbouring points go to the same expert as far as the grid's cells reach. The weight of the chosen expert is its
    probability: that is what gives the gate a gradient.

    Args:
        d_model: number of coordinates of a token, 1 to 3; coordinates outside [0, 1] are clamped.
        n_experts: E.
        levels: grids of the encoding, with 2 features a corner.
        log2_size: the binary logarithm of a grid's largest number of rows.
        n_min, n_max: cells a side of the coarsest and the finest grid.
        hidden: hidden width of the MLP.
        switch: weight of the Switch balance loss; without it the gate tends to send all points to the expert that learns
            fastest.

    Initialisation: the grid's features uniform in +-1e-4 (which the layer norm's 1e-5 under the root keeps small at first), the
        MLP as PyTorch's linear layers.

    Side outputs: loss ``switch`` (training), metrics ``load``, ``max_violation``, ``dead``, ``entropy``.

    Raises:
        ValueError: sizes below 1, more than 3 coordinates, a negative ``switch``.
    """

    k = 1
    example = {"d_model": 2}

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        levels: int = 4,
        log2_size: int = 12,
        n_min: int = 4,
        n_max: int = 32,
        hidden: int = 32,
        switch: float = 5e-4,
    ) -> None:
        super().__init__()
        if min(n_experts, hidden) < 1 or not switch >= 0:
            raise ValueError(f"n_experts and hidden must be at least 1 and switch 0, got {n_experts}, {hidden} and {switch}")
        self.d_model, self.n_experts, self.switch = d_model, n_experts, switch
        self.encoding = HashGridEncoding(d_model, levels, 2, log2_size, n_min, n_max)
        self.norm = nn.LayerNorm(self.encoding.width)
        self.hidden = nn.Linear(self.encoding.width, hidden)
        self.out = nn.Linear(hidden, n_experts)

    def extra_repr(self) -> str:
        """Number of experts and the balance loss."""
        return f"d_model={self.d_model}, n_experts={self.n_experts}, switch={self.switch}"

    def forward(self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None) -> Routing:
        """Route N points."""
        check_tokens(x, mask, self.d_model)
        h = self.encoding(x)
        exact = torch.promote_types(h.dtype, torch.float32)
        norm, hidden, out = self.norm, self.hidden, self.out
        h = nn.functional.layer_norm(h.to(exact), norm.normalized_shape, norm.weight.to(exact), norm.bias.to(exact), norm.eps)
        h = (router_logits(h, hidden.weight) + hidden.bias).relu()
        logits = router_logits(h, out.weight) + out.bias
        probs = logits.softmax(1)
        experts = top_k(probs, 1)
        weights = probs.gather(1, experts)
        if mask is not None:
            weights = weights.masked_fill(~mask[:, None], 0)
        routing = Routing(weights, experts, self.n_experts, logits, probs)
        losses = {"switch": self.switch * switch_loss(probs, experts, mask)} if self.training and self.switch else {}
        if not in_backward():
            self.losses, self.metrics = losses, monitor(routing, mask, self.training)
        return routing
