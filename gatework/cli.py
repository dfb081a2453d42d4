"""The command line: ``gatework compare``, ``resume``, ``work``, ``report``, ``evaluate``, ``parts``, ``papers``,
``claims``, ``profile``.

Exit codes: 0 done, 1 failed, 2 wrong use. Every wrong input is answered with one sentence; ``--debug`` shows the
traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

try:
    import tyro
except ModuleNotFoundError:
    sys.exit('gatework: the command line needs the bench extra: pip install "gatework[bench]"')

from tyro.conf import Positional, UseAppendAction, arg

Number = Annotated[str | None, arg(metavar="N")]
Text = Annotated[str | None, arg(metavar="TEXT")]
Settings = Annotated[str | None, arg(metavar='"KEY=VALUE, ..."')]
Where = Annotated[str | None, arg(metavar="FOLDER")]


@dataclass
class Compare:
    """Train variants on equal terms, print the verdict table and write the report."""

    study: Annotated[Positional[str | None], arg(metavar="[STUDY.TOML]")] = None
    """A study, written down; flags win over it. Without anything, the default study runs."""
    data: Annotated[str | None, arg(metavar="FILE")] = None
    """Any file to learn byte by byte (task text); default: the bundled Shakespeare."""
    task: Text = None
    """What is learnt, such as text or digits; a wrong name lists them all."""
    variant: Annotated[UseAppendAction[list[str]], arg(metavar='NAME="KEY=VALUE, ..."')] = field(default_factory=list)
    """What one row changes of the baseline, as in wide="feedforward=versatile_ffn"."""
    baseline: Settings = None
    """Settings of the row that all others are compared with."""
    tokens: Number = None
    """Training budget of a final run, such as 2e6."""
    tune_tokens: Number = None
    """Training budget of a tuning trial."""
    seeds: Number = None
    """Final runs per variant."""
    tune: Number = None
    """Tuning trials per variant."""
    match: Text = None
    """Axis held equal: params, flops, seconds or none."""
    learning_rates: Annotated[str | None, arg(metavar="LOW,HIGH")] = None
    """Range of learning rates that is searched."""
    batch_size: Number = None
    """Rows per training step."""
    model: Settings = None
    """What all variants share, as in "d_model=128, layers=4"."""
    out: Where = None
    """Folder of the results; default: runs/NAME."""
    name: Text = None
    """Name of the study; default: the folder's or the file's."""
    store: Annotated[str | None, arg(metavar="URL")] = None
    """Database that the workers share; default: an SQLite file in the folder."""
    workers: Number = None
    """Processes side by side; default: one per core."""
    device: Text = None
    """cpu or cuda; default: a GPU where there is one."""
    imports: Annotated[UseAppendAction[list[str]], arg(name="import", metavar="MODULE")] = field(default_factory=list)
    """Module of your own that registers parts."""
    save: bool = False
    """Keep the trained models of the final runs."""

    def run(self) -> int:
        """Run the command."""
        from gatework.bench import compare

        rates = None
        if self.learning_rates is not None:
            rates = [_number("learning-rates", piece) for piece in self.learning_rates.split(",")]
        numbers: dict[str, Any] = {
            name: _number(name, getattr(self, name)) for name in ("tokens", "tune_tokens", "seeds", "tune", "batch_size")
        }
        workers = _number("workers", self.workers)
        return _show(
            lambda: compare(
                self.study,
                data=self.data,
                task=self.task,
                variants=self.variant or None,
                baseline=self.baseline,
                match=self.match,
                model=self.model,
                learning_rates=rates,
                name=self.name,
                imports=self.imports or None,
                out=self.out,
                store=self.store,
                device=self.device,
                workers=None if workers is None else int(workers),
                save=self.save,
                strict=True,
                **numbers,
            )
        )


@dataclass
class Resume:
    """Continue a study that was stopped."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """Folder of the study, such as runs/mybook."""
    store: str | None = None
    """URL of the store, where it has a password (which study.json does not keep) or has moved."""
    workers: Number = None
    """Processes side by side; default: one per core."""

    def run(self) -> int:
        """Run the command."""
        from gatework.bench import resume

        workers = _number("workers", self.workers)
        return _show(lambda: resume(self.folder, store=self.store, workers=None if workers is None else int(workers), strict=True))


@dataclass
class Work:
    """Take trials from a store that other processes, on any machines, share."""

    store: Annotated[str | None, arg(metavar="URL")] = None
    """The database, as given to compare."""
    study: Text = None
    """Name of the study; default: all in the store."""

    def run(self) -> int:
        """Run the command."""
        from gatework.bench.worker import STORE, work
        from gatework.core.errors import GateworkError

        url = self.store or os.environ.get(STORE)
        if not url:
            raise GateworkError("say where the trials are: gatework work --store URL")
        done = work(url, self.study)
        print(f"{done} trials run here; nothing is left")
        return 0


@dataclass
class Report:
    """Print a study's table and write its report again."""

    folder: Annotated[Positional[str], arg(metavar="FOLDER")]
    """Folder of the study, such as runs/mybook."""

    def run(self) -> int:
        """Run the command."""
        from gatework.bench import load

        return _print(load(self.folder), self.folder)


@dataclass
class Evaluate:
    """Evaluate a model that compare --save kept."""

    checkpoint: Annotated[Positional[str], arg(metavar="FILE.safetensors")]
    """The model, in the folder models of a study."""
    split: Text = "test"
    """validation or test."""

    def run(self) -> int:
        """Run the command."""
        from gatework.bench import evaluate
        from gatework.core.errors import GateworkError

        if self.split not in ("validation", "test"):
            raise GateworkError(f"split must be validation or test, not {self.split!r}")
        for name, value in evaluate(self.checkpoint, self.split).items():
            print(f"{name:<16} {value:.4f}")
        return 0


@dataclass
class Parts:
    """List all parts, or show one."""

    name: Annotated[Positional[str | None], arg(metavar="[NAME]")] = None
    """A part's name."""

    def run(self) -> int:
        """Run the command."""
        from gatework.show import list_parts, show_part

        print(show_part(self.name) if self.name else list_parts())
        return 0


@dataclass
class Papers:
    """List the papers, or show one."""

    name: Annotated[Positional[str | None], arg(metavar="[ID]")] = None
    """A paper's id."""

    def run(self) -> int:
        """Run the command."""
        from gatework.show import list_papers, show_paper

        print(show_paper(self.name) if self.name else list_papers())
        return 0


@dataclass
class Claims:
    """List the experiments behind papers' claims, or run one."""

    name: Annotated[Positional[str | None], arg(metavar="[ID]")] = None
    """A paper's id."""
    quick: bool = False
    """A first look: few sizes and repetitions, wide intervals."""
    out: Where = None
    """Folder of the results; default: runs/claims."""

    def run(self) -> int:
        """Run the command."""
        from gatework.claims import claim
        from gatework.show import list_claims, show_outcome

        if self.name is None:
            print(list_claims())
            return 0
        found = claim(self.name)
        outcome = found.run(self.quick, lambda line: print(line, file=sys.stderr, flush=True))
        path = outcome.write(Path(self.out or "runs/claims"))
        print(show_outcome(outcome))
        print(f"\nReport: {path}")
        return 0


@dataclass
class Profile:
    """Measure what a part costs: FLOPs that ran, time, memory, parameters."""

    part: Annotated[Positional[str], arg(metavar="EXPR")]
    """A part, such as "moe(experts=8, gate=topk(k=2))"."""
    d_model: Annotated[int, arg(metavar="N")] = 256
    """Width of the model."""
    tokens: Annotated[int, arg(metavar="N")] = 1024
    """Length of the sequence."""
    batch_size: Annotated[int, arg(metavar="N")] = 1
    """Sequences."""
    heads: Annotated[int, arg(metavar="N")] = 4
    """Heads, for parts that have heads."""
    experts: Annotated[int, arg(metavar="N")] = 8
    """Experts that a gate chooses from."""
    threads: Annotated[int | None, arg(metavar="N")] = None
    """CPU threads; default: torch's."""

    def run(self) -> int:
        """Run the command."""
        from gatework.show import profile_part

        print(profile_part(self.part, self.d_model, self.tokens, self.batch_size, self.heads, self.experts, self.threads))
        return 0


Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Resume, tyro.conf.subcommand("resume")]
    | Annotated[Work, tyro.conf.subcommand("work")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Parts, tyro.conf.subcommand("parts")]
    | Annotated[Papers, tyro.conf.subcommand("papers")]
    | Annotated[Claims, tyro.conf.subcommand("claims")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
)

DESCRIPTION = (
    "Gated, adaptive and parameter-efficient network parts, and a bench that tells which of them pay. --debug shows tracebacks."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if arguments in (["--version"], ["-V"]):
        import gatework

        print(f"gatework {gatework.__version__}")
        return 0
    parsed = _parse(arguments)
    if isinstance(parsed, int):
        return parsed
    try:
        return int(parsed.run())
    except KeyboardInterrupt:
        _say(
            "stopped; finished trials are kept"
            + (", continue with gatework resume" if isinstance(parsed, Compare | Resume) else "")
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _explain(error)


def _parse(arguments: list[str]) -> Any:
    """The command, or an exit code; tyro's box around an error is reduced to its sentence."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = (tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff)
            return tyro.cli(Command, prog="gatework", description=DESCRIPTION, args=arguments, config=config)
    except SystemExit as end:
        if end.code in (0, None):
            return 0
        _say(_sentence(errors.getvalue()))
        return 2


def _sentence(box: str) -> str:
    """What the box says between its title and its first rule, and what was meant, if it knows."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    rules = [index for index, line in enumerate(lines) if line and not line.strip("─-")]
    first = 1 if not rules or rules[0] > 1 else rules[0] + 1  # The title stands in the frame, or above a rule of its own.
    last = next((rule for rule in rules if rule > first), len(lines))
    said = " ".join(" ".join(lines[first:last]).split()).rstrip(".")
    meant = [lines[index + 1] for index, line in enumerate(lines[:-1]) if line.startswith("Perhaps you meant")]
    said += f"; did you mean {meant[0].split()[0]!r}?" if meant else ""
    return f"{said or 'wrong use'} (see gatework --help)"


def _explain(error: Exception) -> int:
    from gatework.core.errors import GateworkError

    if isinstance(error, GateworkError):
        _say(" ".join(str(error).split()))
        return 2
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("gatework"):
        _say(f'this command needs the package {error.name!r}: pip install "gatework[bench]"')
        return 2
    if type(error).__name__ == "TrialsFailed":
        _say(str(error))
        return 1
    _say(f"{type(error).__name__}: {error} (this is a defect of gatework, or the machine gave out; --debug shows where)")
    return 1


def _say(sentence: str) -> None:
    print(f"gatework: {sentence}", file=sys.stderr)


def _number(name: str, text: str | None) -> float | int | None:
    from gatework.core.errors import GateworkError

    if text is None:
        return None
    try:
        number = float(text.replace("_", "").replace(",", ""))
    except ValueError:
        raise GateworkError(f"--{name.replace('_', '-')} takes a number, not {text!r}") from None
    return int(number) if number == number and abs(number) < 1e18 and number == int(number) else number


def _show(compare: Any) -> int:
    from gatework.bench.runner import TrialsFailed

    try:
        comparison = compare()
    except TrialsFailed as failure:
        _print(failure.comparison, failure.comparison.study["out"])
        _say(str(failure))
        return 1
    return _print(comparison, comparison.study["out"])


def _print(comparison: Any, folder: str) -> int:
    print(comparison.table())
    comparison.report(folder)
    page, here = Path(folder, "report.html").absolute(), Path.cwd()
    print(f"\nReport: {page.relative_to(here) if page.is_relative_to(here) else page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
