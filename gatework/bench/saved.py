"""Models that ``gatework compare --save`` kept: read back, evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatework.bench import checkpoint
from gatework.bench.study import Study, restore
from gatework.bench.tasks import make_task
from gatework.bench.trainer import build_model


def load_model(path: str | Path) -> tuple[nn.Module, Study, Any]:
    """The trained model of a checkpoint in evaluation mode, its study and its task.

    Raises:
        GateworkError: a file that is no whole checkpoint of a model, or whose data are gone.
    """
    about = checkpoint.describe(path)
    if "variant" not in about:
        raise checkpoint.CheckpointError(f"{str(path)!r} holds the state of a running trial, not a model")
    study = restore(about["study"])
    task = make_task(study.task["name"], **{key: value for key, value in study.task.items() if key != "name"})
    model = build_model(task, study.resolved[about["variant"]], about["config"]["d_ff"])
    try:
        model.load_state_dict(checkpoint.load(path, about["config_hash"]))
    except RuntimeError as error:
        raise checkpoint.CheckpointError(
            f"the checkpoint {str(path)!r} does not fit this version's parts: {str(error).splitlines()[0]}"
        ) from error
    return model.eval(), study, task


@torch.no_grad()
def evaluate(path: str | Path, split: str = "test") -> dict[str, float]:
    """Scores of a kept model on a split (``"validation"`` or ``"test"``) of its study's task; raises as
    :func:`load_model`."""
    model, _, task = load_model(path)
    scores: dict[str, float] = task.evaluate(model, split)
    return scores
