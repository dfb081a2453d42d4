"""``HeterogeneousHashExperts``: a mixture of hash grids of different resolutions over space.

Mi and Xu, Learning Heterogeneous Mixture of Scene Experts for Large-scale Neural Radiance Fields (Switch-NeRF++), 2025,
arXiv 2505.02005. The space is cut up by a learnt gate, and each region is drawn by one expert with a hash grid of its own
range of resolutions: coarse grids for smooth regions, fine ones for detail.

    p = gate(x)    e* = argmax p    y = p_e* E_e*(x)    E_e(x) = MLP_e(encoding_e(x))
    encoding_e: N_min cells a side up to N_max^e = round(N_c (N_max / N_c)^(e / (E - 1)))

``y`` are features that a head shared by all experts turns into colour or density. Ours, where the text of the paper was not
at hand: N_min is the same for all experts and N_max^e geometric from N_c (``coarsest``) to N_max; one hidden layer of ReLU in
each expert. Rendering is left out: this is the coordinate network. Points are sorted by expert; none is dropped.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import Component, No
from gatework.core.registry import build, register
from gatework.ops.dispatch import run_experts
from gatework.ops.hash_grid import HashGridEncoding


@register("hash_experts", paper="hash_experts")
class HeterogeneousHashExperts(Component):
    """Hash grids of different resolutions, one per point, chosen by a gate.

    ``forward(x (N, d_model)) -> (N, features)``; coordinates in [0, 1], clamped beyond. Each point is encoded and transformed by
    one expert. With one expert p = 1, and what is left is a plain hash-grid field.

    Args:
        d_model: number of coordinates, 1 to 3.
        features: width of what comes out.
        experts: E.
        gate: part expression, class or instance of a gate over the coordinates; its ``n_experts`` is E.
        levels: grids of an expert's encoding, with 2 features a corner.
        log2_size: the binary logarithm of a grid's largest number of rows.
        n_min: cells a side of every expert's coarsest grid.
        n_max: cells a side of the last expert's finest grid.
        coarsest: cells a side of the first expert's finest grid; ``n_max`` makes all experts equal.
        d_ff: hidden width of an expert's MLP.

    Initialisation: grids uniform in +-1e-4, MLPs as PyTorch's linear layers.

    Side outputs: what the gate says.

    Raises:
        ValueError: sizes below 1, ``coarsest`` outside n_min..n_max, more than 3 coordinates.
    """

    family = "experts"
    capabilities = Component.capabilities | {
        "compiles": No("points are sorted by expert, and the lengths of the segments are data"),
    }

    def __init__(
        self,
        d_model: int,
        features: int = 16,
        experts: int = 4,
        gate: Any = "hash",
        levels: int = 6,
        log2_size: int = 12,
        n_min: int = 4,
        n_max: int = 128,
        coarsest: int = 16,
        d_ff: int = 32,
    ) -> None:
        super().__init__()
        if min(features, experts, d_ff) < 1:
            raise ValueError(f"features, experts and d_ff must be at least 1, got {features}, {experts} and {d_ff}")
        if not n_min <= coarsest <= n_max:
            raise ValueError(f"coarsest must lie between n_min {n_min} and n_max {n_max}, got {coarsest}")
        self.d_model, self.features = d_model, features
        self.gate = build(gate, "gate", d_model=d_model, n_experts=experts)
        finest = [round(coarsest * (n_max / coarsest) ** (e / (experts - 1))) for e in range(experts)] if experts > 1 else [n_max]
        encodings = [HashGridEncoding(d_model, levels, 2, log2_size, n_min, n) for n in finest]
        self.experts = nn.ModuleList(
            nn.Sequential(encoding, nn.Linear(encoding.width, d_ff), nn.ReLU(), nn.Linear(d_ff, features)) for encoding in encodings
        )

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N F"]:
        """Features of N points."""
        routing = self.gate(x)
        experts: list[Any] = list(self.experts)
        return run_experts(x, routing, experts, width=self.features)
