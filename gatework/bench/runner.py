"""From a study to its comparison: fit, plan, share the trials out over worker processes, collect the records."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gatework.bench import study as studies
from gatework.bench.matching import match
from gatework.bench.progress import Display
from gatework.bench.record import read_json, versions, write_json
from gatework.bench.settings import read_toml
from gatework.bench.store import Plan, Store, Trial, storage_error, without_password
from gatework.bench.study import Study
from gatework.bench.worker import PARENT, STORE, one_thread, reload, take_trials
from gatework.core.errors import GateworkError
from gatework.core.registry import entries, suggest

if TYPE_CHECKING:
    from gatework.bench.comparison import Comparison

#: All tuning trials share this seed, which no final run has: learning rates are compared on equal terms.
TUNE_SEED = 1_000_003
#: Seed of the Sobol points: of 200 scramblings the one whose first 2, 3, 4, 5, 6 and 8 points leave the smallest gaps.
SCRAMBLING = 37
#: A trial during which this many workers die in one session is recorded as failed.
DEATHS = 3


class TrialsFailed(Exception):
    """The study ended, but trials failed; ``comparison`` holds what there is."""

    def __init__(self, message: str, comparison: Comparison) -> None:
        super().__init__(message)
        self.comparison = comparison


def compare(
    file: str | Path | None = None,
    *,
    out: str | Path | None = None,
    store: str | None = None,
    workers: int | None = None,
    device: str | None = None,
    save: bool = False,
    quiet: bool = False,
    strict: bool = False,
    **settings: Any,
) -> Comparison:
    """Train variants on equal terms and compare them.

    A study that was started before under the same name is continued; finished trials are not run again.

    Args:
        file: a study in TOML; what is given beside it wins.
        out: folder of the results, ``runs/NAME`` by default.
        store: SQLAlchemy URL of an Optuna storage; an SQLite file in ``out`` by default.
        workers: processes that train side by side, one thread each: the number of cores by default, 1 on a GPU. 0
            trains in this process, which is also what happens where parts are defined in the running script.
        device: ``"cpu"`` or ``"cuda"``; a GPU is used where there is one.
        save: keep the models of the final runs in ``out/models``.
        quiet: show no progress.
        strict: raise :class:`TrialsFailed` where a trial failed.
        settings: the keys of a study file: ``task``, ``data``, ``variants`` (settings by name), ``baseline``,
            ``tokens``, ``tune_tokens``, ``seeds``, ``tune``, ``match``, ``learning_rates``, ``batch_size``,
            ``model``, ``evaluations``, ``imports``, ``name``.

    Raises:
        GateworkError: with one sentence, for anything that is wrong with what was given, before anything trains.

    Example, on a file of one's own::

        >>> comparison = compare(data="mybook.txt", variants={"lin": "mixer=gla"}, tokens=2e6, seeds=5)
        >>> print(comparison.table())
    """
    values = read_toml(file) if file is not None else {}
    values |= {key: value for key, value in settings.items() if value is not None}
    unknown = set(settings) - set(Study.__dataclass_fields__) - {"data"}
    if unknown:
        name = min(unknown)
        raise GateworkError(f"a study has no setting {name!r}; {suggest(name, [*Study.__dataclass_fields__, 'data'])}")
    if out is not None and settings.get("name") is None:
        values["name"] = Path(out).name
    study = studies.define(values)
    folder = Path(out) if out is not None else Path("runs") / study.name
    with one_thread():
        return _run(study, folder, store, workers, device or default_device(), save, quiet, strict)


def resume(
    out: str | Path, *, store: str | None = None, workers: int | None = None, quiet: bool = False, strict: bool = False
) -> Comparison:
    """Continue a study where it stopped; failed trials are tried again.

    Args:
        out: folder of the study.
        store: URL of the store, where it has a password (which ``study.json`` does not keep) or has moved.
        workers, quiet, strict: as in :func:`compare`.

    Raises:
        GateworkError: there is no study in ``out``, or its data have changed.
    """
    folder = Path(out)
    definition = read_json(folder / "study.json", "study")
    if "definition" not in definition:
        raise GateworkError(f"{str(folder / 'study.json')!r} does not describe a study that can be continued")
    study, _ = reload(definition)
    with one_thread():
        url, device, save = store or definition["store"], definition["device"], definition["save"]
        return _run(study, folder, url, workers, device, save, quiet, strict, retry=True)


def default_device() -> str:
    """A GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _run(
    study: Study,
    folder: Path,
    url: str | None,
    workers: int | None,
    device: str,
    save: bool,
    quiet: bool,
    strict: bool,
    retry: bool = False,
) -> Comparison:
    from gatework.bench.comparison import Comparison
    from gatework.bench.tasks import make_task

    _refuse_other(folder, study)
    task = make_task(study.task["name"], **{key: value for key, value in study.task.items() if key != "name"})
    for variant in study.resolved.values():  # Whatever cannot be built is told before anything is written.
        from gatework.bench.trainer import build_learner, build_model

        build_learner(build_model(task, variant), task, variant, variant.learning_rates[0], 10)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "records").mkdir(exist_ok=True)
    except OSError as error:
        raise GateworkError(f"the output folder {str(folder)!r} cannot be written: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise GateworkError(f"the output folder {str(folder)!r} cannot be written: permission denied")
    try:
        store = Store(url or str(folder / "study.db"), study.name, create=True, lower_is_better=task.lower_is_better)
    except GateworkError:
        raise
    except Exception as error:
        raise GateworkError(storage_error(error) or str(error)) from error
    try:
        definition = _define(study, task, store, folder, url, device, save, quiet)
        write_json(folder / "study.json", definition)
        if retry:
            for trial in store.trials():
                if trial.state == "FAIL":
                    store.retry(trial)
        _finish(store, study, task, definition, folder, workers, quiet)
        trials = store.trials()
    except Exception as error:
        if sentence := storage_error(error):
            raise GateworkError(sentence) from error
        raise
    finally:
        store.close()
    records = [trial.record for trial in trials if trial.record]
    comparison = Comparison(definition, records)
    failed = [record for record in records if record["status"] == "failed"]
    if failed and strict:
        first = failed[0]
        raise TrialsFailed(f"{len(failed)} of {len(records)} trials failed, the first {first['key']}: {first['error']}", comparison)
    return comparison


def _refuse_other(folder: Path, study: Study) -> None:
    path = folder / "study.json"
    if not path.exists():
        return
    known = read_json(path, "study")
    if known.get("config_hash") != study.hash:
        raise GateworkError(
            f"{str(folder)!r} holds the study {known.get('name')!r} with another configuration "
            f"({known.get('config_hash')}, not {study.hash}); choose another --out"
        )


def _define(
    study: Study, task: Any, store: Store, folder: Path, url: str | None, device: str, save: bool, quiet: bool
) -> dict[str, Any]:
    """The full definition: from the store, where the study was started before; fitted, planned and entered
    otherwise."""
    known = store.definition()
    definition = {
        "name": study.name,
        "task": study.task,
        "baseline": "baseline",
        "variants": {"baseline": study.baseline} | study.variants,
        "match": study.match,
        "tokens": study.tokens,
        "tune_tokens": study.tune_tokens,
        "seeds": study.seeds,
        "tune": study.tune,
        "learning_rates": list(study.learning_rates),
        "batch_size": study.batch_size,
        "model": study.model,
        "score": {"name": task.score_name, "unit": task.score_unit, "lower_is_better": task.lower_is_better},
        "unit": task.unit,
        "matched": known.get("matched"),
        "config_hash": study.hash,
        "data_hash": study.data_hash,
        "definition": study.describe(),
        "versions": versions(),
        "store": url and without_password(url),
        "out": str(folder.absolute()),
        "device": device,
        "save": save,
    }
    if not known:
        with Display(study.name, {}, quiet=quiet) as display:
            definition["matched"] = match(study, task, device, display.note)
    store.define(definition)
    store.plan(plan(study, definition["matched"]))
    return definition


def plan(study: Study, matched: Mapping[str, Mapping[str, Any]]) -> list[Plan]:
    """All trials: tuning first, the longest of each round first, so that little idles at the end."""
    order = sorted(study.resolved, key=lambda name: -matched[name]["seconds_per_token"] * matched[name]["tokens"])
    points = torch.quasirandom.SobolEngine(1, scramble=True, seed=SCRAMBLING).draw(max(study.tune, 1))[:, 0].double().tolist()
    plans = []
    for index in range(study.tune):
        for name in order:
            low, high = study.resolved[name].learning_rates
            rate = low * (high / low) ** points[index]
            plans.append(Plan(f"tune/{name}/{index}", name, "tune", index, TUNE_SEED, rate))
    for seed in range(study.seeds):
        for name in order:
            low, high = study.resolved[name].learning_rates
            rate = None if study.tune else (low * high) ** 0.5
            plans.append(Plan(f"final/{name}/seed{seed}", name, "final", seed, seed, rate))
    return plans


# Sharing out


def _finish(
    store: Store, study: Study, task: Any, definition: dict[str, Any], folder: Path, workers: int | None, quiet: bool
) -> None:
    """Run what is left, in this process or in others; records are written as they come."""
    written: set[str] = set()
    score = definition["score"]

    def collect(trials: list[Trial]) -> None:
        for trial in trials:
            if trial.record and trial.plan.key not in written:
                write_json(folder / "records" / f"{trial.plan.key}.json", trial.record)
                written.add(trial.plan.key)

    store.give_back_dead()
    trials = store.trials()
    collect(trials)
    waiting = sum(not trial.finished for trial in trials)
    count = _workers(workers, waiting, definition["device"])
    if not waiting:
        return
    share = study.tune_tokens / study.tokens
    with Display(study.name, definition["matched"], score["name"], definition["unit"], quiet, share) as display:
        display.update(trials)

        def show(_: Trial | None = None) -> None:
            now = store.trials()
            collect(now)
            display.update(now)

        try:
            if count == 0:
                take_trials(store, study, task, definition, tick=show)
            else:
                _Team(store, folder, count).supervise(show)
        finally:
            show()


def _workers(asked: int | None, waiting: int, device: str) -> int:
    if asked is not None:
        if asked < 0:
            raise GateworkError(f"workers must be at least 0, not {asked}")
        return min(asked, waiting)
    if any(entry.cls.__module__ == "__main__" for entry in entries()):
        return 0  # Another process would not know these parts.
    return min(
        1 if device != "cpu" else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, waiting
    )


class _Team:
    """The worker processes of one machine; a dead one's trial is given back and the worker replaced."""

    def __init__(self, store: Store, folder: Path, count: int) -> None:
        self.store, self.logs, self.count = store, folder / "logs", count
        self.processes: list[subprocess.Popen[bytes]] = []
        self.deaths: Counter[str] = Counter()

    def supervise(self, show: Any) -> None:
        """Until every trial has its result."""
        self.logs.mkdir(exist_ok=True)
        try:
            for _ in range(self.count):
                self._start()
            while not self.store.finished():
                self._replace_dead()
                self.store.give_back_dead()
                show()
                time.sleep(0.5)
        finally:
            self._stop()

    def _start(self) -> None:
        url = self.store.url if "://" in self.store.url else f"sqlite:///{Path(self.store.url).absolute()}"
        threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        environment = os.environ | threads | {STORE: url, PARENT: str(os.getpid())}
        with open(self.logs / f"worker{len(self.processes)}.log", "ab") as log:
            command = [sys.executable, "-m", "gatework.cli", "work", "--study", self.store.name]
            self.processes.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _replace_dead(self) -> None:
        for index, process in enumerate(self.processes):
            if process.poll() in (None, 0):
                continue
            mine = [t for t in self.store.trials() if t.state == "RUNNING" and t.owner and t.owner["pid"] == process.pid]
            key = mine[0].plan.key if mine else ""
            self.deaths[key] += 1
            if self.deaths[key] >= DEATHS:
                self._give_up(index, mine, process.returncode)
            for trial in mine:
                self.store.give_back(trial)
            last = self.processes.pop(index)
            assert last is process
            self._start()
            return

    def _give_up(self, index: int, trials: list[Trial], code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        if not trials:
            lines = [line for log in sorted(self.logs.glob("*.log")) for line in log.read_text(errors="replace").splitlines()]
            raise GateworkError(f"the workers do not start ({how}): {lines[-1] if lines else 'they said nothing'}")
        for trial in trials:
            message = f"{DEATHS} workers died in it ({how}); out of memory?"
            record = {
                "study": self.store.name,
                "key": trial.plan.key,
                "variant": trial.plan.variant,
                "phase": trial.plan.phase,
                "index": trial.plan.index,
                "seed": trial.plan.seed,
                "status": "failed",
                "error": message,
                "score": None,
                "curve": [],
                "cost": {},
                "metrics": {},
                "validation": {},
                "test": None,
                "learning_rate": trial.plan.learning_rate,
                "config": {},
                "config_hash": "",
                "versions": versions(),
                "hardware": {},
                "data_hash": "",
                "task": "",
            }
            self.store.finish(trial, record)

    def _stop(self) -> None:
        """Workers end by themselves when nothing is left; what still runs is asked to stop, and then made to."""
        deadline = time.monotonic() + (5 if self.store.finished() else 0)
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.store.give_back_dead()
