from __future__ import annotations

import json
import subprocess
import sys

import pytest

import gatework
from gatework.cli import main

STUDY = """
data = "book.txt"
tokens = 640
tune_tokens = 320
batch_size = 4
tune = 1
seeds = 2
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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "book.txt").write_bytes(b"".join(b"%d times %d is %d\n" % (i % 13, i % 7, (i % 13) * (i % 7)) for i in range(2000)))
    (tmp_path / "study.toml").write_text(STUDY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gatework {gatework.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["work", "--help"], ["profile", "--help"]])
def test_help(capsys, arguments):
    assert main(arguments) == 0
    assert "usage: gatework" in capsys.readouterr().out


def test_parts_fit_eighty_columns(capsys):
    assert main(["parts"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    for name in ("attention", "gla", "gated_attention", "glu", "mlp", "golu", "stack", "gateskip", "adamw", "cosine", "backprop"):
        assert f" {name} " in out


def test_a_part(capsys):
    assert main(["parts", "gated_attention"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "gatework.mixers.gated_attention.GatedAttention" in out
    assert "Args:" in out
    assert "heads" in out
    assert "default 4" in out
    assert "any_length" in out
    assert "arxiv.org/abs/2505.06708" in out


def test_papers(capsys):
    assert main(["papers"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "adabelief" in out
    assert main(["papers", "gla"]) == 0
    assert "Gated Linear Attention" in capsys.readouterr().out


@pytest.mark.parametrize("expression", ["golu", "glu(activation=gelu)", "attention(heads=2)", "gla", "stack", "gateskip"])
def test_profile(capsys, expression):
    assert main(["profile", expression, "--d-model", "32", "--tokens", "16", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(expression)
    assert "forward and backward" in out
    assert "parameters" in out


def test_profile_counts_what_it_says(capsys):
    assert main(["profile", "glu(d_ff=48)", "--d-model", "32", "--tokens", "16"]) == 0
    assert f"per token, forward: {2 * 3 * 32 * 48:,} FLOPs" in capsys.readouterr().out


def test_compare_report_evaluate(folder, capsys):
    assert main(["compare", "study.toml", "--workers", "0", "--save", "--seeds", "3"]) == 0
    out = capsys.readouterr().out
    assert "win" in out
    assert "Report: runs/study/report.html" in out
    for name in ("report.html", "report.md", "study.json", "study.db"):
        assert (folder / "runs" / "study" / name).stat().st_size > 0
    assert json.loads((folder / "runs" / "study" / "study.json").read_text())["seeds"] == 3
    (folder / "runs" / "study" / "report.html").unlink()
    assert main(["report", "runs/study"]) == 0
    assert capsys.readouterr().out == out
    assert (folder / "runs" / "study" / "report.html").exists()
    model = "runs/study/models/final-win-seed0.safetensors"
    assert main(["evaluate", model]) == 0
    record = json.loads((folder / "runs" / "study" / "records" / "final" / "win" / "seed0.json").read_text())
    assert f"{record['score']:.4f}" in capsys.readouterr().out
    assert main(["resume", "runs/study"]) == 0
    assert capsys.readouterr().out == out


def test_flags_win_over_the_file(folder):
    arguments = [
        "compare",
        "study.toml",
        "--variant",
        "mlp=feedforward=mlp, learning_rates=1e-3, 1e-2",
        "--tokens",
        "1.28e3",
        "--out",
        "runs/x",
    ]
    more = [
        "--seeds",
        "1",
        "--tune",
        "0",
        "--match",
        "none",
        "--workers",
        "0",
        "--learning-rates",
        "1e-4,1e-2",
        "--model",
        "layers=2",
    ]
    assert main(arguments + more) == 0
    study = json.loads((folder / "runs" / "x" / "study.json").read_text())
    assert (study["name"], study["tokens"], study["match"], study["learning_rates"]) == ("x", 1280, "none", [1e-4, 1e-2])
    assert study["variants"] == {
        "baseline": "mixer=attention, feedforward=glu",
        "mlp": "feedforward=mlp, learning_rates=1e-3, 1e-2",
    }
    assert study["definition"]["model"]["layers"] == 2


def test_a_failed_trial_ends_with_one(folder, monkeypatch, capsys):
    from gatework.bench import trial

    def broken(*args):
        raise RuntimeError("no luck")

    monkeypatch.setattr(trial._Trial, "results", broken)
    assert main(["compare", "study.toml", "--workers", "0"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "gatework: 6 of 6 trials failed, the first tune/win/0: RuntimeError: no luck" or "trials failed" in error


def test_stopping_says_how_to_go_on(folder, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("gatework.bench.worker.run", stop)
    assert main(["compare", "study.toml", "--workers", "0"]) == 130
    assert "continue with gatework resume" in capsys.readouterr().err


def test_a_defect_is_told_as_one(monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("gatework.show.list_parts", broken)
    assert main(["parts"]) == 1
    assert "ZeroDivisionError: oh" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        main(["parts", "--debug"])


def test_light_commands_import_nothing_heavy():
    code = (
        "import sys; from gatework.cli import main; main(['parts']); main(['papers']); "
        "print([m for m in ('optuna', 'scipy', 'plotly', 'sklearn') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "[]"
