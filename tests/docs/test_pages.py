"""What the pages of parts are made of, and that the documentation builds."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import docstrings
import pages
import pytest
from sphinx.ext.napoleon import Config

from gatework.bench.study import DEFAULT_VARIANTS
from gatework.bench.tasks import TASKS
from gatework.claims import Finding, Outcome
from gatework.core import check, entries
from gatework.core.expression import show
from gatework.core.papers import papers
from gatework.core.registry import parameters

ROOT = Path(__file__).parents[2]


def build(builder: str, folder: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder, "-d", folder / "trees"]
    done = subprocess.run([*command, ROOT / "docs", folder / builder], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_documentation_is_read_without_a_warning(tmp_path):
    build("dummy", tmp_path)  # Everything but writing the pages, which takes longer than all the rest.


@pytest.mark.slow
def test_the_pages_hold_every_argument_and_fetch_nothing(tmp_path):
    build("html", tmp_path)
    for entry in entries():
        page = (tmp_path / "html" / f"{pages.page_of(entry.name)}.html").read_text(encoding="utf-8")
        text = re.sub(r"<[^>]+>", "", page)
        assert {name for name in parameters(entry.cls) if name not in text} == set()
        assert "system-message" not in page
    fetched = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)\"")
    assert {a for path in (tmp_path / "html").rglob("*.html") for a in fetched.findall(path.read_text(encoding="utf-8"))} == set()


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_what_a_page_says_of_using_a_part_works(entry):
    lines = pages.usage(entry)
    code = [line[3:] for line in lines[lines.index(".. code-block:: python") + 2 :] if line.startswith("   ") or not line]
    code = code[: code.index("As an expression it is")] if "As an expression it is" in code else code
    python = "\n".join(line for line in code if re.match(r"(from|model) ?", line) or not line)
    exec(python, {})
    written = [line.strip() for line in lines if line.startswith(f"   {entry.name}")]
    assert written
    for expression in written:
        assert check(expression).name == entry.name
    meanings = docstrings.items(entry.cls)
    for name in parameters(entry.cls):
        assert meanings.get(name), f"{entry.name}: the docstring says nothing of {name}"


@pytest.mark.parametrize("name", TASKS)
def test_the_page_of_tasks_says_what_every_option_means(name):
    meanings = docstrings.items(TASKS[name])
    assert [option for option in parameters(TASKS[name]) if not meanings.get(option)] == []
    section = "\n".join(pages.task_section(TASKS[name], Config()))
    assert f".. _task-{name}:" in section
    for option, parameter in parameters(TASKS[name]).items():
        assert f"``{option}``" in section
        assert show(parameter.default) in section
    assert TASKS[name].score_name in section
    assert f":ref:`{name} <task-{name}>`" in "\n".join(pages.tasks_page(Config()))


def test_every_part_with_a_paper_is_on_the_selection_page():
    text = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
    missing = [entry.name for entry in entries() if entry.paper and f"{{part}}`{entry.name}`" not in text]
    assert missing == []


def test_arguments_of_a_docstring():
    class Thing:
        """It is.

        Args:
            a: first, with: a colon
                and a second line.
            b, c: both.

        Other: nothing.
        """

    assert docstrings.items(Thing) == {"a": "first, with: a colon and a second line.", "b": "both.", "c": "both."}


def test_equations_become_literal_blocks_and_hanging_indents_paragraphs():
    given = """A sum of |x|:

    y = |x| + 1

Padding: a token
    without a key.

Args:
    x: a number
        of its own.

- one
  point"""
    assert "\n".join(docstrings.readable(given.splitlines())) == """A sum of \\|x\\|:

.. code-block:: text

    y = |x| + 1

Padding: a token
without a key.

Args:
    x: a number
        of its own.

- one
  point"""


def test_a_docstring_without_a_section_and_its_first_sentence():
    given = "First.\n\nSecond.\n\nArgs:\n    x: a.\n\n    More of it.\n\nRaises:\n    ValueError: b."
    assert docstrings.without(given, "Args") == "Second.\n\nRaises:\n    ValueError: b."


def test_shapes_are_read_from_annotations():
    assert pages.shape('Float[Tensor, "B T D"]') == "(B, T, D), float"
    assert pages.shape('Bool[Tensor, "*B"] | None') == "(...), bool"
    assert pages.shape("State | None") == "``State | None``"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A folder of results with one study in it."""
    spec = importlib.util.spec_from_file_location("synthetic", ROOT / "tests" / "bench" / "synthetic.py")
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    study, records = synthetic.build()
    folder = tmp_path_factory.mktemp("results")
    (folder / "text" / "big").mkdir(parents=True)
    (folder / "text" / "big" / "report.json").write_text(json.dumps({"study": study, "records": records}), encoding="utf-8")
    return pages.studies(folder)


@pytest.mark.parametrize(("part", "variant"), [("gla", "gla"), ("moe", "moe"), ("topk", "moe"), ("versatile_ffn", "wide")])
def test_a_kept_study_is_shown_on_the_pages_of_its_parts(kept, part, variant):
    shown = "\n".join(pages.measured(part, kept, {}, default=False))
    assert re.findall(r"^   \* - (\S+)$", shown, flags=re.MULTILINE) == ["variant", "baseline", variant]
    row = next(row for row in kept["text-big"].rows if row.name == variant)
    assert row.verdict.word in shown
    assert kept["text-big"].difference(row) in shown
    assert "</parts/results/text-big>`" in shown
    assert "Smallest difference this study could have seen" in shown


@pytest.mark.parametrize("part", ["golu", "glu", "attention", "k"])
def test_a_part_that_no_kept_variant_names_has_no_figures(kept, part):
    assert pages.measured(part, kept, {}, default=False) == ["", "No result is kept for this part.", ""]


def test_the_page_of_a_kept_study_has_every_variant_and_what_went_wrong(kept):
    text = "\n".join(pages.study_page("text-big", kept["text-big"]))
    for row in kept["text-big"].rows:
        assert f"   * - {row.name}\n" in text
    assert "diverged" in text
    assert "worse than the baseline: gla" in text


def test_a_kept_table_is_shown_on_the_pages_of_the_parts_that_its_rows_begin_with(tmp_path):
    (tmp_path / "surgery").mkdir()
    text = "# Kept\n\n| conversion | loss |\n|---|---:|\n| base | 3.1 |\n| gateskip, budget 0.5 | 3.2 |\n| ternary | 4 |\n\n"
    text += "More.\n\n| gate | kept | seen |\n|---|---|---|\n| `topk(k=2)` | 1 | yes |\n| `gateskip` | **2** | no |\n"
    (tmp_path / "surgery" / "README.md").write_text(text, encoding="utf-8")
    others = pages.tables(tmp_path)
    assert others["surgery"][0][0] == ["conversion", "loss"]
    shown = "\n".join(pages.measured("gateskip", {}, others, default=False))
    assert re.findall(r"^   \* - (.+)$", shown, flags=re.MULTILINE) == [
        "conversion", "base", "gateskip, budget 0.5", "gate", "``topk(k=2)``", "``gateskip``",
    ]
    first = "\n".join(pages.measured("topk", {}, others, default=False))
    assert re.findall(r"^   \* - (.+)$", first, flags=re.MULTILINE) == ["gate", "``topk(k=2)``"]
    assert pages.measured("budget", {}, others) == pages.measured("glu", {}, others) == ["", "No result is kept for this part.", ""]


def test_a_kept_claim_is_shown_with_its_findings(tmp_path):
    assert pages.claimed(papers()["gla"], tmp_path) == []
    Outcome("gla", "So it is.", (Finding("slope *", "-1/2", -0.512, (-0.55, -0.47), "holds here"),), {}, 1.0).write(tmp_path)
    shown = "\n".join(pages.claimed(papers()["gla"], tmp_path))
    assert "``gatework claims gla`` measures it; altogether it is **holds here**" in shown
    for cell in (r"slope \*", "-1/2", "-0.512", "[-0.550, -0.470]", "holds here"):
        assert f" - {cell}\n" in shown + "\n"


def test_the_default_study_is_read_from_the_readme():
    above, rows, seen = pages.default_study()
    assert any("verdict" in line for line in above)
    assert set(rows) == {"baseline", *DEFAULT_VARIANTS["decoder"]}
    assert re.fullmatch(r"Smallest difference this study could have seen: [\d.]+ \(.*\)\.", seen)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(row in readme for row in rows.values())
    assert rows["gla"] in "\n".join(pages.measured("gla", {}, {})).replace("\n   ", "\n")
