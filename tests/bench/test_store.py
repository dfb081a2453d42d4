from __future__ import annotations

import dataclasses
import os
import subprocess
import threading
import time

import optuna
import pytest
from optuna.trial import TrialState

from gatework.bench import store as stores
from gatework.bench.store import Plan, Store
from gatework.core.errors import GateworkError


def plans(variants=("baseline", "wide"), tune=2, seeds=2):
    tuning = [Plan(f"tune/{v}/{i}", v, "tune", i, 99, 10.0 ** -(i + 1)) for i in range(tune) for v in variants]
    return tuning + [Plan(f"final/{v}/seed{s}", v, "final", s, s, None) for s in range(seeds) for v in variants]


def record(trial, score=1.0, status="ok"):
    return {"key": trial.plan.key, "status": status, "score": score if status == "ok" else None}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "study.db")


@pytest.fixture
def store(path):
    opened = Store(path, "s", create=True)
    opened.define({"config_hash": "a"})
    opened.plan(plans())
    yield opened
    opened.close()


def keys(trials, state):
    return [t.plan.key for t in trials if t.state == state]


def test_plan_is_kept_in_order_and_entered_once(store, path):
    assert [t.plan for t in store.trials()] == plans()
    store.plan(plans())
    other = Store(path, "s")
    other.plan(plans())
    assert [t.plan for t in other.trials()] == plans()
    other.close()


def test_a_key_entered_twice_by_a_race_counts_once(store):
    double = dataclasses.replace(plans()[0], index=7)
    store.plan([dataclasses.replace(double, key="new")])
    store._storage.create_new_trial(
        store._study, optuna.trial.create_trial(state=TrialState.WAITING, system_attrs={"plan": vars(double)})
    )
    found = [t for t in store.trials() if t.plan.key == double.key]
    assert len(found) == 1
    assert found[0].plan == plans()[0]


def test_many_claim_each_trial_once(path):
    first = Store(path, "s", create=True)
    first.plan([Plan(f"tune/v/{i}", "v", "tune", i, 0, 0.1) for i in range(40)])
    taken, barrier = [], threading.Barrier(6)

    def take():
        mine = Store(path, "s")
        barrier.wait()
        while (trial := mine.claim()) is not None:
            taken.append(trial.plan.key)
        mine.close()

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(f"tune/v/{i}" for i in range(40))
    first.close()


def test_one_row_is_taken_by_one_of_many_that_saw_it_waiting(path):
    # Everybody has read WAITING before anybody writes: reading first and writing then would let all of them pass.
    first = Store(path, "s", create=True)
    first.plan([Plan("tune/v/0", "v", "tune", 0, 0, 0.1)])
    sides = [Store(path, "s") for _ in range(5)]
    seen = [side.trials()[0] for side in sides]
    assert [side._take(trial) for side, trial in zip(sides, seen, strict=True)] == [True, False, False, False, False]
    for side in [*sides, first]:
        side.close()


def test_final_trials_wait_for_their_own_tuning_and_take_the_best_rate(store):
    tuning = [store.claim() for _ in range(4)]
    assert [t.plan.phase for t in tuning] == ["tune"] * 4
    assert store.claim() is None
    by_key = {t.plan.key: t for t in tuning}
    assert store.finish(by_key["tune/baseline/0"], record(by_key["tune/baseline/0"], 2.0))
    assert store.claim() is None
    assert store.finish(by_key["tune/baseline/1"], record(by_key["tune/baseline/1"], 1.0))
    final = store.claim()
    assert final.plan.key == "final/baseline/seed0"
    assert final.plan.learning_rate == 0.01
    assert store.claim().plan.key == "final/baseline/seed1"
    assert store.claim() is None  # `wide` still tunes.


def test_best_rate_where_more_is_better(path):
    store = Store(path, "s", create=True, lower_is_better=False)
    store.plan(plans(("v",), tune=2, seeds=1))
    for score in (2.0, 1.0):
        trial = store.claim()
        store.finish(trial, record(trial, score))
    assert store.claim().plan.learning_rate == 0.1
    store.close()


def test_diverged_and_failed_rates_are_not_chosen(path):
    store = Store(path, "s", create=True)
    store.plan(plans(("v",), tune=3, seeds=1))
    for status in ("diverged", "ok", "failed"):
        trial = store.claim()
        store.finish(trial, record(trial, 5.0, status))
    assert store.claim().plan.learning_rate == 0.01
    store.close()


def test_smallest_rate_where_all_diverged(path):
    store = Store(path, "s", create=True)
    store.plan(plans(("v",), tune=3, seeds=1))
    for _ in range(3):
        trial = store.claim()
        store.finish(trial, record(trial, status="diverged"))
    assert store.claim().plan.learning_rate == 0.001
    store.close()


@pytest.mark.parametrize(("status", "state"), [("ok", "COMPLETE"), ("diverged", "PRUNED"), ("failed", "FAIL")])
def test_results_read_back(store, path, status, state):
    trial = store.claim()
    assert store.finish(trial, record(trial, 1.5, status))
    other = Store(path, "s")
    found = other.trials()[0]
    assert (found.state, found.record) == (state, record(trial, 1.5, status))
    assert found.finished
    assert optuna.load_study(study_name="s", storage=other._storage).trials[0].value == (1.5 if status == "ok" else None)
    other.close()


def test_the_first_result_stays(store):
    trial = store.claim()
    assert store.finish(trial, record(trial, 1.0))
    assert not store.finish(trial, record(trial, 2.0))
    assert not store.give_back(trial)
    assert store.trials()[0].record["score"] == 1.0
    store.report(trial, {"beat": 3})  # Says nothing, breaks nothing.


def test_give_back_only_what_is_still_the_owners(store):
    trial = store.claim()
    assert store.give_back(trial)
    assert store.trials()[0].state == "WAITING"
    again = store.claim()
    assert again.plan == trial.plan
    assert not store.give_back(trial)  # The late owner changes nothing.
    assert store.trials()[0].state == "RUNNING"
    assert store.give_back(again)


def test_a_failed_trial_can_be_tried_again(store):
    trial = store.claim()
    store.finish(trial, record(trial, status="failed"))
    assert store.retry(store.trials()[0])
    found = store.trials()[0]
    assert (found.state, found.record) == ("WAITING", None)
    again = store.claim()
    assert again.plan == trial.plan
    assert store.finish(again, record(again, 3.0))
    assert store.trials()[0].record["score"] == 3.0


def test_a_living_worker_keeps_its_trial(store):
    store.claim()
    assert store.give_back_dead(grace=0.0) == []


def test_a_dead_process_loses_its_trial_at_once(store, monkeypatch):
    gone = subprocess.Popen(["true"])
    gone.wait()
    monkeypatch.setattr(stores.os, "getpid", lambda: gone.pid)
    trial = store.claim()
    monkeypatch.undo()
    assert store.give_back_dead() == [trial.plan.key]
    assert store.trials()[0].state == "WAITING"


def test_a_process_id_used_again_is_not_the_same_process(store, monkeypatch):
    me = stores._me()
    monkeypatch.setattr(stores, "_me", lambda: me | {"started": "1"})
    trial = store.claim()
    assert store.give_back_dead() == [trial.plan.key]


def test_a_reboot_ends_every_process(store, monkeypatch):
    me = stores._me()
    monkeypatch.setattr(stores, "_me", lambda: me | {"boot": "before"})
    trial = store.claim()
    assert store.give_back_dead() == [trial.plan.key]


def test_elsewhere_a_silent_worker_is_given_up_after_a_while(store, monkeypatch):
    me, clock = stores._me(), [1000.0]
    monkeypatch.setattr(stores, "_me", lambda: me | {"host": "elsewhere"})
    monkeypatch.setattr(stores.time, "monotonic", lambda: clock[0])
    trial = store.claim()
    assert store.give_back_dead() == []
    clock[0] += 60
    store.report(trial, {"beat": 1})
    assert store.give_back_dead() == []  # It moved.
    clock[0] += 60
    assert store.give_back_dead() == []
    clock[0] += 31
    assert store.give_back_dead() == [trial.plan.key]


def test_another_configuration_is_refused(store, path):
    other = Store(path, "s", create=True)
    with pytest.raises(GateworkError, match="another configuration"):
        other.define({"config_hash": "b"})
    assert other.definition() == {"config_hash": "a"}
    other.close()


def test_names(store, path):
    Store(path).close()  # The only one is found.
    with pytest.raises(GateworkError, match="no study 't'; it holds s"):
        Store(path, "t")
    Store(path, "t", create=True).close()
    with pytest.raises(GateworkError, match="holds s, t; name one"):
        Store(path)
    assert stores.study_names(path) == ["s", "t"]


def test_stores_that_are_none(tmp_path):
    with pytest.raises(GateworkError, match="no store at"):
        Store(str(tmp_path / "none.db"), "s")
    (tmp_path / "text.db").write_text("not a database, only a text that is long enough to be looked at " * 20)
    with pytest.raises(GateworkError, match="cannot be reached: file is not a database"):
        Store(str(tmp_path / "text.db"), "s")
    with pytest.raises(GateworkError, match="cannot be reached"):
        Store("nonsense://x", "s")
    with pytest.raises(GateworkError, match=r"needs the Python package|cannot be opened|cannot be reached") as caught:
        Store("postgresql://me:secret@127.0.0.1:1/x", "s")
    assert "secret" not in str(caught.value)


def test_a_store_of_another_version(path):
    opened = Store(path, "s", create=True)
    with opened._storage.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num='v0.9.0.a'")
    opened.close()
    with pytest.raises(GateworkError, match="another version of optuna"):
        Store(path, "s")


def test_workers_know_themselves():
    me = stores._me()
    assert me["pid"] == os.getpid()
    assert stores._alive(me["pid"], me["started"])
    assert time.monotonic() > 0
