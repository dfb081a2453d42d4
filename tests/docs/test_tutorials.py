"""The tutorials run as a reader would run them, and print what they show."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
FENCE = re.compile(r"^```(\w+)( numbers vary)?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
#: With the rule over a table, which is as wide as the numbers beneath it.
NUMBER = re.compile(r"[+-]?\d[\d.,]*(?:[%a-zA-Z]+\b)?|─+")
END = "\x1e"


def blocks(page: str) -> list[tuple[str, str | None, bool]]:
    """The page's python blocks in order, each with the output that a text block right after it shows, and whether its numbers
    depend on the machine."""
    found: list[tuple[str, str | None, bool]] = []
    end = 0
    for fence in FENCE.finditer(page):
        kind, vary, content = fence.groups()
        if kind == "python":
            found.append((content, None, False))
        elif kind == "text" and found and not page[end : fence.start()].strip():
            found[-1] = found[-1][0], content, bool(vary)
        end = fence.end()
    return found


def check(page: str, folder: Path) -> None:
    """Run the blocks of a page one after the other; ``...`` in an output stands for anything, and so does every number in a block
    that opens with ``text numbers vary``."""
    code = blocks(page)
    assert code
    script = folder / "tutorial.py"
    script.write_text("".join(f"{block}\nprint({END!r}, end='', flush=True)\n" for block, *_ in code), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, script.name], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for (block, shown, vary), printed in zip(code, done.stdout.split(END), strict=False):
        want, got = (NUMBER.sub("#", text or "") if vary else text or "" for text in (shown, printed))
        same = shown is None or doctest.OutputChecker().check_output(want, got, flags)
        assert same, f"{block}\nprints\n{printed}\nand the page shows\n{shown}"


#: Over ten seconds: those that start workers, import transformers, or read a model of 135 million parameters.
SLOW = {"hugging_face", "many_machines", "own_data", "surgery"}
PAGES = [
    pytest.param(page, id=page.stem, marks=[pytest.mark.slow] if page.stem in SLOW else [])
    for page in sorted((DOCS / "tutorials").glob("*.md"))
]


@pytest.mark.parametrize("page", PAGES)
def test_a_tutorial_runs_and_prints_what_it_shows(page, tmp_path):
    check(page.read_text(encoding="utf-8"), tmp_path)


def test_an_output_that_differs_is_found(tmp_path):
    page = "```python\nprint(1 + 1)\n```\n\n```text\n{}\n```\n"
    check(page.format("2"), tmp_path)
    check(page.format("..."), tmp_path)
    with pytest.raises(AssertionError, match=r"prints\s+2\s+and the page shows\s+3"):
        check(page.format("3"), tmp_path)
    check(page.format("3").replace("```text", "```text numbers vary"), tmp_path)
    with pytest.raises(AssertionError, match="and the page shows"):
        check(page.format("two").replace("```text", "```text numbers vary"), tmp_path)


def test_a_block_that_raises_is_found(tmp_path):
    with pytest.raises(AssertionError, match="NameError"):
        check("```python\nx = 1\n```\n\n```python\ny + x\n```\n", tmp_path)


def test_a_text_block_after_a_paragraph_is_no_output():
    assert blocks("```python\na\n```\n\nThe grammar:\n\n```text\nb\n```\n") == [("a\n", None, False)]
    assert blocks("```python\na\n```\n\n```text\nb\n```\n") == [("a\n", "b\n", False)]
