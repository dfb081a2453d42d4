"""The store of a study: an Optuna RDB storage that any number of processes take trials from, none twice.

Every trial is planned up front under a key (``tune/wide/2``, ``final/wide/seed0``) and is one row for its whole
life: WAITING, RUNNING, then COMPLETE (ok), PRUNED (diverged) or FAIL (failed). What gatework needs to know of it are
system attributes; its user attributes are for people, in tools that show the storage. A trial is claimed, and a killed
worker's trial is given back, by one conditional UPDATE, which is atomic on every database. (Optuna's own
``set_trial_state_values`` reads and then writes, and under SQLite two processes can both pass the reading.) The
result of a key is what is written first; a finished row never changes.

A worker that still lives says so by counting up. It is given up at once where its process is gone from this
machine, and otherwise when its count has not moved for a while on the *observer's* clock, so that no two clocks
need agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sql
from optuna.distributions import FloatDistribution
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from gatework.core.errors import GateworkError

#: Seconds without a sign of life after which a worker on another machine is given up.
GRACE = 90.0
#: Seconds after which a database server that does not answer is given up.
TIMEOUT = 20

_TRIALS = sql.table(
    "trials", sql.column("trial_id"), sql.column("state"), sql.column("datetime_start"), sql.column("datetime_complete")
)
_ATTRIBUTES = sql.table("trial_system_attributes", sql.column("trial_id"), sql.column("key"), sql.column("value_json"))
_VALUES = sql.table("trial_values", sql.column("trial_id"))
_STATES = {"ok": TrialState.COMPLETE, "diverged": TrialState.PRUNED, "failed": TrialState.FAIL}


@dataclass(frozen=True)
class Plan:
    """A trial to run: ``phase`` is ``"tune"`` or ``"final"``; ``index`` the number of the tuning trial, or of the
    seed."""

    key: str
    variant: str
    phase: str
    index: int
    seed: int
    learning_rate: float | None


@dataclass
class Trial:
    """A planned trial as the store knows it."""

    id: int
    plan: Plan
    state: str
    owner: dict[str, Any] | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] | None = None

    @property
    def finished(self) -> bool:
        """Whether its result is final."""
        return self.state in ("COMPLETE", "PRUNED", "FAIL")


class Store:
    """One study in a storage.

    Args:
        url: SQLAlchemy URL, or the path of an SQLite file.
        name: of the study; None takes the only one that there is.
        create: make the study if it is not there.
        lower_is_better: direction, for tools that read the storage.

    Raises:
        GateworkError: a storage that cannot be reached or belongs to another version; no such study.
    """

    def __init__(self, url: str, name: str | None = None, create: bool = False, lower_is_better: bool = True) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.url = url
        self._storage = _connect(url, create)
        self._seen: dict[int, tuple[Any, float]] = {}
        try:
            self.name, self._study = self._open(name, create, lower_is_better)
        except BaseException:
            self.close()
            raise

    def _open(self, name: str | None, create: bool, lower_is_better: bool) -> tuple[str, int]:
        if name is None:
            names = _names(self._storage)
            if len(names) != 1:
                listed = ", ".join(names) or "no study"
                raise GateworkError(f"the store holds {listed}; name one with --study")
            name = names[0]
        try:
            return name, self._storage.get_study_id_from_name(name)
        except KeyError:
            if not create:
                there = ", ".join(_names(self._storage)) or "none"
                raise GateworkError(f"the store has no study {name!r}; it holds {there}") from None
            direction = StudyDirection.MINIMIZE if lower_is_better else StudyDirection.MAXIMIZE
            try:
                return name, self._storage.create_new_study([direction], name)
            except DuplicatedStudyError:  # Another process was faster.
                return name, self._storage.get_study_id_from_name(name)

    # What the study is

    def definition(self) -> dict[str, Any]:
        """What :meth:`define` wrote; empty before."""
        definition: dict[str, Any] = self._storage.get_study_system_attrs(self._study).get("definition", {})
        return definition

    def define(self, definition: Mapping[str, Any]) -> None:
        """Write the definition (JSON-able; ``config_hash`` in it).

        Raises:
            GateworkError: the study has another configuration.
        """
        known = self.definition()
        if known and known["config_hash"] != definition["config_hash"]:
            raise GateworkError(
                f"the study {self.name!r} exists with another configuration "
                f"({known['config_hash']}, not {definition['config_hash']}); choose another --name or --out"
            )
        self._storage.set_study_system_attr(self._study, "definition", dict(definition))
        for name in ("task", "baseline", "variants", "tokens"):  # For people, in tools that show the storage.
            if name in definition:
                self._storage.set_study_user_attr(self._study, name, definition[name])
        if "score" in definition:
            self._storage.set_study_system_attr(self._study, "study:metric_names", [definition["score"]["name"]])

    def plan(self, plans: Iterable[Plan]) -> None:
        """Enter the trials whose keys are not there yet, in order. Where two processes enter one key, the first row
        counts."""
        there = {trial.plan.key for trial in self.trials()}
        for plan in plans:
            if plan.key in there:
                continue
            rate = plan.learning_rate
            params = {} if rate is None else {"learning_rate": rate}
            distributions: dict[str, Any] = (
                {} if rate is None else {"learning_rate": FloatDistribution(rate / 10, rate * 10, log=True)}
            )
            template = create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions=distributions,
                user_attrs={name: getattr(plan, name) for name in ("variant", "phase", "seed")},
                system_attrs={"plan": dict(vars(plan))},
            )
            self._storage.create_new_trial(self._study, template)
        self._storage.set_study_system_attr(self._study, "planned", len(self.trials()))

    # Trials

    def trials(self) -> list[Trial]:
        """All planned trials, in the order of the plan."""
        found: dict[str, Trial] = {}
        for row in sorted(self._storage.get_all_trials(self._study, deepcopy=False), key=lambda row: row.number):
            if "plan" in row.system_attrs:
                trial = _trial(row)
                found.setdefault(trial.plan.key, trial)
        return list(found.values())

    def finished(self) -> bool:
        """Whether every planned trial has its result; not while the plan is still being entered."""
        planned = self._storage.get_study_system_attrs(self._study).get("planned")
        trials = self.trials()
        return planned is not None and len(trials) >= planned and all(trial.finished for trial in trials)

    def claim(self, only: str | None = None) -> Trial | None:
        """Take the first waiting trial that is ready; None where there is none now.

        A final trial is ready when all tuning trials of its variant have finished; it then carries the best
        learning rate.
        """
        trials = self.trials()
        for trial in trials:
            if trial.state != "WAITING" or (only and trial.plan.key != only):
                continue
            siblings = [t for t in trials if t.plan.variant == trial.plan.variant and t.plan.phase == "tune"]
            if trial.plan.phase == "final" and not all(t.finished for t in siblings):
                continue
            if self._take(trial):
                if trial.plan.learning_rate is None:
                    trial.plan = Plan(**vars(trial.plan) | {"learning_rate": self._best_rate(siblings)})
                return trial
        return None

    def _best_rate(self, tuned: list[Trial]) -> float:
        lower = self._storage.get_study_directions(self._study)[0] == StudyDirection.MINIMIZE
        rated = [
            (t.record["score"] if lower else -t.record["score"], t.plan.learning_rate)
            for t in tuned
            if t.record and t.record["status"] == "ok"
        ]
        rates = [rate for _, rate in sorted(rated)] or sorted(t.plan.learning_rate for t in tuned)  # type: ignore[type-var]
        assert rates[0] is not None
        return rates[0]

    def _take(self, trial: Trial) -> bool:
        owner = _me()
        with self._storage.engine.begin() as connection:
            waiting = sql.and_(_TRIALS.c.trial_id == trial.id, _TRIALS.c.state == sql.literal_column("'WAITING'"))
            running = {"state": sql.literal_column("'RUNNING'"), "datetime_start": sql.func.current_timestamp()}
            taken = connection.execute(sql.update(_TRIALS).where(waiting).values(running)).rowcount == 1
            if taken:
                mine = sql.and_(_ATTRIBUTES.c.trial_id == trial.id, _ATTRIBUTES.c.key.in_(["owner", "progress"]))
                connection.execute(sql.delete(_ATTRIBUTES).where(mine))
                row = {"trial_id": trial.id, "key": "owner", "value_json": json.dumps(owner)}
                connection.execute(sql.insert(_ATTRIBUTES).values(row))
        if taken:
            trial.state, trial.owner = "RUNNING", owner
        return taken

    def give_back(self, trial: Trial) -> bool:
        """Make a running trial wait again, if it still belongs to the owner that ``trial`` names."""
        owned = sql.exists().where(
            _ATTRIBUTES.c.trial_id == trial.id,
            _ATTRIBUTES.c.key == "owner",
            _ATTRIBUTES.c.value_json == json.dumps(trial.owner),
        )
        if trial.owner is None:
            owned = sql.literal(True)  # type: ignore[assignment]
        return self._wait(trial, "RUNNING", owned)

    def retry(self, trial: Trial) -> bool:
        """Make a failed trial wait again."""
        return self._wait(trial, "FAIL", sql.literal(True))

    def _wait(self, trial: Trial, state: str, condition: Any) -> bool:
        with self._storage.engine.begin() as connection:
            where = sql.and_(_TRIALS.c.trial_id == trial.id, _TRIALS.c.state == sql.literal_column(f"'{state}'"), condition)
            waiting: dict[str, Any] = {"state": sql.literal_column("'WAITING'"), "datetime_start": None, "datetime_complete": None}
            done = connection.execute(sql.update(_TRIALS).where(where).values(waiting)).rowcount == 1
            if done:
                connection.execute(sql.delete(_VALUES).where(_VALUES.c.trial_id == trial.id))
        return done

    def report(self, trial: Trial, progress: Mapping[str, Any]) -> None:
        """Say how far a running trial is; ``beat`` in it must grow from call to call."""
        # Finished: somebody gave this worker up and was faster.
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_system_attr(trial.id, "progress", dict(progress))

    def finish(self, trial: Trial, record: Mapping[str, Any]) -> bool:
        """Enter a trial's record; False where another process had finished the trial before."""
        try:
            self._storage.set_trial_system_attr(trial.id, "record", dict(record))
            for name in ("learning_rate", "score"):
                self._storage.set_trial_user_attr(trial.id, name, record.get(name))
            values = [float(record["score"])] if record["status"] == "ok" else None
            return self._storage.set_trial_state_values(trial.id, _STATES[record["status"]], values)
        except UpdateFinishedTrialError:
            return False

    def give_back_dead(self, grace: float = GRACE) -> list[str]:
        """Give back the trials whose worker is gone; returns their keys."""
        back = []
        for trial in self.trials():
            if trial.state == "RUNNING" and self._gone(trial, grace) and self.give_back(trial):
                back.append(trial.plan.key)
        return back

    def _gone(self, trial: Trial, grace: float) -> bool:
        owner, now = trial.owner or {}, time.monotonic()
        if owner.get("host") == _host():
            return owner["boot"] != _boot() or not _alive(owner["pid"], owner["started"])
        sign = (owner.get("token"), trial.progress.get("beat"))
        seen, since = self._seen.setdefault(trial.id, (sign, now))
        if seen != sign:
            self._seen[trial.id] = (sign, now)
            return False
        return now - since > grace

    def close(self) -> None:
        """Let go of the database."""
        _close(self._storage)


def _trial(row: FrozenTrial) -> Trial:
    attributes = row.system_attrs
    # An attribute of a trial that was given back outlives its state: only a finished trial has a record, only a
    # running one an owner.
    record = attributes.get("record") if row.state.is_finished() else None
    owner = attributes.get("owner") if row.state == TrialState.RUNNING else None
    return Trial(row._trial_id, Plan(**attributes["plan"]), row.state.name, owner, attributes.get("progress", {}), record)


def _connect(url: str, create: bool) -> RDBStorage:
    if "://" not in url:
        path = Path(url)
        if not create and not path.exists():
            raise GateworkError(f"there is no store at {url!r}")
        url = f"sqlite:///{path.absolute()}"
    # The driver that gatework[postgres] brings: which one a bare URL means depends on the version of SQLAlchemy.
    url = re.sub("^postgres(ql)?://", "postgresql+psycopg://", url)
    if url.startswith("sqlite"):
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    elif url.startswith("postgresql+psycopg:"):
        options = {"connect_args": {"connect_timeout": TIMEOUT}, "pool_pre_ping": True}
    else:
        options = {"pool_pre_ping": True}
    try:
        with _alone(url):
            return RDBStorage(url, engine_kwargs=options)
    except ImportError as error:
        cause = error.__cause__ or error.__context__ or error  # Optuna wraps it.
        missing = getattr(cause, "name", None)
        wanted = '"gatework[postgres]"' if missing == "psycopg" else missing
        what = f"needs the package {missing!r}: pip install {wanted}" if missing else f"cannot be opened: {_first_line(cause)}"
        raise GateworkError(f"the store {_hide(url)} {what}") from error
    except RuntimeError as error:
        raise GateworkError(f"the store {_hide(url)} belongs to another version of optuna: {_first_line(error)}") from error
    except (sql.exc.SQLAlchemyError, StorageInternalError, ValueError) as error:
        raise GateworkError(f"the store {_hide(url)} cannot be reached: {_first_line(error)}") from error


def storage_error(error: Exception) -> str | None:
    """One sentence for an error of the database that happened in the middle of the work; None for any other error."""
    if isinstance(error, StorageInternalError | sql.exc.SQLAlchemyError):
        return (
            f"the store failed: {_first_line(error.__cause__ or error)}; what was finished is kept, continue with gatework resume"
        )
    return None


def study_names(url: str) -> list[str]:
    """The names of all studies in a storage."""
    storage = _connect(url, create=False)
    try:
        return _names(storage)
    finally:
        _close(storage)


def _names(storage: RDBStorage) -> list[str]:
    return sorted(study.study_name for study in storage.get_all_studies())


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


@contextlib.contextmanager
def _alone(url: str) -> Iterator[None]:
    """Nobody else opens this PostgreSQL database meanwhile: two that made its tables at once would fail."""
    if not url.startswith("postgresql+psycopg:"):
        yield
        return
    engine = sql.create_engine(url, poolclass=sql.NullPool, connect_args={"connect_timeout": TIMEOUT})
    with engine.connect() as connection:
        connection.execute(sql.text("SELECT pg_advisory_xact_lock(hashtext('gatework'))"))
        yield


def _first_line(error: BaseException) -> str:
    return str(getattr(error, "orig", None) or error).strip().split("\n")[0]


def without_password(url: str) -> str:
    """The URL as it may be written down."""
    return sql.make_url(url)._replace(password=None).render_as_string(hide_password=False)


def _hide(url: str) -> str:
    try:
        return repr(sql.make_url(url).render_as_string(hide_password=True))
    except sql.exc.ArgumentError:
        return repr(url)


# Who runs a trial


def _host() -> str:
    """This machine; in a container, this container: where a process id means the same."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": _host(), "boot": _boot(), "pid": pid, "started": _stat(pid)[1], "token": os.urandom(8).hex()}


def _stat(pid: int) -> tuple[str, str]:
    """State and start time of a process, where the system tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def _alive(pid: int, started: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    state, start = _stat(pid)
    return state != "Z" and (not start or not started or start == started)
