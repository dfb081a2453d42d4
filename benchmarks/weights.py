"""Weights that come from a part: a training step against the dense model's, inference packed against dense, bytes of both.

A decoder of 4 layers, width 256 (float32, 2 threads); the blocks' matrices are ternary, or read from a shared array.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor

from gatework import weights
from gatework.models import Decoder

BATCH, LENGTH, VOCABULARY = 4, 64, 256
PARTS = ["ternary(per='row')", "stable_rps(ratio=0.125)", "roast(ratio=0.125)"]


def decoder(weight: str | None = None) -> Decoder:
    torch.manual_seed(0)
    return Decoder(VOCABULARY, d_model=256, layers=4, heads=4, weight=weight)


def training(model: Decoder, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def inference(model: Decoder, tokens: Tensor) -> Callable[[], Tensor]:
    model.eval()

    @torch.inference_mode()
    def run() -> Tensor:
        return model(tokens)

    return run


def main(repeats: int) -> None:
    torch.set_num_threads(2)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    for part in PARTS:
        name = part.partition("(")[0]
        ours, theirs = interleaved(training(decoder(part), tokens), training(decoder(), tokens), repeats=repeats)
        row(f"{name}: training step, {BATCH} x {LENGTH} tokens", ours, theirs, name, "dense")

        packed, parametrized = decoder(part).eval(), decoder(part).eval()
        weights.pack(packed)
        dense = copy.deepcopy(parametrized)
        weights.fold(dense)
        with torch.no_grad():  # The three forms agree before any speed is printed.
            assert torch.equal(packed(tokens), dense(tokens))
            assert torch.equal(parametrized(tokens), dense(tokens))
        for what, some in {f"{BATCH} x {LENGTH} tokens": tokens[:, :-1], "1 token": tokens[:1, :1]}.items():
            ours, theirs = interleaved(inference(packed, some), inference(dense, some), repeats=repeats)
            row(f"{name}: inference, {what}", ours, theirs, "packed", "dense")
            print(f"  tokens/s: packed {some.numel() / ours:,.0f}, dense {some.numel() / theirs:,.0f}")
        sizes = {"packed": packed, "training": parametrized, "dense": dense}
        stored = {form: weights.stored_bytes(model) for form, model in sizes.items()}
        shown = ", ".join(f"{form} {size:,}" for form, size in stored.items())
        print(f"  stored bytes: {shown} (dense / packed {stored['dense'] / stored['packed']:.2f})", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
