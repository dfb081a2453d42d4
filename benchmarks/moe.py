"""``moe`` against the Mixtral block of ``transformers`` in all its implementations, and against a dense feed-forward.

Same weights, same inputs, same routing on both sides; outputs are compared before anything is timed. Every training step
gets a batch of its own, so that each expert's number of tokens is new, as it is in training. The fastest of the peer's
implementations counts.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
from _timing import interleaved, row
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from gatework.experts import MoE
from gatework.feedforward import GLU
from gatework.ops.dispatch import run_experts
from gatework.ops.linear import alignment

D_MODEL, D_FF = 256, 512
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def sides(experts: int, k: int, dtype: torch.dtype) -> tuple[MoE, dict[str, MixtralSparseMoeBlock]]:
    torch.manual_seed(0)
    ours = MoE(D_MODEL, d_ff=D_FF, experts=experts, gate=f"topk(k={k}, balance=[])").to(dtype)
    peers = {}
    for name in IMPLEMENTATIONS:
        config = MixtralConfig(
            hidden_size=D_MODEL, intermediate_size=D_FF, num_local_experts=experts, num_experts_per_tok=k
        )
        config._experts_implementation = name
        block = MixtralSparseMoeBlock(config).to(dtype)
        with torch.no_grad():
            block.gate.weight.copy_(ours.gate.weight)
            block.experts.gate_up_proj.copy_(ours.w_in)
            block.experts.down_proj.copy_(ours.w_out)
        peers[name] = block
    return ours, peers


def output(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def check(ours: MoE, peers: dict[str, MixtralSparseMoeBlock], x: torch.Tensor) -> None:
    """Both sides agree in float32 (in bfloat16 the routers' rounding may pick other experts, so the float32 weights
    are compared)."""
    expected = output(ours.float(), x.float())
    for name, block in peers.items():
        if name == "batched_mm" and x.shape[1] > 8:
            continue
        error = (output(block.float(), x.float()).view_as(expected) - expected).abs().max().item()
        assert error < 1e-5, f"{name} differs by {error}"


def training(experts: int, k: int, dtype: torch.dtype, want: float, dense_want: float | None, tokens: int = 4096) -> None:
    ours, peers = sides(experts, k, dtype)
    x = torch.randn(1, tokens, D_MODEL)
    check(ours, peers, x)
    ours.to(dtype)
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or tokens <= 64]  # Its weight copies need many GB.
    if experts > 8:
        names.remove("eager")  # Indexing the stack in its loop makes it some ten times slower than grouped_mm here.
    layers = [ours, *(peers[name].to(dtype) for name in names), GLU(D_MODEL, d_ff=k * D_FF).to(dtype)]
    repeats, warmup = 11, 2
    batches = [torch.randn(1, tokens, D_MODEL, dtype=dtype, requires_grad=True) for _ in range(repeats + warmup)]
    upstream = torch.randn(1, tokens, D_MODEL, dtype=dtype)

    def step(layer: torch.nn.Module, x: torch.Tensor) -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        output(layer, x).view_as(upstream).backward(upstream)

    turns = [count() for _ in layers]
    steps = (lambda layer=layer, turn=turn: step(layer, batches[next(turn)]) for layer, turn in zip(layers, turns, strict=True))
    seconds = interleaved(*steps, repeats=repeats, warmup=warmup)
    mine, *theirs, dense = seconds
    best = min(theirs)
    name = names[theirs.index(best)]
    kind = str(dtype).removeprefix("torch.")
    what = f"moe fwd+bwd {tokens} tokens, top-{k} of {experts}, {kind}"
    row(what, mine, best, "moe", f"mixtral {name}", f">={want}", best / mine >= want)
    if dense_want is not None:
        bound = 1 / dense_want
        row(f"{what}, vs dense", mine, dense, "moe", "dense", f">={bound:.2f}", dense / mine >= bound)


def decoding(experts: int, k: int, dtype: torch.dtype, tokens: int = 1) -> None:
    ours, peers = sides(experts, k, dtype)
    x = torch.randn(1, tokens, D_MODEL)
    check(ours, peers, x)
    ours.to(dtype).eval()
    x = x.to(dtype)
    # batched_mm copies a weight for each slot: for 64 tokens it takes twenty times as long as the others.
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or tokens <= 8]
    layers = [ours, *(peers[name].to(dtype).eval() for name in names)]
    with torch.no_grad():
        repeats = 201 if tokens <= 8 else 101
        mine, *theirs = interleaved(*(lambda layer=layer: output(layer, x) for layer in layers), repeats=repeats, warmup=20)
    best = min(theirs)
    name = names[theirs.index(best)]
    kind = str(dtype).removeprefix("torch.")
    what = f"moe forward {tokens} token{'s' * (tokens > 1)}, top-{k} of {experts}, {kind}"
    row(what, mine, best, "moe", f"mixtral {name}", ">=1", best / mine >= 1)


def overhead(dtype: torch.dtype, tokens: int = 4096, experts: int = 8, k: int = 2) -> None:
    """The layer against its gate and dispatch alone, whose experts hand their rows back."""
    ours, _ = sides(experts, k, dtype)
    x = torch.randn(tokens, D_MODEL, dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, D_MODEL, dtype=dtype)
    align = alignment(tokens * k / experts, ours.w_out[0].numel(), dtype, x.device)
    nothing = [lambda rows: rows] * experts

    def step(forward: Callable[[], torch.Tensor]) -> None:
        x.grad = None
        ours.zero_grad(set_to_none=True)
        forward().backward(upstream)

    share, layer = interleaved(
        lambda: step(lambda: run_experts(x, ours.gate(x), nothing, align)), lambda: step(lambda: ours(x)), repeats=21
    )
    kind = str(dtype).removeprefix("torch.")
    what = f"gate and dispatch of {tokens} tokens, top-{k} of {experts}, {kind}"
    row(what, share, layer, "gate and dispatch", "layer", f">={1 / 0.15:.2f}", share <= 0.15 * layer)


def main() -> None:
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        strict = dtype == torch.float32
        training(8, 2, dtype, 1.3, 1.15 if strict else None)
        training(64, 4, dtype, 1.4, 1.35 if strict else None)
        overhead(dtype)
        for experts, k in ((8, 2), (64, 4)):
            for tokens in (1, 8, 64):
                decoding(experts, k, dtype, tokens)


if __name__ == "__main__":
    main()
