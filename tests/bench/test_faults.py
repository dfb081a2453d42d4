from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

from gatework.bench import checkpoint
from gatework.bench.runner import compare, resume
from gatework.bench.store import Store
from gatework.cli import main

STUDY = """
data = "book.txt"
tokens = 3200
tune_tokens = 1600
batch_size = 4
tune = 2
seeds = 3
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
TRIALS = 2 * (2 + 3)


@pytest.fixture(scope="module")
def book():
    return b"".join(b"%d times %d is %d\n" % (i % 13, i % 7, (i % 13) * (i % 7)) for i in range(2000))


@pytest.fixture
def folder(tmp_path, monkeypatch, book):
    (tmp_path / "book.txt").write_bytes(book)
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*arguments):
    return [sys.executable, "-m", "gatework.cli", *arguments]


def results(records):
    """Everything but what the clock decides."""
    return {
        r["key"]: (r["status"], r["score"], r["learning_rate"], r["test"], [(p["step"], p["train_loss"]) for p in r["curve"]])
        for r in records
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, book):
    """The study, never interrupted."""
    path = tmp_path_factory.mktemp("whole")
    (path / "book.txt").write_bytes(book)
    (path / "study.toml").write_text(STUDY)
    return results(compare(path / "study.toml", out=path / "runs", workers=0, quiet=True).records)


def finished(folder):
    found = {}
    for path in (folder / "runs" / "study" / "records").rglob("*.json"):
        found[str(path)] = path.read_bytes()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_any_moment_and_resumed(folder, whole, seed):
    # The whole group is killed (the command and its workers) again and again, at a moment of chance, until the study ends.
    chance, kept, attempts = random.Random(seed), {}, 0
    process = subprocess.Popen(
        command("compare", "study.toml", "--workers", "2"), start_new_session=True, stderr=subprocess.DEVNULL
    )
    while True:
        try:
            # A start takes some seconds; the later attempts are given more, so that the loop ends.
            process.wait(chance.uniform(2.0, 7.0) + 3 * attempts)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        attempts += 1
        now = finished(folder)
        assert {path: now[path] for path in kept} == kept  # What was finished is as it was.
        kept = now
        again = "resume", "runs/study"
        if not (folder / "runs" / "study" / "study.json").exists():
            again = "compare", "study.toml"
        process = subprocess.Popen(command(*again, "--workers", "2"), start_new_session=True, stderr=subprocess.DEVNULL)
    assert process.returncode == 0
    now = finished(folder)
    assert {path: now[path] for path in kept} == kept
    records = [json.loads(content) for content in now.values()]
    assert results(records) == whole
    assert attempts >= 1
    store = Store(str(folder / "runs" / "study" / "study.db"), "study")
    assert len(store._storage.get_all_trials(store._study)) == TRIALS
    store.close()


def test_a_killed_worker_is_replaced(folder, whole):
    process = subprocess.Popen(
        command("compare", "study.toml", "--workers", "1"), start_new_session=True, stderr=subprocess.DEVNULL
    )
    try:
        deadline, killed = time.monotonic() + 60, None
        while killed is None and time.monotonic() < deadline:
            time.sleep(0.05)
            if (folder / "runs" / "study" / "study.json").exists():
                store = Store(str(folder / "runs" / "study" / "study.db"), "study")
                running = [t for t in store.trials() if t.state == "RUNNING"]
                store.close()
                if running and running[0].owner:
                    killed = running[0].owner["pid"]
                    os.kill(killed, signal.SIGKILL)
        assert killed
        assert process.wait(120) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert results(json.loads(content) for content in finished(folder).values()) == whole


def test_workers_end_with_the_command_that_started_them(folder):
    process = subprocess.Popen(command("compare", "study.toml", "--tokens", "1e6", "--workers", "1"), stderr=subprocess.DEVNULL)
    pid, deadline = None, time.monotonic() + 60
    while pid is None and time.monotonic() < deadline:
        time.sleep(0.1)
        if (folder / "runs" / "study" / "study.json").exists():
            store = Store(str(folder / "runs" / "study" / "study.db"), "study")
            running = [t for t in store.trials() if t.state == "RUNNING" and t.owner]
            pid = running[0].owner["pid"] if running else None
            store.close()
    process.kill()
    process.wait()
    assert pid is not None
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline + 20:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")
    store = Store(str(folder / "runs" / "study" / "study.db"), "study")
    assert "RUNNING" not in {trial.state for trial in store.trials()}
    store.close()


def test_two_workers_on_one_store_share_the_trials(folder, whole):
    url = f"sqlite:///{folder}/shared.db"

    def planned_only(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gatework.bench.worker.run", planned_only)
        with pytest.raises(KeyboardInterrupt):
            compare("study.toml", out="runs/study", store=url, workers=0, quiet=True, name="study")
    workers = [
        subprocess.Popen(command("work", "--store", url, *more), stdout=subprocess.PIPE, text=True)
        for more in ([], ["--study", "study"])
    ]
    ran = [int(worker.communicate(timeout=120)[0].split()[0]) for worker in workers]
    assert sum(ran) == TRIALS
    assert min(ran) > 0
    assert results(resume("runs/study", quiet=True).records) == whole


WRONG = [
    (["compare", "study.toml", "--variant", "a=feedforward=versatil"], "no feedforward 'versatil'"),
    (["compare", "study.toml", "--variant", "a=mixer=atention"], "no mixer 'atention'; did you mean 'attention'?"),
    (
        ["compare", "study.toml", "--variant", "a=mixer=attention(windw=4)"],
        "attention has no argument 'windw'; did you mean 'window'?",
    ),
    (["compare", "study.toml", "--variant", "a=mixer=attention(window=x)"], "window must be a whole number or None, got 'x'"),
    (["compare", "study.toml", "--variant", "a=mixer=attention(window=0)"], "window"),
    (["compare", "study.toml", "--variant", "a=mixer=attention(heads=5)"], "variant 'a': attention: "),
    (["compare", "study.toml", "--variant", "a=heads=3"], "variant 'a': attention: "),
    (["compare", "study.toml", "--variant", "a=mixer=attention("], "is not a part expression"),
    (["compare", "study.toml", "--variant", "a=mixer=os.system('x')"], "is not a part"),
    (["compare", "study.toml", "--variant", "a=mixer=attention(causal=false)"], "a language model needs a causal mixer"),
    (["compare", "study.toml", "--variant", "nothing"], "a variant is written NAME="),
    (["compare", "study.toml", "--model", "d_model=15"], "the baseline: attention: "),
    (["compare", "study.toml", "--match", "bytes"], "match must be one of params, flops, seconds, none, not 'bytes'"),
    (["compare", "study.toml", "--seeds", "many"], "--seeds takes a number, not 'many'"),
    (["compare", "study.toml", "--seeds", "0"], "seeds must be a whole number of at least 1, not 0"),
    (["compare", "study.toml", "--learning-rates", "1e-3"], "learning_rates is a range"),
    (["compare", "study.toml", "--sedes", "3"], "'--seeds'"),
    (["compare", "study.toml", "--import", "nowhere_at_all"], "cannot be imported"),
    (["compare", "study.toml", "--data", "none.txt"], "there is no data file"),
    (["compare", "study.toml", "--data", "empty.txt"], "is empty"),
    (["compare", "study.toml", "--data", "short.txt"], "too short"),
    (["compare", "study.toml", "--data", "."], "is not a file"),
    (["compare", "--task", "text", "--data", "short.txt"], "too short"),
    (["compare", "--task", "txet"], "no task 'txet'; did you mean 'text'?"),
    (["compare", "--task", "digits", "--data", "book.txt"], "data goes with the task 'text'"),
    (["compare", "none.toml"], "there is no study file 'none.toml'"),
    (["compare", "malformed.toml"], "malformed.toml is not valid TOML: .*line 3"),
    (["compare", "unknown.toml"], "unknown.toml, line 2: unknown key 'sedes'; did you mean 'seeds'?"),
    (["compare", "study.toml", "--out", "book.txt/runs"], "output folder 'book.txt/runs' cannot be written"),
    (["compare", "study.toml", "--out", "book.txt"], "(output folder|cannot be read|cannot be written)"),
    (["compare", "study.toml", "--out", "/proc/runs"], "cannot be written"),
    (["compare", "study.toml", "--store", "nonsense://x"], "cannot be reached"),
    (["compare", "study.toml", "--store", "sqlite:////nowhere/at/all.db"], "cannot be reached"),
    (["compare", "study.toml", "--store", "sqlite:///book.txt"], "cannot be reached: file is not a database"),
    (["resume", "nowhere"], "there is no study at 'nowhere/study.json'"),
    (["report", "nowhere"], "nowhere"),
    (["resume"], "(required|FOLDER)"),
    (["work"], "say where the trials are"),
    (["work", "--store", "none.db"], "there is no store at 'none.db'"),
    (["evaluate", "none.safetensors"], "there is no checkpoint"),
    (["evaluate", "pickle.safetensors"], "is a pickle"),
    (["evaluate", "truncated.safetensors"], "is truncated"),
    (["evaluate", "foreign.safetensors"], "not a checkpoint of gatework's bench"),
    (["evaluate", "book.txt"], "not a safetensors file"),
    (["parts", "golo"], "no part 'golo'; did you mean 'golu'?"),
    (["papers", "golo"], "no paper 'golo'; did you mean 'golu'?"),
    (["profile", "golo"], "no part 'golo'"),
    (["profile", "attention(heads=3)", "--d-model", "32"], "attention: "),
    (["profile", "attention", "--tokens", "0"], "--tokens must be at least 1"),
    (["profile", "adamw"], "adamw is an optim, which has no cost of its own"),
    (["profile", "ternary"], "ternary is a weight, which costs what the model around it makes of it"),
    (["profile", "glu(hidden=3)"], "glu has no argument 'hidden'"),
    (["nonsense"], "nonsense"),
    ([], "(Expected one of|required)"),
]


@pytest.fixture
def wrong(folder, book):
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_bytes(b"too short")
    (folder / "malformed.toml").write_text("tokens = 1\nseeds = 3\nvariants = {a = \n")
    (folder / "unknown.toml").write_text("tokens = 1\nsedes = 3\n")
    torch.save({"a": torch.ones(2)}, folder / "pickle.safetensors")
    save_file({"a": torch.ones(2)}, folder / "foreign.safetensors")
    checkpoint.save(folder / "whole.safetensors", {"a": torch.ones(200)})
    (folder / "truncated.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "")
def test_wrong_input_is_answered_with_one_sentence(wrong, capsys, arguments, message):
    code = main(arguments)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert re.search(message, err), err
    assert "Traceback" not in err
    assert err.startswith("gatework: ")


def test_the_same_through_the_real_command(wrong):
    for arguments, message in (WRONG[1], WRONG[16], WRONG[26], WRONG[41]):
        done = subprocess.run(command(*arguments), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1
        assert message.split(".*")[0].strip("'") in done.stderr


def test_another_configuration_under_the_same_name(folder, capsys):
    arguments = ["compare", "study.toml", "--workers", "0", "--tune", "0", "--seeds", "1", "--tokens", "640"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--tokens", "1280"]) == 2
    err = capsys.readouterr().err
    assert "with another configuration" in err
    assert len(err.splitlines()) == 1


def test_an_unreadable_file(folder, capsys, monkeypatch):
    from pathlib import Path

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert main(["compare", "study.toml"]) == 2
    err = capsys.readouterr().err
    assert "cannot be read: Permission denied" in err
    assert len(err.splitlines()) == 1


def test_bytes_are_bytes(folder, capsys):
    (folder / "binary.bin").write_bytes(random.Random(0).randbytes(20_000))
    arguments = [
        "compare",
        "study.toml",
        "--data",
        "binary.bin",
        "--workers",
        "0",
        "--tune",
        "0",
        "--seeds",
        "1",
        "--tokens",
        "640",
    ]
    assert main(arguments) == 0
    record = json.loads((folder / "runs" / "study" / "records" / "final" / "win" / "seed0.json").read_text())
    assert record["status"] == "ok"
    capsys.readouterr()


def test_a_diverging_trial_does_not_stop_the_study(folder, capsys):
    wild = ["--variant", "wild=learning_rates=1e12, 1e13, optim=adamw(weight_decay=10.0)"]
    assert main(["compare", "study.toml", "--workers", "0", *wild]) == 0
    assert "diverged" in capsys.readouterr().out
