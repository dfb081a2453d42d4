"""Sixteen adapters at top-2, routed token by token, against one plain adapter of peft, on SmolLM2's layer shapes.

The model has SmolLM2-135M's layers (random weights, fewer of them) with LoRA of rank 16 on all linear maps of its blocks. One side
is the model converted by ``surgery.phatgoose`` with 16 such adapters, the other the ``PeftModel`` with one; at most twice the time
is asked for. Shown for reading 512 tokens, a batch of 8 times 128, and one token behind a cache of 128. Checked first: with one
adapter the routed model computes what peft does.
"""

from __future__ import annotations

import copy
import os
import tempfile
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _timing import interleaved, row
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from gatework import surgery
from gatework.core.cost import count_flops

LAYERS, ADAPTERS, RANK, KEPT = 6, 16, 16, 2
WANT = 2.0
SHAPE = LlamaConfig(
    vocab_size=1024, hidden_size=576, intermediate_size=1536, num_hidden_layers=LAYERS, num_attention_heads=9,
    num_key_value_heads=3,
)


def adapter(base: LlamaForCausalLM, folder: Path, seed: int):
    """Write an adapter with gates as if trained; the PeftModel."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.02)
    gates = surgery.PhatgooseGates(model)
    for vector in gates.vectors:
        torch.nn.init.normal_(vector)
    model.save_pretrained(folder)
    gates.save(folder)
    gates.undo()
    return model.eval().requires_grad_(False)


def read(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def write(model: torch.nn.Module, ids: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache).logits
    cache.crop(-1)
    return logits


def cached(model: torch.nn.Module, length: int) -> DynamicCache:
    cache = DynamicCache(config=SHAPE)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, length, dtype=torch.long), past_key_values=cache)
    return cache


def main() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    base = LlamaForCausalLM(SHAPE).eval()
    with tempfile.TemporaryDirectory() as temporary:
        folders = {f"adapter{i}": Path(temporary) / f"adapter{i}" for i in range(ADAPTERS)}
        one, *_ = [adapter(base, folder, seed) for seed, folder in enumerate(folders.values())]
        routed = copy.deepcopy(base)
        check = surgery.phatgoose(routed, {"adapter0": folders["adapter0"]}, k=1)
        ids = torch.randint(1024, (1, 64))
        torch.testing.assert_close(read(routed, ids), read(one, ids), rtol=1e-3, atol=1e-4)
        check.undo()
        surgery.phatgoose(routed, folders, k=KEPT)
    print(f"{LAYERS} layers of SmolLM2-135M, rank {RANK} on all linear maps; {ADAPTERS} adapters at top-{KEPT} against one of peft")
    sides = routed, one, base
    for batch, length in ((1, 512), (8, 128)):
        calls = [partial(read, model, torch.randint(1024, (batch, length))) for model in sides]
        report(f"reading {batch} x {length} tokens", calls, batch * length, 9)
    token = torch.ones(1, 1, dtype=torch.long)
    report("writing 1 token", [partial(write, model, token, cached(model, 128)) for model in sides], 1, 41)


def report(what: str, calls: list, tokens: int, repeats: int) -> None:
    cost = []
    for call in calls:
        with count_flops() as count:
            call()
        cost.append(count.total / tokens)
    seconds = interleaved(*calls, repeats=repeats)
    print(f"{what}: " + "   ".join(
        f"{side} {f / 1e6:.1f} MFLOP/token {s * 1e3:.1f} ms"
        for side, f, s in zip(("routed", "one adapter", "no adapter"), cost, seconds, strict=True)
    ))
    ratio = seconds[0] / seconds[1]
    row(f"phatgoose, {ADAPTERS} adapters, {what}: {ratio:.2f} of one", seconds[0], seconds[1], "routed", "peft, one", "<= 2 times",
        ratio <= WANT)


if __name__ == "__main__":
    main()
