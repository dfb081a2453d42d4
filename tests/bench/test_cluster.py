"""The cluster's files, as far as one machine can try them: the job script runs, the manifest's commands are valid."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gatework.bench import study
from gatework.bench.settings import read_toml
from gatework.cli import Compare, Resume, Work, _parse

DOCS = Path(__file__).parents[2] / "docs"
SCRIPT, MANIFEST = DOCS / "cluster" / "gatework.sbatch", DOCS / "cluster" / "gatework-job.yaml"


@pytest.fixture
def slurm(tmp_path):
    """A folder with a small study, and ``start(task)``: one task of the array, as SLURM would start it."""
    (tmp_path / "small.toml").write_text('tokens = 256\ntune = 0\nseeds = 1\ntask = "digits"\n[variants]\ng = "activation=golu"\n')
    programs = tmp_path / "bin"
    programs.mkdir()
    stubs = {
        "srun": 'echo srun "$@" >> srun.log\nexec "$@"',
        "sleep": "exec /bin/sleep 0.1",
        "gatework": f'exec {shlex.quote(sys.executable)} -m gatework.cli "$@"',
    }
    for name, text in stubs.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)

    def start(task, *arguments, **more):
        variables = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_CPUS_PER_TASK": "1",
            "GATEWORK_STORE": f"sqlite:///{tmp_path}/store.db",
        }
        environment = {name: value for name, value in (os.environ | variables | more).items() if value is not None}
        with open(tmp_path / f"task{task}.log", "w") as log:
            return subprocess.Popen(["bash", SCRIPT, *arguments], cwd=tmp_path, env=environment, stdout=log, stderr=log)

    return tmp_path, start


@pytest.mark.slow
def test_the_job_array_runs_a_study(slurm):
    """The workers come first, and wait until the first task has planned the study."""
    folder, start = slurm
    (folder / "store.db").touch()
    tasks = [start(1, "small.toml"), start(0, "small.toml", "--seeds", "2")]
    try:
        codes = [task.wait(200) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
            task.wait()
    assert codes == [0, 0], [(folder / f"task{task}.log").read_text() for task in (0, 1)]
    records = [json.loads(path.read_text()) for path in (folder / "runs" / "small" / "records").rglob("*.json")]
    assert sorted(record["key"] for record in records) == [f"final/{name}/seed{i}" for name in ("baseline", "g") for i in range(2)]
    assert {record["status"] for record in records} == {"ok"}
    assert (folder / "runs" / "small" / "report.html").exists()
    assert "trials run here; nothing is left" in (folder / "task1.log").read_text()
    assert "gatework work --study small" in (folder / "srun.log").read_text()


def test_the_script_says_what_is_missing(slurm):
    folder, start = slurm
    assert start(0).wait(20) != 0
    assert "usage: sbatch gatework.sbatch STUDY.TOML" in (folder / "task0.log").read_text()
    assert start(0, "small.toml", GATEWORK_STORE=None).wait(20) != 0
    assert "set it to the URL of the database" in (folder / "task0.log").read_text()


def test_the_script_is_bash_with_options_that_sbatch_has():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    lines = SCRIPT.read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").split("=") for line in lines if line.startswith("#SBATCH"))
    assert set(options) == {"job-name", "array", "ntasks", "cpus-per-task", "mem", "time", "output"}
    assert re.fullmatch(r"\d+-\d+", options["array"])
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    first = next(index for index, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch reads no option behind the first command"


def test_the_manifest_s_commands_and_references_are_valid(tmp_path):
    documents = {(d["kind"], d["metadata"]["name"]): d for d in yaml.safe_load_all(MANIFEST.read_text())}
    assert [kind for kind, _ in documents] == ["Secret", "ConfigMap", "Job", "Job"]
    commands = {}
    for (kind, name), job in documents.items():
        if kind != "Job":
            continue
        assert job["apiVersion"] == "batch/v1"
        pod = job["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "OnFailure"
        (container,) = pod["containers"]
        (variable,) = container["env"]
        key = variable["valueFrom"]["secretKeyRef"]
        assert key["key"] in documents["Secret", key["name"]]["stringData"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} == set(volumes)
        for volume in volumes.values():
            assert "configMap" not in volume or ("ConfigMap", volume["configMap"]["name"]) in documents
        words = [word.replace(f"$({variable['name']})", "sqlite:///x.db") for word in container["command"]]
        assert all(isinstance(word, str) for word in container["command"])
        assert not any("$" in word for word in words)
        assert words[0] == "gatework"
        commands[name] = _parse(words[1:])
    compare, work = commands["gatework-compare"], commands["gatework-work"]
    assert isinstance(compare, Compare)
    assert isinstance(work, Work)
    assert work.study == compare.name == "study"
    assert documents["Job", "gatework-work"]["spec"]["parallelism"] >= 1
    text = documents["ConfigMap", "gatework-study"]["data"][Path(compare.study).name]
    (tmp_path / "study.toml").write_text(text)
    assert set(study.define(read_toml(tmp_path / "study.toml")).resolved) == {"baseline", "gla", "versatile"}


def test_the_page_s_commands_are_valid():
    lines = [line[2:] for line in (DOCS / "cluster.md").read_text().splitlines() if line.startswith("$ gatework ")]
    parsed = [_parse(shlex.split(line)[1:]) for line in lines]
    assert {type(command) for command in parsed} == {Compare, Work}
    for name in re.findall(r"\]\((cluster/\S+)\)", (DOCS / "cluster.md").read_text()):
        assert (DOCS / name).exists()
    assert isinstance(_parse(["resume", "runs/study"]), Resume)
