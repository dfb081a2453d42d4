"""What every registered optimizer, schedule and learner keeps."""

from __future__ import annotations

import pytest

from gatework.core import entries

from . import training


def every(slot: str):
    return pytest.mark.parametrize("cls", [pytest.param(entry.cls, id=entry.name) for entry in entries(slot)])


@every("optim")
def test_foreach_equals_the_plain_loop(cls):
    training.check_foreach(cls)


@every("optim")
def test_optimizers_resume(cls):
    training.check_resuming(cls)


@every("optim")
def test_parameters_without_a_gradient(cls):
    training.check_missing_gradients(cls)


@every("optim")
def test_parameter_groups(cls):
    training.check_groups(cls)


@every("optim")
def test_closures(cls):
    training.check_closure(cls)


@every("optim")
def test_refusals(cls):
    training.check_refusals(cls)


@every("optim")
def test_complex_parameters(cls):
    training.check_complex(cls)


@every("optim")
def test_descent(cls):
    training.check_descent(cls)


@every("optim")
def test_optimizers_are_copied(cls):
    training.check_optimizer_copies(cls)


@every("schedule")
def test_rates(cls):
    training.check_rates(cls)


@every("schedule")
def test_schedules_resume(cls):
    training.check_schedule_resuming(cls)


@every("learner")
def test_estimate(cls):
    training.check_estimate(cls)


@every("learner")
def test_learning(cls):
    training.check_learning(cls)


@every("learner")
def test_prediction(cls):
    training.check_prediction(cls)


@every("learner")
def test_learners_resume(cls):
    training.check_learner_resuming(cls)
