"""Print how fast each mixer trains and decodes at growing lengths, and how much its decoding state holds.

    python results/mixers/speed.py

Each mixer alone, of width 256 with 4 heads, float32, two threads, batches of 8,192 tokens. The sides take turns, so that the
machine's drift hits all alike. About three minutes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gatework.core import build

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from _timing import interleaved

WIDTH, HEADS, TOKENS = 256, 4, 8192
LENGTHS = [128, 512, 2048, 8192]
MIXERS = ["attention", "gated_attention", "gla", "deltanet", "gated_deltanet", "gsa", "s4d", "s5", "paragru", "paralstm"]


def training(mixer: torch.nn.Module, length: int) -> Callable[[], None]:
    """A step of training on sequences of this length."""
    x = torch.randn(max(1, TOKENS // length), length, WIDTH)
    upstream = torch.randn_like(x)

    def run() -> None:
        mixer.zero_grad()
        mixer(x).backward(upstream)

    return run


def decoding(mixer: torch.nn.Module, length: int) -> Callable[[], None]:
    """Twenty tokens behind a sequence of this length."""
    state, x = mixer.init_state(1), torch.randn(1, 1, WIDTH)
    with torch.no_grad():
        for piece in torch.randn(1, length, WIDTH).split(2048, 1):
            mixer(piece, state=state)

    def run() -> None:
        with torch.no_grad():
            for _ in range(20):
                mixer(x, state=state)

    return run


def table(title: str, heads: list[str], rows: dict[str, list[str]]) -> None:
    """Print one Markdown table."""
    print(f"\n{title}\n\n| mixer | " + " | ".join(heads) + " |\n|" + "---|" * (len(heads) + 1))
    for name, cells in rows.items():
        print(f"| `{name}` | " + " | ".join(cells) + " |")


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    mixers = {name: build(name, "mixer", d_model=WIDTH, heads=HEADS) for name in MIXERS}
    rows: dict[str, list[str]] = {name: [] for name in mixers}
    for length in LENGTHS:
        sides = interleaved(*(training(mixer.train(), length) for mixer in mixers.values()), repeats=3, warmup=1)
        for cells, seconds in zip(rows.values(), sides, strict=True):
            cells.append(f"{max(TOKENS, length) / seconds / 1e3:.1f}")
    table("Training, thousand tokens a second, forward and backward, by length", [str(n) for n in LENGTHS], rows)
    rows = {name: [] for name in mixers}
    for length in (100, 16_000):
        sides = interleaved(*(decoding(mixer.eval(), length) for mixer in mixers.values()), repeats=5, warmup=1)
        for cells, seconds in zip(rows.values(), sides, strict=True):
            cells.append(f"{20 / seconds:.0f}")
    for name, mixer in mixers.items():
        rows[name] += [f"{mixer.state_bytes(length):,}" for length in (100, 16_000)]
    heads = ["tokens a second at 100", "at 16,000", "state bytes at 100", "at 16,000"]
    table("Decoding one sequence, by position", heads, rows)


if __name__ == "__main__":
    main()
