"""``Comet``: k soft decision trees whose leaves are the experts.

Ibrahim et al., COMET: Learning Cardinality Constrained Mixture of Experts with Trees and Local Search, 2023, arXiv 2306.02824.
Every tree has E - 1 inner nodes and E leaves, laid out as a heap: nodes 0..E-2, leaves E-1..2E-2, children of v are 2v+1 and
2v+2. The leaves from left to right are the experts 0..E-1. With the smooth step S (:func:`gatework.ops.smooth_step.smooth_step`),
node v of tree j sends a token to the left with

    p_vj = S(a_vj x + b_vj)    P_j(e) = the product of p (left) and 1 - p (right) along the path to leaf e

and the leaves of all trees share one softmax:

    s_j(e) = u_je x + c_je + log(P_j(e) + 1e-8), -inf where P_j(e) = 0
    g = softmax of s over all k E leaves    q_e = sum_j g_j(e)
    loss = entropy * mean_t sum_j,e -P log(P + 1e-8)

A tree all of whose splits are at least gamma / 2 away from 0 leads to one expert, exactly: at most k experts are left. The weights
sum to 1 for every E: no code is without an expert, unlike ``dselect_k``. Note that the gate is not ``sum_j P_j``: a leaf's own
score counts too, as in the released code. :class:`gatework.gates.PermutationSearch` learns the order of the leaves, the paper's
local search.

Differences: the released code adds 1e-6 in the entropy, and an L2 penalty on the weights, which is the optimizer's weight decay
here.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gatework.core.registry import register
from gatework.gates.base import mean_over, router_logits
from gatework.gates.smooth import SmoothGate, entropy
from gatework.ops.smooth_step import smooth_step

#: Inside the logarithms.
EPS = 1e-8


@register("comet", paper="comet")
class Comet(SmoothGate):
    """Differentiable choice of at most k experts by k soft trees.

    Starts dense and nearly uniform and becomes sparse as the trees decide; the same function in training and evaluation. Two trees
    may choose the same expert.

    Args:
        d_model: width of the tokens.
        n_experts: E, at least 2, not only powers of 2.
        k: number of trees, the most experts that are left at the end.
        gamma: width of the smooth step; a larger one keeps the trees undecided for longer.
        entropy: weight of the entropy loss, which hurries the decision.

    Initialisation: nodes (weights and biases) uniform in +-gamma / 100, leaves in +-0.05.

    Side outputs: loss ``entropy`` (training); metrics ``load``, ``max_violation``, ``dead``, ``entropy``, ``chosen`` (mean number
        of experts that a token uses).

    Raises:
        ValueError: fewer than 2 experts, k outside 1..E, gamma not positive, a negative entropy weight.
    """

    def __init__(self, d_model: int, n_experts: int, k: int = 2, gamma: float = 1.0, entropy: float = 1e-6) -> None:
        super().__init__(d_model, n_experts, k, gamma, entropy)
        self.node_weight = nn.Parameter(torch.empty(k * (n_experts - 1), d_model))
        self.node_bias = nn.Parameter(torch.empty(k * (n_experts - 1)))
        self.leaf_weight = nn.Parameter(torch.empty(k * n_experts, d_model))
        self.leaf_bias = nn.Parameter(torch.empty(k * n_experts))
        for name, parameter in self.named_parameters():
            bound = gamma / 100 if name.startswith("node") else 0.05
            nn.init.uniform_(parameter, -bound, bound)

    def reach(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N k E"]:
        """P_j(e), leaves from left to right; each tree's sum to 1."""
        z = (router_logits(x, self.node_weight) + self.node_bias).view(-1, self.selectors, self.n_experts - 1)
        left, right = smooth_step(z, self.gamma), smooth_step(-z, self.gamma)
        reached, shallow = torch.ones_like(left[..., :1]), left[..., :0]
        first = 0
        while first < self.n_experts - 1:  # Level by level; only the deepest can be incomplete, at its right end.
            inner = min(reached.shape[-1], self.n_experts - 1 - first)
            shallow, parents, nodes = reached[..., inner:], reached[..., :inner], slice(first, first + inner)
            first += reached.shape[-1]
            reached = torch.stack([parents * left[..., nodes], parents * right[..., nodes]], -1).flatten(-2)
        return torch.cat([reached, shallow], -1)

    def select(
        self, x: Float[Tensor, "N D"], mask: Bool[Tensor, "N"] | None = None
    ) -> tuple[Float[Tensor, "N k E"], dict[str, Tensor]]:
        """Each tree's weights g_j(e), and the loss."""
        reached = self.reach(x)
        scores = (router_logits(x, self.leaf_weight) + self.leaf_bias).view_as(reached) + (reached + EPS).log()
        scores = scores.masked_fill(reached == 0, -torch.inf)
        losses = {}
        if self.training and self.entropy:
            losses["entropy"] = self.entropy * mean_over(entropy(reached, EPS), mask)
        return scores.flatten(1).softmax(1).view_as(reached), losses
