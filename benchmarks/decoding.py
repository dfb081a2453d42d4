"""Decoding one token at a time at position 100 and at position 16,000: recurrent mixers beside attention, whole decoders.

``Decoder`` of width 256 with 2 layers, 4 sequences, float32, 2 threads. The state is filled by one parallel prefill; the logits
behind one are compared with those of a prefill in pieces before anything is timed. Reported are tokens per second of the batch
and the bytes of state per sequence; recurrent mixers must keep both, attention shows what grows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _timing import interleaved, row
from torch import Tensor

from gatework.core import capability, entries
from gatework.core.contracts import State
from gatework.models import Decoder

VOCAB, WIDTH, LAYERS, BATCH = 256, 256, 2, 4
EARLY, LATE = 100, 16_000
STEPS = 8
#: Those of these that are registered, and attention for comparison.
RECURRENT = ["linear_attention", "gla", "gsa", "deltanet", "gated_deltanet"]


def prefill(model: Decoder, tokens: Tensor, pieces: list[int]) -> tuple[State, Tensor]:
    state = model.init_state(len(tokens))
    for piece in tokens.split(pieces, 1):
        logits = model(piece, state=state)[:, -1]
    return state, logits


def steps(model: Decoder, state: State) -> Callable[[], None]:
    """``STEPS`` greedy tokens from a state; a recurrent state may be used again, a cache grows by a few slots."""
    first = torch.zeros(BATCH, 1, dtype=torch.long)

    def run() -> None:
        new = first
        for _ in range(STEPS):
            new = model(new, state=state)[:, -1:].argmax(-1)

    return run


def check(model: Decoder) -> None:
    tokens = torch.randint(VOCAB, (2, 300), generator=torch.Generator().manual_seed(1))
    (state, once), (again, twice) = prefill(model, tokens, [300]), prefill(model, tokens, [130, 169, 1])
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-3)
    new = torch.ones(2, 1, dtype=torch.long)
    torch.testing.assert_close(model(new, state=state), model(new, state=again), rtol=0, atol=1e-3)


def measure(mixer: str) -> None:
    torch.manual_seed(0)
    model = Decoder(VOCAB, d_model=WIDTH, layers=LAYERS, mixer=mixer).eval()
    check(model)
    tokens = torch.randint(VOCAB, (1, LATE), generator=torch.Generator().manual_seed(2))
    states = []
    for position in (EARLY, LATE):
        # One row is filled and copied: what the others hold does not change the work.
        state = prefill(model, tokens[:, :position], [position])[0]
        assert state.nbytes == model.state_bytes(position)
        state.reorder(torch.zeros(BATCH, dtype=torch.long))
        states.append(state)
    recurrent = mixer != "attention"
    early, late = interleaved(*(steps(model, state) for state in states), repeats=31 if recurrent else 7, warmup=2)
    small, large = model.state_bytes(EARLY), model.state_bytes(LATE)
    row(
        f"decoding with {mixer}: position {LATE} vs {EARLY}", late, early, "late", "early",
        ">= 0.9" if recurrent else "", early / late >= 0.9 if recurrent else None,
    )
    speeds = f"{BATCH * STEPS / early:.0f} and {BATCH * STEPS / late:.0f} tokens per second"
    verdict = ("  want equal  " + ("ok" if small == large else "NOT REACHED")) if recurrent else ""
    print(f"    {speeds}, {small} and {large} bytes of state per sequence{verdict}", flush=True)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(2)
    registered = {entry.name for entry in entries("mixer") if capability(entry.cls, "decodes")}
    for mixer in ["attention", *RECURRENT]:
        if mixer in registered:
            measure(mixer)


if __name__ == "__main__":
    main()
