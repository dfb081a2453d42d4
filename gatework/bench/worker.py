"""A worker: takes trials from a store, runs them one after the other, says that it lives."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gatework.bench.store import Store, Trial, storage_error, study_names
from gatework.bench.study import Study, load_imports, restore
from gatework.bench.trial import run
from gatework.core.errors import GateworkError

#: Seconds between two signs of life.
PULSE = 2.0
#: Environment variables by which the process that shares out the work talks to its workers.
STORE, PARENT = "GATEWORK_STORE", "GATEWORK_PARENT"

Tick = Callable[[Trial | None], None]


def work(url: str, name: str | None = None) -> int:
    """Run waiting trials of a store's study (of all its studies, without a name) until every trial has its result.

    Any number of processes may do so, on any machines; each trial is run once. Returns how many were run here.

    Raises:
        GateworkError: the store cannot be reached, or the study's data are not the same here.
    """
    with one_thread():
        return sum(_work_on(Store(url, study)) for study in ([name] if name else study_names(url)))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread inside the block: several trials run side by side, and the same trial gives the same numbers on
    any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():  # Trials seed themselves; the caller's random state is left alone.
            yield
    finally:
        torch.set_num_threads(before)


def _work_on(store: Store) -> int:
    try:
        definition = store.definition()
        if not definition:
            raise GateworkError(f"the study {store.name!r} is not defined yet; start it with gatework compare")
        study, task = reload(definition)
        return take_trials(store, study, task, definition)
    finally:
        store.close()


def reload(definition: dict[str, Any]) -> tuple[Study, Any]:
    """The study that a store or a ``study.json`` describes, with its task.

    Raises:
        GateworkError: the data are missing, or differ from the study's.
    """
    from gatework.bench.tasks import make_task

    load_imports(definition["definition"].get("imports", ()))
    study = restore(definition["definition"])
    task = make_task(study.task["name"], **{key: value for key, value in study.task.items() if key != "name"})
    if task.data_hash != study.data_hash:
        raise GateworkError(f"the data of the study {study.name!r} have changed ({task.data_hash}, not {study.data_hash})")
    return study, task


def take_trials(store: Store, study: Study, task: Any, definition: dict[str, Any], tick: Tick | None = None) -> int:
    """Take and run trials until all are finished; returns how many were run here. ``tick`` is called at every point
    of progress."""
    folder = Path(definition["out"])
    done = 0
    while True:
        trial = store.claim()
        if trial is None:
            if store.finished():
                return done
            store.give_back_dead()
            if tick:
                tick(None)
            orphaned(exit_now=True)
            time.sleep(0.3)
            continue
        run_claimed(store, study, task, definition, trial, folder if folder.is_dir() else None, tick)
        done += 1


def run_claimed(
    store: Store, study: Study, task: Any, definition: dict[str, Any], trial: Trial, folder: Path | None, tick: Tick | None = None
) -> None:
    """Run a claimed trial and enter its record; interrupted, the trial is given back."""
    pulse = Pulse(store, trial)

    def progress(point: dict[str, Any]) -> None:
        pulse.say(point)
        trial.progress = point
        if tick:
            tick(trial)

    fitted = definition["matched"][trial.plan.variant]
    try:
        with pulse:
            record = run(
                study,
                task,
                trial.plan,
                fitted,
                device=definition["device"],
                progress=progress,
                folder=folder,
                save=bool(definition.get("save")) and trial.plan.phase == "final",
            )
    except BaseException:
        store.give_back(trial)
        raise
    try:
        store.finish(trial, record)
    except Exception as error:
        if sentence := storage_error(error):
            raise GateworkError(sentence) from error
        raise


class Pulse(threading.Thread):
    """Says every other second that a trial's worker lives and how far it is; a worker whose parent is gone stops."""

    def __init__(self, store: Store, trial: Trial) -> None:
        super().__init__(daemon=True)
        self._store, self._trial, self._stop_now = store, trial, threading.Event()
        self._latest: dict[str, Any] = {}

    def say(self, point: dict[str, Any]) -> None:
        """What to pass on with the next sign."""
        self._latest = {key: point[key] for key in ("step", "steps", "train_loss", "tokens_per_second") if key in point}

    def run(self) -> None:
        """Beat until told to stop."""
        beat = 0
        while not self._stop_now.wait(PULSE if beat else 0.2):
            beat += 1
            if orphaned():
                self._store.give_back(self._trial)
                os._exit(1)
            try:
                self._store.report(self._trial, {"beat": beat, **self._latest})
            except Exception as error:
                if storage_error(error) is None:  # A busy database is asked again; the trial is not disturbed.
                    raise

    def __enter__(self) -> Pulse:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        self.join()


def orphaned(exit_now: bool = False) -> bool:
    """Whether the process that started this worker is gone."""
    parent = os.environ.get(PARENT)
    gone = parent is not None and os.getppid() != int(parent)
    if gone and exit_now:
        raise SystemExit(1)
    return gone
