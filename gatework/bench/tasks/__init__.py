"""The tasks: data, a loss and a score, by name."""

from __future__ import annotations

from typing import Any, get_type_hints

from gatework.bench.tasks.base import Batch, Predict, Split, SupervisedTask, Task
from gatework.bench.tasks.click_through import ClickThrough
from gatework.bench.tasks.digits import Digits
from gatework.bench.tasks.dynamical_systems import DynamicalSystems
from gatework.bench.tasks.federated_digits import FederatedDigits
from gatework.bench.tasks.graph_algorithms import GraphAlgorithms
from gatework.bench.tasks.image_regression import ImageRegression
from gatework.bench.tasks.in_context_ar import InContextAR
from gatework.bench.tasks.listops import ListOps, listops_eval
from gatework.bench.tasks.masked_digits import MaskedDigits
from gatework.bench.tasks.mixture_regression import MixtureRegression
from gatework.bench.tasks.mnist1d import MNIST1D
from gatework.bench.tasks.multitask_digits import MultitaskDigits
from gatework.bench.tasks.multitask_regression import MultitaskRegression
from gatework.bench.tasks.parity import Parity
from gatework.bench.tasks.pfn_gp import GPPrior
from gatework.bench.tasks.pvr import PVR, boolean_influence, noise_stability
from gatework.bench.tasks.ranking import Ranking
from gatework.bench.tasks.recall import Recall
from gatework.bench.tasks.reversal import Reversal
from gatework.bench.tasks.s5_words import S5Words
from gatework.bench.tasks.selective_copy import SelectiveCopy
from gatework.bench.tasks.text import Text
from gatework.core.errors import GateworkError
from gatework.core.registry import _describe as describe
from gatework.core.registry import _fits as fits
from gatework.core.registry import parameters, suggest

#: The tasks by name.
TASKS: dict[str, type[Task]] = {
    task.name: task for task in (
        Text, Digits, MNIST1D, Recall, ClickThrough, ImageRegression, MixtureRegression, MultitaskRegression, MultitaskDigits,
        FederatedDigits, DynamicalSystems, Ranking, MaskedDigits, SelectiveCopy, ListOps, Parity, S5Words, PVR, InContextAR,
        GPPrior, Reversal, GraphAlgorithms,
    )
}


def task_class(name: str) -> type[Task]:
    """The task called ``name``.

    Raises:
        GateworkError: saying what was meant and what exists.
    """
    if not isinstance(name, str) or name not in TASKS:
        raise GateworkError(f"no task {name!r}; {suggest(str(name), TASKS)}")
    return TASKS[name]


def make_task(name: str, **options: Any) -> Task:
    """Load the task called ``name`` with its options.

    Raises:
        GateworkError: unknown task or option, an option of the wrong type, data that does not serve.
    """
    cls = task_class(name)
    known = parameters(cls)
    hints = get_type_hints(cls.__init__)
    for option, value in options.items():
        if option not in known:
            raise GateworkError(f"the task {name} has no option {option!r}; {suggest(option, known) if known else 'it has none'}")
        if not fits(value, hints[option]):
            raise GateworkError(f"the task {name}: {option} must be {describe(hints[option])}, got {value!r}")
    return cls(**options)


__all__ = [
    "TASKS", "Batch", "Predict", "Split", "SupervisedTask", "Task", "boolean_influence", "listops_eval", "make_task",
    "noise_stability", "task_class",
]
