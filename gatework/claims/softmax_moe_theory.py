"""The rates at which softmax-gated mixtures of experts are found from data.

Nguyen et al., arXiv 2305.03288 (softmax gate), 2309.13850 (top-K), 2401.13875 (temperature), 2310.14188 (multinomial). The
papers' set-up: x uniform on [-1, 1], a true mixture of two experts, maximum likelihood from a start near the truth, the
Voronoi distance of the estimate against the number n of examples, on logarithmic axes. The predicted exponents leave out
logarithms of n.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from gatework.claims.base import Claim, Finding, judged, slope
from gatework.experts.gaussian_moe import GaussianMoE
from gatework.experts.multinomial_moe import MultinomialMoE
from gatework.experts.voronoi import voronoi_loss

Model = GaussianMoE | MultinomialMoE
#: How near to the predicted exponent counts as right.
MARGIN = 0.1
HALF = (-0.5 - MARGIN, -0.5 + MARGIN)


def gaussian(**settings: Any) -> GaussianMoE:
    """The true Gaussian mixture: two experts that differ in every parameter."""
    true = GaussianMoE(1, 2, **settings).double()
    with torch.no_grad():
        true.gate_weight.copy_(torch.tensor([[3.0], [0.0]]))
        true.gate_bias.copy_(torch.tensor([0.2, 0.0]))
        true.slope.copy_(torch.tensor([[1.5], [-1.0]]))
        true.intercept.copy_(torch.tensor([-1.0, 1.5]))
        true.log_variance.copy_(torch.tensor([0.3, 0.4]).log())
    return true


def multinomial(transform: Literal["tanh"] | None) -> MultinomialMoE:
    """The true multinomial mixture: three classes, and a second expert that ignores x (d = 0)."""
    true = MultinomialMoE(1, 2, 3, transform).double()
    with torch.no_grad():
        true.gate_weight.copy_(torch.tensor([[2.0], [0.0]]))
        true.gate_bias.copy_(torch.tensor([0.2, 0.0]))
        true.slope.copy_(torch.tensor([[[2.0], [-1.5]], [[0.0], [0.0]]]))
        true.intercept.copy_(torch.tensor([[0.5, -0.5], [-1.0, 1.0]]))
    return true


def start(true: Model, made: Model, generator: torch.Generator, noise: float) -> Model:
    """``made`` near the truth: its atoms are the true ones, the last true one as often as there are too many, all a little off."""
    copies = [min(i, true.experts - 1) for i in range(made.experts)]
    with torch.no_grad():
        for (name, p), q in zip(made.named_parameters(), true.parameters(), strict=True):
            p.copy_(q[copies] if q.dim() else q)
            if name == "gate_bias":
                counts = torch.tensor([copies.count(i) for i in copies], dtype=torch.float64)
                p.sub_(counts.log())
            p.add_(noise * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return made


def hellinger(fitted: Model, true: Model) -> float:
    """The Hellinger distance of the conditional densities, mean over x."""
    x = torch.linspace(-1, 1, 41, dtype=torch.float64)[:, None]
    with torch.no_grad():
        if isinstance(true, MultinomialMoE):
            assert isinstance(fitted, MultinomialMoE)
            roots = [(model.log_probs(x) / 2).exp() for model in (fitted, true)]
            squared = (roots[0] - roots[1]).square().sum(1) / 2
        else:
            y = torch.linspace(-8, 8, 1601, dtype=torch.float64)
            rows, columns = x.repeat_interleave(len(y), 0), y.repeat(len(x))
            roots = [(model(rows, columns) / 2).exp().view(len(x), -1) for model in (fitted, true)]
            squared = torch.trapezoid((roots[0] - roots[1]).square(), y, dim=1) / 2
        return math.sqrt(float(squared.mean()))


def errors(
    true: Model, make: Callable[[], Model], sizes: Sequence[int], replicates: int, restarts: int, noise: float, width: float = 1.0
) -> dict[str, dict[int, list[float]]]:
    """By quantity and n the errors of the replicates: the parameters' by name, and the density's Hellinger distance."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for n in sizes:
        for replicate in range(replicates):
            generator = torch.Generator().manual_seed(1_000_000 + 1000 * replicate + n)
            x = width * (2 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1)
            y = true.sample(x, generator)
            best, reached = None, -math.inf
            for _ in range(restarts):
                fitted = start(true, make().double(), generator, noise)
                value = fitted.fit(x, y)
                if value > reached:
                    best, reached = fitted, value
            assert best is not None
            near = voronoi_loss(best.atoms(), true.atoms(), overfitted=best.experts > true.experts)
            for name, error in (near.errors | {"Voronoi loss": near.loss}).items():
                found[name][n].append(error)
            found["density"][n].append(hellinger(best, true))
    return found


def gap(kept: int, apart: float) -> float:
    """Total variation between a top-2 mixture of three experts and one of four atoms near it that keeps ``kept``, mean over x.

    The true expert that every x prefers is split into two atoms of half its weight, ``apart`` from each other in b1.
    """
    true = GaussianMoE(1, 3, top_k=2).double()
    split = GaussianMoE(1, 4, top_k=kept).double()
    order = torch.tensor([0, 0, 1, 2])
    with torch.no_grad():
        true.gate_weight.copy_(torch.tensor([[4.0], [2.0], [0.0]]))
        true.gate_bias.zero_()
        true.slope.copy_(torch.tensor([[1.0], [-1.0], [0.5]]))
        true.intercept.copy_(torch.tensor([-1.0, 1.5, 0.0]))
        for mine, theirs in zip(split.parameters(), true.parameters(), strict=True):
            mine.copy_(theirs[order])
        split.gate_bias[:2] -= math.log(2)
        split.gate_weight[:2] += torch.tensor([[apart], [-apart]])
        x = torch.linspace(0.05, 1, 20, dtype=torch.float64)[:, None]
        y = torch.linspace(-10, 10, 2001, dtype=torch.float64)
        rows, columns = x.repeat_interleave(len(y), 0), y.repeat(len(x))
        densities = [model(rows, columns).exp().view(len(x), -1) for model in (true, split)]
        return float(torch.trapezoid((densities[0] - densities[1]).abs(), y, dim=1).mean() / 2)


class SoftmaxMoETheory(Claim):
    """The rates of maximum likelihood in mixtures with the right and with too many experts, and with a temperature."""

    paper = "softmax_moe_theory"
    statement = (
        "Fitted by maximum likelihood to one-dimensional data of two experts, a mixture with two experts finds every parameter at "
        "a rate of n^-1/2; with three, the Voronoi loss and the density still fall at n^-1/2, but the gate and intercept of the "
        "doubled expert at n^-1/8 and its slope and variance at n^-1/4 in the worst case; a trained temperature over a linear gate "
        "has no polynomial rate, over a sigmoid one it has."
    )
    duration = "about 15 minutes"
    settings: ClassVar[dict[str, Any]] = {"sizes": [500, 1581, 5000, 15811], "replicates": 40, "restarts": 1}
    quick: ClassVar[dict[str, Any]] = {"sizes": [316, 3162], "replicates": 6, "restarts": 1}

    def measure(self, say: Callable[[str], None], **settings: Any) -> list[Finding]:
        """All slopes."""
        before = torch.random.get_rng_state()
        try:
            return [*self._exact(say, settings), *self._too_many(say, settings), *self._top_k(), *self._temperature(say, settings),
                    *self._multinomial(say, settings)]  # fmt: skip
        finally:
            torch.random.set_rng_state(before)

    def _exact(self, say: Callable[[str], None], settings: dict[str, Any]) -> list[Finding]:
        say("two experts, two fitted")
        found = errors(gaussian(), partial(GaussianMoE, 1, 2), **settings, noise=0.05)
        names = ("gate", "slope", "intercept", "variance", "density")
        return [slope(f"two experts fitted: {name}", found[name], *HALF, "-1/2") for name in names]

    def _too_many(self, say: Callable[[str], None], settings: dict[str, Any]) -> list[Finding]:
        say("two experts, three fitted")
        found = errors(gaussian(), partial(GaussianMoE, 1, 3), **settings, noise=0.05)
        findings = [slope(f"three experts fitted: {name}", found[name], *HALF, "-1/2") for name in ("Voronoi loss", "density")]
        for name, slowest in {"gate": "1/8", "intercept": "1/8", "slope": "1/4", "variance": "1/4"}.items():
            # The slowest rate is that of the worst truth and the worst fit; a new atom of little weight does less harm.
            high = -1 / int(slowest[2:]) + MARGIN
            words = f"slower than -1/2, -{slowest} at the slowest"
            findings.append(slope(f"three experts fitted: {name}", found[name], -0.5, high, words))
        return findings

    def _top_k(self) -> list[Finding]:
        findings = []
        for kept, low, high, words in ((2, 0.05, 1.0, "above 0.05"), (3, -1e-3, 1e-3, "0")):
            gaps = [gap(kept, apart) for apart in (1e-3, 1e-4, 1e-5)]
            what = f"top-2 of 3 experts, one split in two, {kept} kept: total variation as the split closes"
            findings.append(judged(what, words, gaps, low, high))
        return findings

    def _temperature(self, say: Callable[[str], None], settings: dict[str, Any]) -> list[Finding]:
        findings = []
        for activation, bounds, words in ((None, (-MARGIN, math.inf), "no power of n"), ("sigmoid", HALF, "-1/2")):
            what = f"temperature over a {activation or 'linear'} gate"
            say(what)
            true = gaussian(activation=activation, temperature=True)
            found = errors(true, partial(copy.deepcopy, true), **settings, noise=0.1)
            findings += [slope(f"{what}: {name}", found[name], *bounds, words) for name in ("temperature", "gate")]
            findings.append(slope(f"{what}: density", found["density"], *HALF, "-1/2"))
        return findings

    def _multinomial(self, say: Callable[[str], None], settings: dict[str, Any]) -> list[Finding]:
        findings = []
        cases: tuple[tuple[Literal["tanh"] | None, tuple[float, float], str], ...] = (
            (None, (-0.25 + MARGIN, math.inf), "slower than any power of n"), ("tanh", (-0.5, -0.25 + MARGIN), "-1/4 or faster"),
        )  # fmt: skip
        for transform, bounds, words in cases:
            what = f"multinomial, three experts fitted, {transform or 'plain'} gate"
            say(what)
            made = partial(MultinomialMoE, 1, 3, 3, transform)
            found = errors(multinomial(transform), made, **settings, noise=0.05, width=2.0)
            findings += [slope(f"{what}: {name}", found[name], *bounds, words) for name in ("gate", "slope", "intercept")]
            findings.append(slope(f"{what}: probabilities", found["density"], *HALF, "-1/2"))
        return findings


CLAIM: Claim = SoftmaxMoETheory()
