"""One trial: a variant trained once, validated on the way, tested at the end, its cost measured as it runs; and its
record."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from gatework.bench import checkpoint
from gatework.bench.record import digest, hardware, say, versions
from gatework.bench.store import Plan
from gatework.bench.study import Study, Variant
from gatework.bench.trainer import Diverged, Log, Progress, build_learner, build_model, fit
from gatework.core.contracts import metrics
from gatework.core.cost import active_parameters, count_flops, count_parameters
from gatework.models import Decoder

#: The validation on the way of a final run looks at this many batches; what decides (tuning, test) looks at all.
CURVE_BATCHES = 4


def run(
    study: Study,
    task: Any,
    plan: Plan,
    fitted: Mapping[str, Any],
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    folder: Path | None = None,
    save: bool = False,
) -> dict[str, Any]:
    """Run one trial and return its record; nothing a trial does raises, except an interruption.

    Args:
        study: with its variants resolved.
        task: the study's task.
        plan: which trial; its learning rate decided.
        fitted: the variant's entry of :func:`gatework.bench.matching.match`.
        device: where to train.
        progress: told how far the trial is.
        folder: the study's folder, where a long trial leaves checkpoints.
        save: keep the trained model there.
    """
    variant = study.resolved[plan.variant]
    config = {
        "task": study.task,
        "variant": variant.describe(),
        "d_ff": fitted["d_ff"],
        "tokens": _budget(study, plan, fitted),
        "batch_size": study.batch_size,
        "learning_rate": plan.learning_rate,
        "seed": plan.seed,
        "phase": plan.phase,
        "evaluations": study.evaluations,
        "clip_norm": 1.0,
    }
    record: dict[str, Any] = {
        "study": study.name,
        "key": plan.key,
        "variant": plan.variant,
        "phase": plan.phase,
        "index": plan.index,
        "seed": plan.seed,
        "status": "ok",
        "error": None,
        "config": config,
        "config_hash": digest(config),
        "study_hash": study.hash,
        "versions": versions(),
        "data_hash": study.data_hash,
        "task": study.task["name"],
        "learning_rate": plan.learning_rate,
        "validation": {},
        "test": None,
        "score": None,
        "curve": [],
        "cost": {},
        "metrics": {},
    }
    log = Log()
    try:
        trial = _Trial(study, task, plan, variant, config, record["config_hash"], device, folder)
        record["hardware"] = hardware(device)
        trial.train(log, progress)
        record |= trial.results(log)
        if save and folder:
            trial.save(folder)
        trial.forget()
    except Diverged as error:
        record |= {"status": "diverged", "error": str(error)}
    except Exception as error:  # A trial's failure is a result; the study goes on.
        record |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    record.setdefault("hardware", hardware())
    record["curve"], record["validation"] = log.curve, {} if record["status"] == "diverged" else log.validation
    record["metrics"] = {name: _mean(values) for name, values in log.metrics.items()}
    return record


def _budget(study: Study, plan: Plan, fitted: Mapping[str, Any]) -> int:
    """Tokens of a trial: the final budget is the fitted one, a tuning trial's is scaled alike."""
    if plan.phase == "final":
        return int(fitted["tokens"])
    return max(1, round(study.tune_tokens * fitted["tokens"] / study.tokens))


class _Trial:
    def __init__(
        self,
        study: Study,
        task: Any,
        plan: Plan,
        variant: Variant,
        config: dict[str, Any],
        config_hash: str,
        device: str,
        folder: Path | None,
    ) -> None:
        assert plan.learning_rate is not None
        self.study, self.task, self.plan, self.config = study, task, plan, config
        self.config_hash, self.device = config_hash, torch.device(device)
        self.units = task.units_per_batch(study.batch_size)
        self.steps = max(1, math.ceil(config["tokens"] / self.units))
        # The same seed for every variant: parts that draw alike start alike. What follows draws from here on,
        # whatever the parts drew.
        torch.manual_seed(plan.seed)
        self.model = build_model(task, variant, config["d_ff"]).to(self.device)
        self.learner = build_learner(self.model, task, variant, plan.learning_rate, self.steps)
        torch.manual_seed(plan.seed + 1)
        self.kept = folder / "checkpoints" / f"{plan.key.replace('/', '-')}.safetensors" if folder else None

    def train(self, log: Log, progress: Progress | None) -> None:
        self._continue(log)
        probes = {1 + round((self.steps - 1) * share) for share in (0.0, 0.5, 1.0)}
        self.model.train()
        tuning = self.plan.phase == "tune"
        fit(
            self.learner,
            self._batches(log.step),
            self.steps,
            units=self.units,
            evaluate=lambda: self._evaluate("validation", None if tuning else CURVE_BATCHES),
            evaluations=1 if tuning else self.study.evaluations,
            probes=probes,
            progress=progress,
            keep=self._keep,
            log=log,
        )

    def _batches(self, skip: int) -> Iterator[Any]:
        for x, y in islice(self.task.batches(self.plan.seed, self.study.batch_size), skip, None):
            yield x.to(self.device), y.to(self.device)

    def _evaluate(self, split: str, max_batches: int | None = None) -> dict[str, float]:
        self.model.eval()
        try:
            with torch.no_grad():
                scores = self.task.evaluate(lambda x: self.learner.predict(x.to(self.device)).cpu(), split, max_batches)
        finally:
            self.model.train()
        return {name: float(value) for name, value in scores.items()}

    def results(self, log: Log) -> dict[str, Any]:
        """Scores and cost of a run that ended well."""
        test = self._evaluate("test") if self.plan.phase == "final" else None
        scores = test or log.validation
        score = scores[self.task.score_name]
        if not all(math.isfinite(value) for value in scores.values()):
            raise Diverged(f"the {'test' if test else 'validation'} score was {score}")
        x, _ = next(self._batches(0))
        self.model.eval()
        with torch.no_grad(), count_flops() as count:
            self.learner.predict(x)
        metrics(self.model)
        flops = sum(log.flops) / len(log.flops) / self.units
        # Counted steps are slower than others: their time is taken to be the others' mean.
        seconds = log.seconds * self.steps / max(log.timed_steps, 1)
        cost = {
            "parameters": count_parameters(self.model),
            "active_parameters": active_parameters(self.model),
            "train_flops_per_token": flops,
            "forward_flops_per_token": count.total / self.units,
            "train_flops": flops * self.units * self.steps,
            "seconds": seconds,
            "tokens_per_second": self.units * self.steps / max(seconds, 1e-9),
            "peak_bytes": log.peak_bytes,
            "tokens": self.units * self.steps,
            "decode_state_bytes": self.model.state_bytes(x.shape[1]) if isinstance(self.model, Decoder) else None,
        }
        return {"test": test, "score": score, "cost": cost}

    def save(self, folder: Path) -> None:
        about = {"study": self.study.describe(), "variant": self.plan.variant, "key": self.plan.key, "config": self.config}
        path = folder / "models" / f"{self.plan.key.replace('/', '-')}.safetensors"
        checkpoint.save(path, self.model.state_dict(), about | {"config_hash": self.config_hash})

    # Long trials

    def _keep(self, log: Log) -> None:
        """Write a checkpoint; a trial whose learner or disk does not allow one simply starts over when it is
        interrupted."""
        if self.kept:
            tree = {"learner": self.learner.state_dict(), "random": checkpoint.random_state(self.device), "log": vars(log)}
            try:
                checkpoint.save(self.kept, tree, {"config_hash": self.config_hash})
            except (TypeError, checkpoint.CheckpointError) as error:
                say(f"{self.plan.key} goes on without checkpoints: {error}")
                self.kept = None

    def _continue(self, log: Log) -> None:
        if self.kept is None or not self.kept.exists():
            return
        try:
            tree = checkpoint.load(self.kept, self.config_hash)
        except checkpoint.CheckpointError:  # Written by a run that was stopped: start over.
            return
        self.learner.load_state_dict(tree["learner"])
        checkpoint.set_random_state(tree["random"], self.device)
        vars(log).update(tree["log"])

    def forget(self) -> None:
        """Remove the trial's checkpoint: its record is the result."""
        if self.kept:
            self.kept.unlink(missing_ok=True)


def _mean(values: list[Any]) -> Any:
    """The mean of numbers, or of lists of numbers element by element; non-finite values become None."""
    if isinstance(values[0], list):
        same = [value for value in values if isinstance(value, list) and len(value) == len(values[0])]
        return [_mean(list(column)) for column in zip(*same, strict=True)]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
