from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from gatework.bench import runner, trial
from gatework.bench.runner import TrialsFailed, compare, plan, resume
from gatework.bench.store import Store
from gatework.bench.study import define
from gatework.bench.worker import work
from gatework.core.errors import GateworkError

KEYS = {f"tune/{v}/{i}" for v in ("baseline", "win") for i in range(2)} | {
    f"final/{v}/seed{s}" for v in ("baseline", "win") for s in range(2)
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_bytes(b"".join(b"%d times %d is %d\n" % (i % 13, i % 7, (i % 13) * (i % 7)) for i in range(2000)))
    return {
        "task": {"name": "text", "length": 16, "eval_tokens": 512},
        "data": str(path),
        "model": {"d_model": 16, "layers": 1, "heads": 2},
        "tokens": 64 * 10,
        "tune_tokens": 64 * 5,
        "batch_size": 4,
        "tune": 2,
        "seeds": 2,
        "variants": {"win": "mixer=attention(window=4)"},
    }


def files(folder):
    return {
        str(path.relative_to(folder / "records").with_suffix("")): json.loads(path.read_text())
        for path in (folder / "records").rglob("*.json")
    }


def scores(comparison):
    return {record["key"]: (record["status"], record["score"], record["learning_rate"]) for record in comparison.records}


def test_from_python(settings, tmp_path, capsys):
    comparison = compare(out=tmp_path / "a", workers=0, **settings)
    assert set(scores(comparison)) == KEYS
    assert {record["status"] for record in comparison.records} == {"ok"}
    assert files(tmp_path / "a") == {record["key"]: record for record in comparison.records}
    study = json.loads((tmp_path / "a" / "study.json").read_text())
    assert (study["name"], study["baseline"], study["match"]) == ("a", "baseline", "params")
    assert study["variants"] == {"baseline": "mixer=attention, feedforward=glu", "win": "mixer=attention(window=4)"}
    assert study["score"] == {"name": "loss", "unit": "nats per byte", "lower_is_better": True}
    assert set(study["matched"]["win"]) == {
        "d_ff",
        "parameters",
        "active_parameters",
        "flops_per_token",
        "seconds_per_token",
        "tokens",
    }
    finals = [record for record in comparison.records if record["phase"] == "final"]
    for final in finals:
        tuned = [r for r in comparison.records if r["phase"] == "tune" and r["variant"] == final["variant"]]
        assert final["learning_rate"] == min(tuned, key=lambda r: r["score"])["learning_rate"]
        assert final["seed"] not in {r["seed"] for r in tuned}
    shown = capsys.readouterr().err
    assert shown.count("tokens/s") == len(KEYS)
    assert "[8/8]" in shown
    assert torch.get_num_threads() == 1


def test_again_runs_nothing_and_another_configuration_is_refused(settings, tmp_path, monkeypatch):
    first = compare(out=tmp_path / "a", workers=0, quiet=True, **settings)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a" / "records").rglob("*.json")}
    monkeypatch.setattr(trial, "build_learner", None)  # Whatever trains now breaks.
    again = compare(out=tmp_path / "a", workers=0, quiet=True, **settings)
    assert again.records == first.records
    assert resume(tmp_path / "a", workers=0, quiet=True).records == first.records
    assert set(before) == {path for path in (tmp_path / "a" / "records").rglob("*.json")}
    monkeypatch.undo()
    with pytest.raises(GateworkError, match="another configuration"):
        compare(out=tmp_path / "a", workers=0, quiet=True, **settings | {"tokens": 999})
    with pytest.raises(GateworkError, match="another configuration"):
        compare(
            out=tmp_path / "b",
            name="a",
            store=f"sqlite:///{tmp_path}/a/study.db",
            workers=0,
            quiet=True,
            **settings | {"tokens": 999},
        )
    assert not (tmp_path / "b" / "study.json").exists()


def test_one_store_for_two_studies(settings, tmp_path):
    url = f"sqlite:///{tmp_path}/all.db"
    compare(out=tmp_path / "a", store=url, workers=0, quiet=True, **settings)
    compare(out=tmp_path / "b", store=url, workers=0, quiet=True, **settings | {"seeds": 1})
    assert set(files(tmp_path / "a")) == KEYS
    assert len(files(tmp_path / "b")) == 6
    assert work(url) == 0


def test_a_study_that_was_stopped_goes_on(settings, tmp_path, monkeypatch):
    whole = compare(out=tmp_path / "whole", workers=0, quiet=True, **settings)
    real, ran = runner.take_trials, []
    run_one = trial.run

    def stop_after_three(study, task, plan, *args, **kwargs):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(plan.key)
        return run_one(study, task, plan, *args, **kwargs)

    monkeypatch.setattr("gatework.bench.worker.run", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        compare(out=tmp_path / "a", workers=0, quiet=True, **settings)
    kept = files(tmp_path / "a")
    assert len(kept) == 3
    assert runner.take_trials is real
    later = []

    def note(study, task, plan, *args, **kwargs):
        later.append(plan.key)
        return run_one(study, task, plan, *args, **kwargs)

    monkeypatch.setattr("gatework.bench.worker.run", note)
    comparison = resume(tmp_path / "a", workers=0, quiet=True)
    assert not set(later) & set(ran)
    assert set(later) | set(ran) == KEYS
    assert scores(comparison) == scores(whole)
    for key, record in kept.items():
        assert files(tmp_path / "a")[key] == record  # Not touched.


def test_what_was_not_planned_to_the_end_is_planned_on(settings, tmp_path, monkeypatch):
    real = Store.plan

    def half(self, plans):
        real(self, list(plans)[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "plan", half)
    with pytest.raises(KeyboardInterrupt):
        compare(out=tmp_path / "a", workers=0, quiet=True, **settings)
    monkeypatch.undo()
    assert set(scores(compare(out=tmp_path / "a", workers=0, quiet=True, **settings))) == KEYS


def test_a_failed_trial_is_told_and_tried_again(settings, tmp_path, monkeypatch):
    run_one = trial.run

    def fail(study, task, plan, *args, **kwargs):
        if plan.key == "final/win/seed1":
            task = type("Broken", (), {"backbone": "decoder", "model_arguments": lambda self: {"vocab_size": 0}})()
        return run_one(study, task, plan, *args, **kwargs)

    monkeypatch.setattr("gatework.bench.worker.run", fail)
    with pytest.raises(TrialsFailed, match="1 of 8 trials failed, the first final/win/seed1: ") as caught:
        compare(out=tmp_path / "a", workers=0, quiet=True, strict=True, **settings)
    assert len(caught.value.comparison.records) == 8
    assert files(tmp_path / "a")["final/win/seed1"]["status"] == "failed"
    assert compare(out=tmp_path / "a", workers=0, quiet=True, **settings).records  # Not strict: told in the records.
    monkeypatch.undo()
    comparison = resume(tmp_path / "a", workers=0, quiet=True, strict=True)
    assert {record["status"] for record in comparison.records} == {"ok"}
    assert files(tmp_path / "a")["final/win/seed1"]["status"] == "ok"


def test_a_diverging_variant_is_shown_and_the_study_goes_on(settings, tmp_path):
    change = {
        "variants": {"wild": "learning_rates=1e12, 1e13, optim=adamw(weight_decay=10.0)"},
        "tokens": 64 * 60,
        "tune_tokens": 64 * 60,
    }
    comparison = compare(out=tmp_path / "a", workers=0, quiet=True, strict=True, **settings | change)
    status = {record["key"]: record["status"] for record in comparison.records}
    assert {status[key] for key in status if "wild" in key} == {"diverged"}
    assert {status[key] for key in status if "baseline" in key} == {"ok"}
    wild = [record for record in comparison.records if record["variant"] == "wild"]
    smallest = min(record["learning_rate"] for record in wild if record["phase"] == "tune")
    assert {record["learning_rate"] for record in wild if record["phase"] == "final"} == {smallest}


def test_without_tuning_the_middle_of_the_range_is_taken(settings, tmp_path):
    comparison = compare(
        out=tmp_path / "a", workers=0, quiet=True, **settings | {"tune": 0, "learning_rates": [1e-3, 1e-1], "seeds": 1}
    )
    assert [record["learning_rate"] for record in comparison.records] == pytest.approx([1e-2, 1e-2])
    assert len(comparison.records) == 2


def test_the_plan(settings):
    study = define(
        settings | {"tune": 8, "seeds": 2, "learning_rates": [1e-3, 1e-1], "variants": {"b": "layers=1, learning_rates=1e-2, 1"}}
    )
    fitted = {"seconds_per_token": 1.0, "tokens": 10}
    plans = plan(study, {"baseline": fitted, "b": fitted | {"seconds_per_token": 2.0}})
    assert [p.key for p in plans[:2]] == ["tune/b/0", "tune/baseline/0"]  # The longest first.
    assert len({p.key for p in plans}) == len(plans) == 2 * 8 + 2 * 2
    rates = {v: sorted(p.learning_rate for p in plans if p.variant == v and p.phase == "tune") for v in ("baseline", "b")}
    assert [10 * rate for rate in rates["baseline"]] == pytest.approx(rates["b"])  # The same points of each one's range.
    positions = [torch.tensor(rate / 1e-3).log10().item() / 2 for rate in rates["baseline"]]
    assert [int(8 * position) for position in positions] == list(range(8))  # One in each eighth.
    assert {p.seed for p in plans if p.phase == "tune"}.isdisjoint({p.seed for p in plans if p.phase == "final"})


def test_worker_processes(settings, tmp_path):
    alone = compare(out=tmp_path / "alone", workers=0, quiet=True, **settings)
    together = compare(out=tmp_path / "together", workers=2, quiet=True, **settings)
    assert scores(alone) == scores(together)
    logs = [path.read_text() for path in (tmp_path / "together" / "logs").iterdir()]
    assert sum(int(log.split()[0]) for log in logs) == len(KEYS)
    owners = {record["hardware"]["threads"] for record in together.records}
    assert owners == {1}


def test_workers_that_do_not_start_are_told(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "tyro.py").write_text("raise RuntimeError('this machine is broken')")
    with pytest.raises(GateworkError, match=r"workers do not start .exit code 1.: RuntimeError: this machine is broken"):
        compare(out=tmp_path / "a", workers=1, quiet=True, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sedes": 3}, "a study has no setting 'sedes'; did you mean 'seeds'"),
        ({"variants": {"big": "layers=30"}}, "cannot be made equal"),
        ({"variants": {"odd": "heads=3"}}, "variant 'odd'"),
        ({"workers": -1}, "workers must be at least 0"),
    ],
)
def test_mistakes(settings, tmp_path, change, message):
    with pytest.raises(GateworkError, match=message):
        compare(out=tmp_path / "a", quiet=True, **{"workers": 0} | settings | change)
    assert not (tmp_path / "a" / "records").exists() or not files(tmp_path / "a")


def test_folders_that_hold_no_study(tmp_path):
    with pytest.raises(GateworkError, match="there is no study at"):
        resume(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(GateworkError, match="does not describe a study"):
        resume(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(GateworkError, match="cannot be read"):
        resume(tmp_path)


def test_data_that_changed_are_refused(settings, tmp_path):
    book = tmp_path / "book.txt"
    book.write_bytes(Path(settings["data"]).read_bytes())
    compare(out=tmp_path / "a", workers=0, quiet=True, **settings | {"data": str(book), "seeds": 1, "tune": 0})
    book.write_bytes(book.read_bytes()[:-1])
    with pytest.raises(GateworkError, match="the data of the study 'a' have changed"):
        resume(tmp_path / "a")
    book.unlink()
    with pytest.raises(GateworkError, match="no data file"):
        resume(tmp_path / "a")
    assert os.listdir(tmp_path / "a" / "records") == ["final"]
