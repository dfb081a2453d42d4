"""The examples and the code of the README run, as a reader would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Arguments that make an example short; every script of examples/ is run.
ARGUMENTS = {"compare_two.py": ["6e3"], "train_hybrid.py": ["5"]}


def run(*command: str, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


#: Those that train for more than a few seconds.
LONG = ("compare_two.py", "skip_gates.py", "train_hybrid.py")


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.name, marks=[pytest.mark.slow] * (path.name in LONG))
        for path in sorted((ROOT / "examples").glob("*.py"))
    ],
)
def test_an_example_runs(script, tmp_path):
    out = run(str(script), *ARGUMENTS.get(script.name, []), folder=tmp_path)
    if script.name == "own_module.py":
        assert "step 200  loss 0.0" in out
    if script.name == "train_hybrid.py":
        assert len(re.findall(r"'loss': '?\d\.\d+", out)) == 5
        assert "KING HENRY.\n" in out
    if script.name == "compare_two.py":
        assert re.search(r"No variant is told apart|(?:Better|Worse) than the baseline: gated", out)
        assert len(re.findall(r"^(?:tune|final)/(?:gated|baseline)/\w+ ok \d+\.\d+$", out, flags=re.MULTILINE)) == 6
    assert list(tmp_path.iterdir()) == []  # Nothing is left behind.


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_the_python_blocks_of_a_document_run_one_after_the_other(document, tmp_path):
    code = blocks(document, "python")
    assert code or document != "README.md"
    if code:
        (tmp_path / "blocks.py").write_text("\n".join(code), encoding="utf-8")
        run("-W", "error", "blocks.py", folder=tmp_path)


def test_the_code_inside_the_readmes_sentences_runs(tmp_path):
    calls = re.findall(r"`(gatework\.\w[\w.]*\(.+?\))`", (ROOT / "README.md").read_text(encoding="utf-8"))
    calls = [call for call in calls if "..." not in call]
    assert calls
    imports = re.findall(r"`(from gatework[\w.]* import \w+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert imports
    run("-W", "error", "-c", "\n".join(["import gatework.models", *imports, *calls]), folder=tmp_path)


def test_the_looking_commands_of_the_readme_run(tmp_path):
    lines = [line for block in blocks("README.md", "console") for line in block.splitlines()]
    commands = [re.sub(r"\s+#.*", "", line) for line in lines if re.match(r"\$ gatework (parts|papers|profile)", line)]
    assert len(commands) >= 3
    code = "import shlex, sys\nfrom gatework.cli import main\n" + "".join(
        f"sys.argv = shlex.split({command.removeprefix('$ ')!r})\nassert not main()\n" for command in commands
    )
    out = run("-c", code, folder=tmp_path)
    assert "versatile_ffn" in out
    assert "forward and backward" in out
