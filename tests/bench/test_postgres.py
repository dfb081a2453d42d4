"""A study shared over a real PostgreSQL server, which the tests start on loopback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gatework.bench import store as stores
from gatework.bench.runner import compare, resume
from gatework.bench.store import Plan, Store
from gatework.cli import main
from gatework.core.errors import GateworkError

STUDY = """
data = "book.txt"
tokens = 1600
tune_tokens = 800
batch_size = 4
tune = 2
seeds = 2
match = "none"
[task]
name = "text"
length = 16
eval_tokens = 512
[model]
d_model = 16
layers = 1
heads = 2
[variants]
win = "mixer=attention(window=4)"
"""
TRIALS = 2 * (2 + 2)
#: A worker on a machine of its own: it cannot see whether the others' processes live, and gives a silent one up after two
#: seconds. The victim stops in the middle of its first trial and waits for its end.
WORKER = """
import sys, time
from gatework.bench import store, trial, worker
from gatework.cli import main
host, url, victim = sys.argv[1:]
store._host = lambda: host
store.Store.give_back_dead.__defaults__ = (2.0,)
worker.PULSE = 0.3
run = trial.run
def stop(*args, progress, **settings):
    def wait(point):
        progress(point)
        if point["step"] >= point["steps"] // 2:
            time.sleep(600)
    return run(*args, progress=wait, **settings)
if victim == "victim":
    worker.run = stop
sys.exit(main(["work", "--store", url]))
"""


@pytest.fixture
def url(database, request):
    """A database of the test's own."""
    return database(re.sub("[^a-z]", "_", request.node.originalname))


def results(records):
    """Everything but what the clock decides."""
    return {
        r["key"]: (r["status"], r["score"], r["learning_rate"], r["test"], [(p["step"], p["train_loss"]) for p in r["curve"]])
        for r in records
    }


def table(comparison):
    """The table's columns that no clock decides."""
    clocked = ("seconds", "tokens_per_second", "peak_bytes")
    return [
        (row.name, row.settings, row.score, row.sd, row.validation, row.scores, row.diverged, row.failed, row.learning_rate,
         row.trials, row.saved, row.verdict, {name: value for name, value in row.cost.items() if name not in clocked})
        for row in comparison.rows
    ]  # fmt: skip


def running(url, host):
    """The trial that a machine is in the middle of."""
    store = Store(url, "study")
    try:
        mine = [t for t in store.trials() if t.state == "RUNNING" and t.owner["host"] == host]
        return next((trial for trial in mine if trial.progress.get("step")), None)
    finally:
        store.close()


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_three_machines_of_which_one_dies(url, tmp_path, monkeypatch):
    """Every trial is in the result exactly once, and the table is that of a single worker."""
    book = b"".join(b"%d times %d is %d\n" % (i % 13, i % 7, (i % 13) * (i % 7)) for i in range(2000))
    (tmp_path / "book.txt").write_bytes(book)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)

    def planned_only(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatework.bench.worker.run", planned_only)
        with pytest.raises(KeyboardInterrupt):
            compare("study.toml", out="runs/study", store=url, workers=0, quiet=True)

    def start(host, role="worker"):
        with open(host, "w") as log:
            return subprocess.Popen([sys.executable, "-c", WORKER, host, url, role], stdout=log, stderr=log)

    victim, others = start("one", "victim"), [start("two"), start("three")]
    try:
        whole = compare("study.toml", out="whole/study", workers=0, quiet=True)  # The single worker, on SQLite.
        lost = wait_for(lambda: running(url, "one"))
        victim.send_signal(signal.SIGKILL)
        assert victim.wait(10) == -signal.SIGKILL
        codes = [other.wait(300) for other in others]
    finally:
        for process in (victim, *others):
            process.kill()
            process.wait()
    said = [Path(host).read_text() for host in ("two", "three")]
    assert codes == [0, 0], said
    assert sum(int(text.split()[0]) for text in said) == TRIALS, said
    store = Store(url, "study")
    rows = store._storage.get_all_trials(store._study)
    assert len(rows) == TRIALS
    assert {row.state.name for row in rows} == {"COMPLETE"}
    again = next(row for row in rows if row.system_attrs["plan"]["key"] == lost.plan.key)
    assert again.system_attrs["owner"]["host"] in ("two", "three")
    store.close()
    written = (tmp_path / "runs" / "study" / "study.json").read_text()
    assert "postgresql" in written
    assert "let%20me%20in" not in written
    shared = resume("runs/study", store=url, quiet=True)
    assert results(shared.records) == results(whole.records)
    assert len(shared.records) == TRIALS
    assert table(shared) == table(whole)


def test_one_row_is_taken_by_one_of_many_that_saw_it_waiting(url):
    """Six connections that read WAITING before any of them writes; also many that open an empty database at once."""
    plans = [Plan(f"tune/v/{i}", "v", "tune", i, 0, 0.1) for i in range(8)]
    barrier, sides, taken = threading.Barrier(6), [], []

    def take():
        side = Store(url, "s", create=True)
        sides.append(side)
        if barrier.wait() == 0:
            side.plan(plans)
        barrier.wait()
        seen = side.trials()
        barrier.wait()
        taken.extend(trial.plan.key for trial in seen if side._take(trial))

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [plan.key for plan in plans]
    trial = sides[0].trials()[0]
    assert sides[1].give_back(trial)
    assert [side.give_back(trial) for side in sides] == [False] * 6
    again = sides[2].claim()
    assert again.plan == trial.plan
    assert sides[3].finish(again, {"status": "ok", "score": 1.5})
    assert not sides[4].finish(again, {"status": "ok", "score": 2.5})
    assert sides[5].trials()[0].record["score"] == 1.5
    for side in sides:
        side.close()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_the_driver_need_not_be_named(server, scheme):
    Store(server.replace("postgresql:", f"{scheme}:"), "named", create=True).close()


def said(capsys, *arguments):
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("gatework: ")
    return err


def test_a_wrong_password(server, capsys):
    err = said(capsys, "work", "--store", server.replace("let%20me%20in", "guess"))
    assert "cannot be reached: " in err
    assert "password authentication failed for user \"me\"" in err
    assert "guess" not in err


def test_no_such_study_or_database(server, capsys):
    assert "the store has no study 'nothing'; it holds " in said(capsys, "work", "--store", server, "--study", "nothing")
    assert 'database "nowhere" does not exist' in said(capsys, "work", "--store", server.removesuffix("postgres") + "nowhere")


def test_nobody_listens(free_port, capsys):
    pytest.importorskip("psycopg", reason='needs psycopg: pip install "gatework[postgres]"')
    err = said(capsys, "work", "--store", f"postgresql://me:secret@127.0.0.1:{free_port()}/x")
    assert "the store 'postgresql+psycopg://me:***@127.0.0.1" in err
    assert "cannot be reached: connection failed" in err
    assert "refused" in err


def test_without_the_driver(monkeypatch):
    """Also where SQLAlchemy would take another driver, were none named."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("psycopg", "psycopg2")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(GateworkError, match=r"needs the package 'psycopg': pip install \"gatework\[postgres\]\"") as caught:
        stores._connect("postgresql://me@127.0.0.1/x", create=False)
    assert "\n" not in str(caught.value)
