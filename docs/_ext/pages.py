"""Pages that come from the library itself: one per part, per family, per public module, the papers, the tasks, the command line.

They are written as reStructuredText into ``parts/`` and ``reference/`` when a build starts; both folders are git-ignored.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import os
import pkgutil
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import public_names
from docstrings import items, readable, without
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

from gatework.bench.comparison import Comparison, Row
from gatework.bench.formats import si
from gatework.bench.study import DEFAULT_VARIANTS
from gatework.bench.tasks import TASKS, Task
from gatework.core.contracts import CAPABILITIES, No, capability
from gatework.core.errors import GateworkError
from gatework.core.expression import Spec, parse_pattern, parse_settings, show
from gatework.core.papers import Paper, papers
from gatework.core.registry import TIED, Entry, check, entries, lookup, parameters, slot_of

ROOT = Path(__file__).parents[2]

FAMILIES = {
    "activation": "Activations", "depth": "Depth policies", "experts": "Experts", "feedforward": "Feed-forwards", "gate": "Gates",
    "learner": "Learning rules", "mixer": "Sequence mixers", "optim": "Optimizers", "schedule": "Learning-rate schedules",
    "weight": "Weights",
}  # fmt: skip

#: How a part of a slot is used by its expression: Python, and the setting of a study's variant.
USES = {
    "activation": ('build("glu(activation={})", "feedforward", d_model=64)', "feedforward=glu(activation={})"),
    "gate": ('build("moe(gate={})", "feedforward", d_model=64)', "feedforward=moe(gate={})"),
    "balance": (
        'build("noisy_topk(balance={})", "gate", d_model=64, n_experts=8)', "feedforward=moe(gate=noisy_topk(balance={}))",
    ),
    "feedforward": ('Decoder(vocab_size=256, feedforward="{}")', "feedforward={}"),
    "mixer": ('Decoder(vocab_size=256, mixer="{}")', "mixer={}"),
    "depth": ('Decoder(vocab_size=256, depth="{}")', "depth={}"),
    "weight": ('Decoder(vocab_size=256, weight="{}")', "weight={}"),
    "optim": (None, "optim={}"),
    "schedule": (None, "schedule={}"),
    "learner": (None, "learner={}"),
}
#: The Python of a mixer that is not causal, and what a study needs for it beside its setting.
NOT_CAUSAL = 'Classifier((1, 8, 8), classes=10, backbone="vit", mixer="{}")', '--task digits --model "backbone=vit" '
IMPORTS = {
    "build": "from gatework.core import build", "Decoder": "from gatework.models import Decoder",
    "Classifier": "from gatework.models import Classifier",
}  # fmt: skip


# reStructuredText


def heading(text: str, line: str = "-") -> list[str]:
    """A heading with blank lines around it."""
    return ["", text, line * len(text), ""]


def block(kind: str, lines: Iterable[str]) -> list[str]:
    """A code block."""
    return ["", f".. code-block:: {kind}", "", *(f"   {line}".rstrip() for line in lines), ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], name: str = "") -> list[str]:
    """A table; cells are reStructuredText of one paragraph each."""
    out = ["", ".. list-table::", "   :header-rows: 1", *([f"   :class: {name}"] if name else []), ""]
    for row in [head, *rows]:
        out += [f"   {'* -' if i == 0 else '  -'} {' '.join(cell.split())}".rstrip() for i, cell in enumerate(row)]
    return [*out, ""]


def tree(pages: Iterable[str], *options: str) -> list[str]:
    """A table of contents."""
    return ["", ".. toctree::", *(f"   {option}" for option in options), "", *(f"   {page}" for page in pages), ""]


def prose(docstring: str, config: Any) -> list[str]:
    """A docstring, or a piece of one."""
    return str(GoogleDocstring("\n".join(readable(docstring.splitlines())), config, what="class")).splitlines()


def code(text: str) -> str:
    """Text as code, in a table's cell."""
    return f"``{text}``" if text else ""


# Kept results


def studies(folder: Path | None = None) -> dict[str, Comparison]:
    """The studies whose ``report.json`` is kept under ``results/``, by the name of their folder."""
    folder = folder or ROOT / "results"
    found = {}
    for path in sorted(folder.rglob("report.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        found["-".join(path.parent.relative_to(folder).parts) or path.stem] = Comparison(kept["study"], kept["records"])
    return found


#: A table's rows of cells, the head first.
Rows = list[list[str]]


def tables(folder: Path | None = None) -> dict[str, list[Rows]]:
    """The tables in the ``README.md`` files under ``results/``, by the name of the folder.

    A folder with a ``report.json`` is a study and not read here.
    """
    folder = folder or ROOT / "results"
    found = {}
    for path in sorted(folder.rglob("README.md")):
        blocks = re.findall(r"(?:^\|.*\n?)+", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        read = [
            [[cell.strip() for cell in line.strip("| ").split("|")] for line in block.splitlines() if set(line) - set("|-: ")]
            for block in blocks
        ]
        if read and not (path.parent / "report.json").is_file():
            found["-".join(path.parent.relative_to(folder).parts)] = read
    return found


def default_study() -> tuple[list[str], dict[str, str], str]:
    """The default study's table as the README prints it: the lines above its rows, the rows by variant, what it could have seen."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(part for part in re.findall(r"^```text\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL) if "─" in part)
    head, rest = re.split(r"─+\n", block, maxsplit=1)
    rows, beneath = rest.split("\n\n", 1)
    seen = re.match(r"Smallest difference.*?\)\.", beneath, flags=re.DOTALL)
    return head.splitlines(), {row.split()[0]: row for row in rows.splitlines()}, " ".join(seen[0].split()) if seen else ""


def named(value: Any) -> Iterator[str]:
    """Names of the parts in a setting's value, those inside other parts too."""
    if isinstance(value, Spec):
        yield value.name
        for inner in (*value.positional, *value.args.values()):
            yield from named(inner)
    elif isinstance(value, str):
        with contextlib.suppress(GateworkError):
            for spec in parse_pattern(value):
                yield from named(spec)


def holds(row: Row, part: str) -> bool:
    """Whether a variant's own settings name the part."""
    settings = parse_settings(row.settings) if row.settings else {}
    return any(part in named(value) for value in settings.values())


def figures(comparison: Comparison, rows: Iterable[Row]) -> list[str]:
    """Some rows of a study's table."""
    from gatework.bench import formats

    cells = [
        (
            row.name, code(row.settings), formats.fixed(row.score, comparison.decimals), comparison.difference(row),
            row.verdict.word if row.verdict else "baseline", formats.si(row.cost.get("parameters")),
            formats.si(row.cost.get("train_flops_per_token")), formats.seconds(row.cost.get("seconds")),
        )
        for row in rows
    ]  # fmt: skip
    unit = comparison.study.get("unit", "token")
    head = ("variant", "settings", "test", "difference ± 95%", "verdict", "params", f"training FLOPs/{unit}", "time")
    return table(head, cells, "figures")


def measured(part: str, kept: dict[str, Comparison], others: dict[str, list[Rows]], default: bool = True) -> list[str]:
    """A part's rows in the kept studies, in the other kept tables (where a row's first word, or the folder, is its name; the first
    row of a table is shown with them) and, while that study is not kept, in the default study as the README shows it; one
    sentence where there are none."""
    out: list[str] = []
    for name, comparison in kept.items():
        rows = [row for row in comparison.rows if row.verdict and holds(row, part)]
        if rows:
            base = next(row for row in comparison.rows if row.verdict is None)
            out += ["", f":doc:`{comparison.title()} </parts/results/{name}>`; {comparison.score_line()}."]
            out += [*figures(comparison, [base, *rows]), comparison.smallest_line(), ""]
    for name, (head, *rows) in ((name, rows) for name, found in others.items() for rows in found):
        mine = [row for row in rows if name == part or re.findall(r"\w+", row[0])[:1] == [part]]
        if mine:
            out += ["", f":doc:`/parts/results/{name}`:", ""]
            shown = mine if rows[0] in mine else [rows[0], *mine]
            cells = [[cell.replace("`", "``") for cell in row] for row in [head, *shown]]
            out += table([escaped(cell) for cell in cells[0]], cells[1:])
    settings = DEFAULT_VARIANTS["decoder"]
    if default and "default" not in kept and part in settings:
        above, lines, seen = default_study()
        if part in lines:
            out += ["", f"The default study (``make compare``), where this variant is ``{settings[part]}``:"]
            out += [*block("text", [*above, lines["baseline"], lines[part]]), seen, ""]
    return out or ["", "No result is kept for this part.", ""]


def study_page(name: str, comparison: Comparison) -> list[str]:
    """A kept study: its whole table and what is written beneath it."""
    lines = [comparison.smallest_line(), comparison.axes_line(), comparison.tuning_line(), comparison.saved_line()]
    out = [*heading(f"Study {name}", "="), comparison.headline(), "", f"{comparison.title()}; {comparison.score_line()}."]
    out += [*figures(comparison, comparison.rows), *(f"- {line}" for line in [*lines, *comparison.notes()] if line)]
    return out


# Parts


def options(cls: type) -> list[str]:
    """The constructor's arguments: type, default, meaning."""
    meanings = items(cls)
    rows = []
    for name, parameter in parameters(cls).items():
        slot = slot_of(cls, name)
        hint = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
        kind = f":doc:`{slot} part </parts/{slot}/index>`" if slot in FAMILIES else code(hint.replace("Any", "object"))
        default = "required" if parameter.default is parameter.empty else code(show(parameter.default))
        rows.append((code(name), kind, default, meanings.get(name, "")))
    out = table(("argument", "type", "default", "meaning"), rows, "options") if rows else ["", "None.", ""]
    refused = items(cls, "Raises")
    return [*out, *(f"Raises ``{error}`` {when}\n" for error, when in refused.items())]


def shapes(entry: Entry) -> list[str]:
    """Shapes and kinds of what ``forward`` takes and returns, read from its annotations."""
    forward = getattr(entry.cls, "forward", None)
    if forward is None:
        return []
    rows = []
    for name, hint in {k: v for k, v in inspect.signature(forward).parameters.items() if k != "self"}.items():
        rows.append((code(name), shape(str(hint.annotation)), "" if hint.default is hint.empty else code(repr(hint.default))))
    rows.append(("returns", shape(str(inspect.signature(forward).return_annotation)), ""))
    return [*heading("Shapes"), *table(("``forward``", "shape", "default"), rows)]


def shape(annotation: str) -> str:
    """``Float[Tensor, "B T D"] | None`` as *(B, T, D)*, float."""
    found = re.search(r"(\w+)\[Tensor, ['\"](.*?)['\"]\]", annotation)
    if not found:
        return code(annotation)
    kind, axes = found.groups()
    return f"({', '.join('...' if axis.startswith('*') else axis for axis in axes.split())}), {kind.lower()}"


def usage(entry: Entry) -> list[str]:
    """The import, and the expression with where it goes."""
    package = entry.cls.__module__.rpartition(".")[0]
    lines = [f"from {package} import {entry.cls.__name__}"]
    python, setting = USES.get(entry.slot, (None, None))
    options = ""
    if entry.slot == "mixer" and not capability(entry.cls, "causal"):
        python, options = NOT_CAUSAL
    if python:
        python = python.format(entry.name)
        width = getattr(entry.cls, "example", {}).get("d_model")  # Of a part that does not take every width.
        python = python if width is None else python.replace("d_model=64", f"d_model={width}")
        lines += [IMPORTS[python.partition("(")[0]], "", f"model = {python}"]
    out = block("python", lines)
    written = {
        name: parameter.default
        for name, parameter in parameters(entry.cls).items()
        if parameter.default not in (parameter.empty, math.inf) and name not in TIED and name != "last_epoch"
    }
    if written:
        full = check(str(Spec(entry.name, written)))
        out += ["As an expression it is", *block("text", [entry.name]), "or, with every default written out,"]
        out += block("text", [str(full)])
    else:
        out += ["As an expression it is", *block("text", [entry.name])]
    if setting:
        command = f'$ gatework compare {options}--variant mine="{setting.format(entry.name)}"'
        out += ["As a variant of a study:", *block("console", [command])]
    return out


def abilities(entry: Entry) -> list[str]:
    """The capabilities with their reasons."""
    stated = [name for name in CAPABILITIES if name in getattr(entry.cls, "capabilities", {})]
    rows = []
    for name in stated:
        answer = capability(entry.cls, name)
        rows.append((code(name), CAPABILITIES[name], "yes" if answer else str(answer)))
    return [*heading("Capabilities"), *table(("capability", "means", "answer"), rows)] if rows else []


def source(paper: Paper | None) -> list[str]:
    """The paper with its claim."""
    if paper is None:
        return ["", "A textbook part without an entry of its own among the :doc:`papers </parts/papers>`.", ""]
    link = f"`{paper.title} <{paper.source}>`__ ({paper.year})"
    return ["", f"{link}; :doc:`all papers </parts/papers>`.", "", "The claim that an experiment can confirm or refute:", "",
            f"   {paper.claim}", "", *claimed(paper)]  # fmt: skip


def claimed(paper: Paper, folder: Path | None = None) -> list[str]:
    """What the kept experiment behind the paper's claim found, where there is one."""
    path = (folder or ROOT / "results" / "claims") / f"{paper.name}.json"
    if not path.is_file():
        return []
    said = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for f in said["findings"]:
        low, high = f["interval"]
        rows.append((escaped(f["what"]), escaped(f["predicted"]), f"{f['measured']:.3f}", f"[{low:.3f}, {high:.3f}]", f["verdict"]))
    found = f"``gatework claims {paper.name}`` measures it; altogether it is **{said['verdict']}**:"
    return [found, "", *table(("measured", "predicted", "mean", "95% interval", "verdict"), rows, "claim")]


def part_page(entry: Entry, kept: dict[str, Comparison], others: dict[str, list[Rows]], config: Any) -> list[str]:
    """A part's page."""
    package = entry.cls.__module__.rpartition(".")[0]
    paper = papers().get(entry.paper or "")
    equation = inspect.cleandoc(sys.modules[entry.cls.__module__].__doc__ or "")
    out = [*heading(entry.name, "="), ".. rst-class:: lead", "", f"{escaped(entry.summary)}.", ""]
    out += ["Family: :doc:`index`."]
    out += [*heading("What it computes"), *prose(equation, config)]
    behaviour = without(inspect.getdoc(entry.cls) or "", "Args", "Raises")
    out += [*heading("Behaviour"), *prose(behaviour, config)] if behaviour else []
    out += shapes(entry)
    out += [*heading("Options"), *options(entry.cls), *heading("How to use it"), *usage(entry), *abilities(entry)]
    out += [*heading("Source"), *source(paper), *heading("Measured"), *measured(entry.name, kept, others)]
    return [*out, *heading("Class"), f".. autoclass:: {package}.{entry.cls.__name__}", "   :members:", "   :show-inheritance:", ""]


def escaped(text: str) -> str:
    """Text without characters that would be read as markup; code stays code."""
    pieces = text.split("``")
    return "``".join(piece if i % 2 else re.sub(r"([*|`\\])", r"\\\1", piece) for i, piece in enumerate(pieces))


def family_page(family: str, members: Sequence[Entry]) -> list[str]:
    """A family's page: one line per part, and what each cannot do."""
    rows = []
    for entry in members:
        able = {name: capability(entry.cls, name) for name in getattr(entry.cls, "capabilities", {})}
        lacks = "; ".join(f"{code(name)}: {answer.reason}" for name, answer in able.items() if isinstance(answer, No))
        paper = papers().get(entry.paper or "")
        year = f"`{paper.year} <{paper.source}>`__" if paper else ""
        rows.append((f":doc:`{entry.name}`", escaped(entry.summary), lacks, year))
    out = [*heading(FAMILIES.get(family, family.capitalize()), "=")]
    out += table(("part", "what it is", "cannot", "paper"), rows, "family")
    return [*out, *tree([entry.name for entry in members], ":hidden:")]


def papers_page() -> list[str]:
    """All papers with the parts that implement them."""
    rows = []
    for paper in papers().values():
        parts = ", ".join(f":doc:`{name} </{page_of(name)}>`" for name in paper.parts)
        rows.append((f"`{paper.title} <{paper.source}>`__", str(paper.year), parts, paper.claim))
    return [*heading("Papers", "="), *table(("paper", "year", "parts", "claim"), rows, "papers")]


def task_section(cls: type[Task], config: Any) -> list[str]:
    """A task's part of the page of tasks."""
    docstring = inspect.getdoc(cls) or ""
    out = [f".. _task-{cls.name}:", *heading(cls.name), *prose(docstring.partition("\n\n")[0], config), ""]
    out += [*prose(without(docstring, "Args", "Raises"), config), "", *prose_of(sys.modules[cls.__module__]), *options(cls)]
    study, better = cls.defaults, "lower" if cls.lower_is_better else "higher"
    low, high = study["learning_rates"]
    settings = ", ".join(filter(None, [study["baseline"], *(f"{key}={show(value)}" for key, value in study["model"].items())]))
    rows = [
        ("score", f"{code(cls.score_name)}, {escaped(cls.score_unit)}, {better} is better"),
        ("model", f"{code(cls.backbone)}, by default {code(settings)}" if settings else code(cls.backbone)),
        ("training", f"{si(study['tokens'])} {cls.unit}s in batches of {study['batch_size']}"),
        ("tuning", f"{si(study['tune_tokens'])} {cls.unit}s a trial, learning rates {low:g} to {high:g}"),
        ("held equal", code(study.get("match", "params"))),
    ]
    return [*out, *table(("its study", ""), rows)]


def tasks_page(config: Any) -> list[str]:
    """What can be learned: every task with its options, its score and the study that it brings along."""
    intro = "What models are compared on. A task is named by ``gatework compare --task NAME``, or with options in a study's file:"
    out = [*heading("Tasks", "="), intro, *block("toml", ["[task]", 'name = "parity"', "length = 64", "extrapolate = true"])]
    out += ["With ``extrapolate`` a task is evaluated at 2 and 4 times the length too, and the report draws its scores against it."]
    summaries = {name: (inspect.getdoc(cls) or "").partition("\n\n")[0].partition(". ")[0] for name, cls in TASKS.items()}
    out += table(("task", "what it is"), [(f":ref:`{name} <task-{name}>`", escaped(said)) for name, said in summaries.items()])
    return out + [line for cls in TASKS.values() for line in ["", *task_section(cls, config)]]


def page_of(part: str) -> str:
    """The page of a part.

    Raises:
        PartError: there is no such part.
    """
    return f"parts/{lookup(part).family}/{part}"


# Reference


def module_page(module: Any, seen: set[int]) -> list[str]:
    """A public module's page; what another page already describes is named with a link."""
    out = [*heading(module.__name__, "="), f".. py:module:: {module.__name__}", "", *prose_of(module)]
    classes = {id(entry.cls): entry for entry in entries()}
    elsewhere = []
    for name in public_names.names(module):
        obj, full = getattr(module, name), f"{module.__name__}.{name}"
        if isinstance(obj, ModuleType):
            continue
        if id(obj) in classes or id(obj) in seen:
            elsewhere.append(name if id(obj) in classes else f":py:obj:`{name} <{obj.__module__}.{obj.__qualname__}>`")
            if id(obj) in classes:
                elsewhere[-1] = f":doc:`{name} </{page_of(classes[id(obj)].name)}>`"
            continue
        if inspect.isclass(obj):
            seen.add(id(obj))
            out += ["", f".. autoclass:: {full}", "   :members:", "   :show-inheritance:", ""]
        elif inspect.isroutine(obj):
            seen.add(id(obj))
            out += ["", f".. autofunction:: {full}", ""]
        else:
            said = public_names.comment(module, name)
            out += ["", f".. py:data:: {name}", "", *(f"   {line}" for line in said), ""]
            if isinstance(obj, dict) and all(isinstance(value, str) for value in obj.values()):
                out += [f"   - ``{key}``: {value}" for key, value in obj.items()]
    return [*out, "", f"Described elsewhere: {', '.join(elsewhere)}.", ""] if elsewhere else out


def prose_of(module: Any) -> list[str]:
    """A module's docstring."""
    return readable(inspect.cleandoc(module.__doc__ or "").splitlines())


def help_page() -> list[str]:
    """The command line's own help."""
    from gatework import cli

    out = [*heading("Command line", "="), "What each command says with ``--help``.", ""]
    commands = [typing.get_args(option)[0].__name__.lower() for option in typing.get_args(cli.Command)]
    for command in ["", *commands]:
        shown = io.StringIO()
        with mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1", "TERM": "dumb"}), contextlib.redirect_stdout(shown):
            cli.main([*([command] if command else []), "--help"])
        lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown.getvalue().strip().splitlines()]
        out += [*heading(f"gatework {command}".strip()), *block("text", lines)]
    return out


# All of them


def write(path: Path, lines: Iterable[str]) -> Path:
    """Write a page where its content has changed, so that Sphinx reads again what is new."""
    text = "\n".join(lines).strip("\n") + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path


def generate(app: Sphinx) -> None:
    """Write all pages; pages of what is gone are deleted."""
    docs, kept, others, known = Path(app.srcdir), studies(), tables(), entries()
    written = []
    families = {family: [entry for entry in known if entry.family == family] for family in sorted({e.family for e in known})}
    for family, members in families.items():
        written.append(write(docs / f"parts/{family}/index.rst", family_page(family, members)))
        written += [write(docs / f"{page_of(entry.name)}.rst", part_page(entry, kept, others, app.config)) for entry in members]
    for name, comparison in kept.items():
        written.append(write(docs / f"parts/results/{name}.rst", study_page(name, comparison)))
    for path in (ROOT / "results").rglob("README.md"):
        name = "-".join(path.parent.relative_to(ROOT / "results").parts)
        if name in others:
            # Links to the files beside it lead nowhere from here: their words stay.
            text = re.sub(r"\[([^]]*)\]\((?!https?:)[^)]*\)", r"\1", path.read_text(encoding="utf-8"))
            written.append(write(docs / f"parts/results/{name}.md", text.splitlines()))
    written.append(write(docs / "parts/papers.rst", papers_page()))
    overview = [*heading("Parts", "="), "A part is one class in one file; its name is its part expression."]
    for family, members in families.items():
        overview += heading(FAMILIES.get(family, family.capitalize()))
        rows = [(f":doc:`{entry.name} </{page_of(entry.name)}>`", escaped(entry.summary)) for entry in members]
        overview += table(("part", "what it is"), rows, "family")
    pages = [*(f"{family}/index" for family in families), "papers", *(f"results/{name}" for name in [*kept, *others])]
    written.append(write(docs / "parts/index.rst", [*overview, *tree(pages, ":hidden:")]))
    seen: set[int] = set()
    modules = public_names.modules(app.config.public_modules)
    for module in modules:
        written.append(write(docs / f"reference/{module.__name__}.rst", module_page(module, seen)))
    written.append(write(docs / "reference/command_line.rst", help_page()))
    written.append(write(docs / "reference/tasks.rst", tasks_page(app.config)))
    pages = ["command_line", "tasks", *sorted(module.__name__ for module in modules)]
    intro = "The public names by module; parts are described on :doc:`their own pages </parts/index>`."
    written.append(write(docs / "reference/index.rst", [*heading("Reference", "="), intro, *tree(pages, ":maxdepth: 1")]))
    for folder in ("parts", "reference"):
        for path in {path for path in (docs / folder).rglob("*.*") if path.is_file()} - set(written):
            path.unlink()


def plain(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as the house writes them; a part's own is on its page already, above its class."""
    described = what == "class" and any(entry.cls is obj for entry in entries())
    lines[:] = [] if described else readable(lines)


class PartRole(SphinxRole):
    """``{part}`gla``` is a link to the part's page; a name that is no part is an error."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Parse a ``:doc:`` reference in its place."""
        try:
            page = page_of(self.text)
        except GateworkError as error:
            return [], [self.inliner.reporter.error(str(error), line=self.lineno)]
        where = {"refdoc": self.env.docname, "refdomain": "std", "reftype": "doc", "reftarget": f"/{page}"}
        link = pending_xref("", refexplicit=True, refwarn=True, **where)
        link += nodes.literal(self.text, self.text)
        return [link], []


def find(name: str) -> Any:
    """The object of a dotted name, None where there is none."""
    with contextlib.suppress(ImportError, AttributeError):
        return pkgutil.resolve_name(name)
    return None


def resolve(app: Sphinx, env: Any, node: Any, text: Any) -> Any:
    """A reference to something by where it is defined leads to where it is public; what exists and is not public stays text."""
    name = node.get("reftarget", "")
    obj = find(name) if node.get("refdomain") == "py" and name.startswith("gatework.") else None
    if obj is None:
        return None
    domain = env.domains.python_domain
    pages = {entry.cls.__module__: page_of(entry.name) for entry in entries()}
    if name in pages:
        return make_refnode(app.builder, node["refdoc"], pages[name], "", text)
    for module in public_names.modules(app.config.public_modules):
        found = next((key for key in public_names.names(module) if getattr(module, key) is obj), None)
        if found and (entry := domain.objects.get(f"{module.__name__}.{found}")):
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text)
    return text


def setup(app: Sphinx) -> dict[str, Any]:
    """Pages before anything is read; docstrings before napoleon sees them."""
    app.connect("builder-inited", generate)
    app.connect("autodoc-process-docstring", plain, priority=400)
    app.connect("missing-reference", resolve)
    app.add_role("part", PartRole())
    return {"version": "1", "parallel_read_safe": True}
