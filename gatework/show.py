"""What the command line shows of parts and papers: tables for an 80-column terminal, one part's page, a part's
measured cost."""

from __future__ import annotations

import inspect
import io
import textwrap
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import nn

from gatework.core.contracts import CAPABILITIES, capability
from gatework.core.cost import profile
from gatework.core.errors import GateworkError
from gatework.core.papers import paper, papers
from gatework.core.registry import Entry, build, check, entries, lookup, parameters
from gatework.depth.base import Block


def _width() -> int:
    terminal = Console()
    return min(terminal.width, 110) if terminal.is_terminal else 80


def _text(*renderables: Any) -> str:
    """Rendered for the terminal that reads it: its width and colours, or 80 columns of plain text."""
    console = Console(file=io.StringIO(), width=_width(), force_terminal=Console().is_terminal, highlight=False)
    for renderable in renderables:
        console.print(renderable)
    out = console.file
    assert isinstance(out, io.StringIO)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").split("\n"))


def list_parts() -> str:
    """All parts by family: name, summary, paper."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("family", no_wrap=True, style="dim")
    table.add_column("part", no_wrap=True, style="bold")
    table.add_column("what it is", overflow="fold")
    table.add_column("paper", no_wrap=True, style="dim")
    family = ""
    for entry in entries():
        table.add_row(entry.family if entry.family != family else "", entry.name, entry.summary, entry.paper or "")
        family = entry.family
    return _text(table, Text("\ngatework parts NAME shows a part, gatework papers ID its paper.", style="dim"))


def show_part(name: str) -> str:
    """A part's docstring, arguments with their defaults, capabilities and paper."""
    entry = lookup(name)
    head = Text.assemble((entry.name, "bold"), f"  ({entry.cls.__module__}.{entry.cls.__name__})")
    rows: list[Any] = [head, "", Text(_wrapped(inspect.getdoc(entry.cls) or "")), "", Text("Arguments", style="bold")]
    rows += [Padding(_arguments(entry), (0, 0, 0, 2))]
    able = [(key, capability(entry.cls, key)) for key in CAPABILITIES if key in getattr(entry.cls, "capabilities", {})]
    if able:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for key, answer in able:
            table.add_row(key, "yes" if answer else str(answer))
        rows += ["", Text("Capabilities", style="bold"), Padding(table, (0, 0, 0, 2))]
    if entry.paper in papers():
        found = papers()[entry.paper]
        rows += ["", Text("Paper", style="bold"), Padding(Text(f"{found.title} ({found.year})\n{found.source}"), (0, 0, 0, 2))]
    return _text(*rows)


def _wrapped(docstring: str) -> str:
    """A docstring filled anew to the width, two columns in; sections, their items and indented examples keep their shape."""
    filled: list[tuple[int, str]] = []  # Indentation and text of each paragraph, item or heading.
    section = verbatim = False
    for line in docstring.splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        last, previous = filled[-1] if filled else (0, "")
        after_blank = not previous
        if not text:
            section, verbatim = section and indent > 0, False
        elif indent == 0:
            section = text.endswith(":")
        elif after_blank and not section:
            verbatim = True
        item = section and indent > 0 and ((previous.endswith(":") and last == 0) or indent == last)
        verbatim = verbatim or text.startswith((">>>", "..."))
        if not text or after_blank or verbatim or item or indent < last or (indent == 0 and section):
            filled.append((indent, text))
        else:
            filled[-1] = (last, f"{previous} {text}")
    width = _width()
    lines = [
        textwrap.fill(text, width, initial_indent=" " * (indent + 2), subsequent_indent=" " * (indent + (6 if indent else 2)))
        for indent, text in filled
    ]
    return "\n".join(lines)


def _arguments(entry: Entry) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for name, parameter in parameters(entry.cls).items():
        hint = "" if parameter.annotation is parameter.empty else str(parameter.annotation)
        hint = "a part" if hint == "Any" else hint
        table.add_row(name, hint, "required" if parameter.default is parameter.empty else f"default {parameter.default!r}")
    return table


def list_papers() -> str:
    """All papers: id, year, title, parts."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("id", no_wrap=True, style="bold")
    table.add_column("year", no_wrap=True, style="dim")
    table.add_column("title", overflow="fold")
    table.add_column("parts", overflow="fold")
    for found in papers().values():
        table.add_row(found.name, str(found.year), found.title, ", ".join(found.parts))
    return _text(table)


def show_paper(name: str) -> str:
    """One paper: title, year, source, the parts that implement it, what it claims."""
    found = paper(name)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for key, value in {"year": found.year, "source": found.source, "parts": ", ".join(found.parts), "claim": found.claim}.items():
        table.add_row(Text(key, style="dim"), str(value))
    return _text(Text(found.title, style="bold"), table)


def list_claims() -> str:
    """The experiments behind papers' claims: what is claimed, how long it takes."""
    from gatework.claims import claims

    rows: list[Any] = []
    for name, claim in claims().items():
        rows += [Text.assemble((name, "bold"), f"  ({claim.duration} on two cores)"), Padding(Text(claim.statement), (0, 0, 1, 2))]
    return _text(*rows, Text("gatework claims ID runs one, with --quick a first look.", style="dim"))


def show_outcome(outcome: Any) -> str:
    """The findings of a claim's experiment as a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
    table.add_column("measured", overflow="fold")
    table.add_column("predicted", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("95% interval", no_wrap=True)
    table.add_column("verdict", overflow="fold")
    for f in outcome.findings:
        low, high = f.interval
        table.add_row(f.what, f.predicted, f"{f.measured:.3f}", f"[{low:.3f}, {high:.3f}]", f.verdict)
    return _text(Text.assemble((outcome.paper, "bold"), f": {outcome.verdict}"), Text(outcome.statement), "", table)


def profile_part(expression: str, d_model: int, tokens: int, batch_size: int, heads: int, experts: int, threads: int | None) -> str:
    """Build a part and measure it forward, and forward with backward, in training mode."""
    for name, value in {
        "d-model": d_model,
        "tokens": tokens,
        "batch-size": batch_size,
        "heads": heads,
        "experts": experts,
        "threads": threads or 1,
    }.items():
        if value < 1:
            raise GateworkError(f"--{name} must be at least 1, not {value}")
    spec = check(expression)
    slot = lookup(spec.name).slot
    context: dict[str, Any] = {"d_model": d_model, "heads": heads, "n_layers": 4}
    if slot == "gate":
        context["n_experts"] = experts
    elif slot == "depth":
        mixer, feedforward = (lambda: build("attention", "mixer", **context)), (lambda: build("glu", "feedforward", **context))
        context["blocks"] = nn.ModuleList(Block(mixer(), feedforward(), d_model) for _ in range(4))
    elif slot == "weight":
        raise GateworkError(
            f"{spec.name} is a weight, which costs what the model around it makes of it; "
            f'compare models with gatework compare --variant NAME="weight={spec}"'
        )
    elif slot not in ("activation", "feedforward", "mixer"):
        article = "an" if slot[0] in "aeiou" else "a"
        raise GateworkError(
            f"{spec.name} is {article} {slot}, which has no cost of its own; "
            "profile an activation, feedforward, gate, mixer or depth policy"
        )
    part = build(spec, slot, **context)
    shape = (batch_size * tokens, d_model) if slot == "gate" else (batch_size, tokens, d_model)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        module = _Weights(part) if slot == "gate" else part
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
        costs = [profile(module, x, backward=backward) for backward in (False, True)]
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    head = f"{spec}\ninput {tuple(shape)}, float32, {used} {'thread' if used == 1 else 'threads'}"
    per_token = costs[0].flops / (batch_size * tokens)
    return f"{head}\n\n{costs[0]}\n\n{costs[1]}\n\nper token, forward: {per_token:,.0f} FLOPs"


class _Weights(nn.Module):
    """A gate as a module that returns a tensor: the routing's weights."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights: torch.Tensor = self.gate(x).weights
        return weights
