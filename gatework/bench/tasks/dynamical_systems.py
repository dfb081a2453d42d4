"""``dynamical_systems``: families of small differential equations, many systems of each, few trajectories of each system."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from gatework.bench.tasks.base import Batch, RegressionTask
from gatework.core.errors import GateworkError

#: Seconds between two states of a trajectory, states per trajectory, Runge-Kutta steps between two states.
INTERVAL, STATES, SUBSTEPS = 0.2, 21, 4
#: Trajectories of a system that validate, as many that test; those of a new system that it is adapted to, and scored on.
HELD, SUPPORT = 2, 1

Field = Callable[[Tensor, Tensor], Tensor]


def lotka_volterra(z: Tensor, p: Tensor) -> Tensor:
    """Prey x and predators y: x' = x/2 - b x y, y' = d x y - y/2."""
    x, y = z.unbind(-1)
    return torch.stack([0.5 * x - p[..., 0] * x * y, p[..., 1] * x * y - 0.5 * y], -1)


def van_der_pol(z: Tensor, p: Tensor) -> Tensor:
    """An oscillator with nonlinear damping: x' = y, y' = mu (1 - x^2) y - w x."""
    x, y = z.unbind(-1)
    return torch.stack([y, p[..., 0] * (1 - x * x) * y - p[..., 1] * x], -1)


def pendulum(z: Tensor, p: Tensor) -> Tensor:
    """Angle x and speed y, damped: x' = y, y' = -w sin x - g y."""
    x, y = z.unbind(-1)
    return torch.stack([y, -p[..., 0] * torch.sin(x) - p[..., 1] * y], -1)


def selkov(z: Tensor, p: Tensor) -> Tensor:
    """Glycolysis: x' = -x + a y + x^2 y, y' = b - a y - x^2 y."""
    x, y = z.unbind(-1)
    return torch.stack([-x + p[..., 0] * y + x * x * y, p[..., 1] - p[..., 0] * y - x * x * y], -1)


#: Each family's right-hand side, the ranges of its two parameters and of the two initial values.
FAMILIES: tuple[tuple[Field, tuple[tuple[float, float], tuple[float, float]], tuple[float, float]], ...] = (
    (lotka_volterra, ((0.25, 1.0), (0.25, 1.0)), (0.5, 2.0)),
    (van_der_pol, ((0.2, 1.5), (0.5, 1.5)), (-2.0, 2.0)),
    (pendulum, ((1.0, 4.0), (0.0, 0.5)), (-2.0, 2.0)),
    (selkov, ((0.05, 0.15), (0.3, 0.9)), (0.2, 1.5)),
)


class DynamicalSystems(RegressionTask):
    """From a state of a known system to its mean rate of change over the next 0.2 seconds.

    An environment is one system: a family (Lotka-Volterra, van der Pol, damped pendulum, Selkov) with parameters of its own,
    drawn uniformly from the family's ranges. An input row is the environment's number and the state (3 columns); the target is
    (z(t + 0.2) - z(t)) / 0.2. States and rates of all environments of a family share their scale: divided by the
    training states' and rates' standard deviations, after subtracting the states' mean, so that families weigh alike and 1 is
    about the score of a model that knows nothing.

    The score is that of states on trajectories that were never seen, of the systems that were trained on: a task of the bench
    hands a model nothing to adapt to. What adaptation to new systems gives is measured with :meth:`unseen`.

    Args:
        families: 1 to 4, in the order above.
        systems: systems per family.
        trajectories: training trajectories per system, of 20 states each; 2 more validate and 2 test.
        seed: of parameters and initial values.

    Raises:
        GateworkError: counts out of range.
    """

    name = "dynamical_systems"
    backbone = "environments"
    EVALUATION_BATCH = 4096
    defaults: ClassVar[Mapping[str, Any]] = {
        "tokens": 800_000,
        "tune_tokens": 250_000,
        "batch_size": 512,
        "learning_rates": (1e-3, 2e-2),
        "baseline": "experts=1, d_ff=132",
        "model": {},
    }

    def __init__(self, families: int = 4, systems: int = 8, trajectories: int = 4, seed: int = 0) -> None:
        if not 1 <= families <= len(FAMILIES) or min(systems, trajectories) < 1:
            given = f"{families}, {systems} and {trajectories}"
            raise GateworkError(f"families is 1 to {len(FAMILIES)}, systems and trajectories at least 1, got {given}")
        self.families, self.systems, self.seed = families, systems, seed
        generator = torch.Generator().manual_seed(seed)
        known = [_simulate(f, systems, trajectories + 2 * HELD, generator) for f in range(families)]
        self.scales = [_scale(states[:, :trajectories], rates[:, :trajectories]) for states, rates in known]
        cuts = {
            "train": slice(trajectories), "validation": slice(trajectories, trajectories + HELD),
            "test": slice(trajectories + HELD, None),
        }
        super().__init__({name: self._rows(known, cut) for name, cut in cuts.items()})

    def _rows(self, simulated: list[tuple[Tensor, Tensor]], cut: slice) -> Batch:
        inputs, targets = [], []
        for f, ((states, rates), (mean, std, speed)) in enumerate(zip(simulated, self.scales, strict=True)):
            for s in range(len(states)):
                z = ((states[s, cut] - mean) / std).flatten(0, 1)
                number = torch.full((len(z), 1), float(f * len(states) + s), dtype=z.dtype)
                inputs.append(torch.cat([number, z], 1))
                targets.append((rates[s, cut] / speed).flatten(0, 1))
        return torch.cat(inputs).float(), torch.cat(targets).float()

    def model_arguments(self) -> dict[str, Any]:
        """Two inputs beside the environment's number, two outputs, the number of environments."""
        return {"inputs": 2, "outputs": 2, "environments": self.families * self.systems}

    def unseen(self, systems: int = 4) -> tuple[Batch, Batch]:
        """New systems of the same families, numbered from 0, family by family: one trajectory of each to adapt to, and 2 to
        score on."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        new = [_simulate(f, systems, SUPPORT + HELD, generator) for f in range(self.families)]
        return self._rows(new, slice(SUPPORT)), self._rows(new, slice(SUPPORT, None))


def _simulate(family: int, systems: int, trajectories: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """States (systems, trajectories, 20, 2) and mean rates from each to the next."""
    field, ranges, (low, high) = FAMILIES[family]
    bounds = torch.tensor(ranges, dtype=torch.float64)
    drawn = torch.rand(systems, 1, 2, dtype=torch.float64, generator=generator)
    p = bounds[:, 0] + drawn * (bounds[:, 1] - bounds[:, 0])
    z = low + (high - low) * torch.rand(systems, trajectories, 2, dtype=torch.float64, generator=generator)
    states, h = [z], INTERVAL / SUBSTEPS
    for _ in range(STATES - 1):
        for _ in range(SUBSTEPS):
            a = field(z, p)
            b = field(z + h / 2 * a, p)
            c = field(z + h / 2 * b, p)
            z = z + h / 6 * (a + 2 * b + 2 * c + field(z + h * c, p))
        states.append(z)
    path = torch.stack(states, 2)
    return path[:, :, :-1], path.diff(dim=2) / INTERVAL


def _scale(states: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of the states, root mean square of the rates, of each coordinate."""
    flat = states.flatten(0, 2)
    return flat.mean(0), flat.std(0, correction=0), rates.flatten(0, 2).square().mean(0).sqrt()
