"""Serving a mixture of experts, on a small decoder that is trained here on the bundled text.

Dynamic dispatch (``moe``, sorted rows) against static dispatch (one-hot masks and einsum, with the capacity N that drops no
token): time, peak memory, and the waste E C / (N k) of the static form. Then, on the routings of the trained model: hit rates of an
expert buffer by policy, load imbalance between ranks by placement.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.nn.functional as F
from _timing import interleaved, row
from torch import Tensor

from gatework import core
from gatework.bench.tasks import Text
from gatework.core.cost import peak_bytes
from gatework.experts import MoE
from gatework.experts.expert_buffer import POLICIES, hold, replay
from gatework.experts.expert_placement import ExpertPlacement
from gatework.experts.expert_trace import record
from gatework.models import Decoder

EXPERTS, K = 16, 2


def static(layer: MoE, x: Tensor, capacity: int) -> Tensor:
    """One-hot dispatch: a mask (N, E, C) puts tokens into the experts' buffers and takes the outputs out again."""
    routing = layer.gate(x)
    chosen = F.one_hot(routing.experts, layer.experts)  # (N, k, E); slot 0 of all tokens comes first.
    place = chosen.transpose(0, 1).flatten(0, 1).cumsum(0).view(K, len(x), -1).transpose(0, 1) * chosen - 1
    mask = F.one_hot(place.clamp(-1) + 1, capacity + 1)[..., 1:].to(x.dtype)  # (N, k, E, C); no place: all zeros.
    combine = torch.einsum("nkec,nk->nec", mask, routing.weights.to(x.dtype))
    buffer = torch.einsum("nec,nd->ecd", mask.sum(1), x)
    h = layer.activation.gated(torch.einsum("ecd,ehd->ech", buffer, layer.w_in))
    return torch.einsum("nec,ecd->nd", combine, torch.einsum("ech,edh->ecd", h, layer.w_out))


def trained(seconds: float) -> tuple[Decoder, Text]:
    torch.manual_seed(0)
    task = Text(length=128)
    model = Decoder(vocab_size=256, d_model=96, layers=3, heads=4, feedforward=f"moe(experts={EXPERTS}, gate=topk(k={K}))")
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    start, step = time.perf_counter(), 0
    for x, y in task.batches(0, 16):
        loss = task.loss(model(x), y)
        (loss + sum(core.losses(model).values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if time.perf_counter() - start > seconds:
            break
    print(f"trained {step} steps: {loss.item():.3f} nats per byte")
    return model.eval(), task


def compare(layer: MoE, inputs: Tensor) -> None:
    for tokens in (64, 256, 1024):
        x = inputs[:tokens]
        counts = layer.gate(x).counts()
        enough = int(counts.max())  # The least capacity that drops nothing here; without knowing the routing it is N.
        for name, capacity in (("C = busiest expert", enough), ("C = N", tokens)):
            expected = layer(x)
            assert (static(layer, x, capacity) - expected).abs().max() < 1e-4
            dynamic_s, static_s = interleaved(
                lambda x=x: layer(x), lambda x=x, capacity=capacity: static(layer, x, capacity), repeats=11
            )
            with peak_bytes(layer, x) as dynamic_bytes:
                layer(x)
            with peak_bytes(layer, x) as static_bytes:
                static(layer, x, capacity)
            what = f"dispatch of {tokens} tokens, static {name}"
            row(what, dynamic_s, static_s, "dynamic", "static", ">1", static_s > dynamic_s)
            waste = EXPERTS * capacity / (tokens * K)
            print(
                f"    peak memory: dynamic {dynamic_bytes.total / 2**20:.2f} MiB, static {static_bytes.total / 2**20:.2f} MiB "
                f"({static_bytes.total / dynamic_bytes.total:.1f} times); waste {waste:.2f}"
            )


def main(seconds: float = 60) -> None:
    torch.set_num_threads(2)
    model, task = trained(seconds)
    layer = next(module for module in model.modules() if isinstance(module, MoE))
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, 1)))
    tokens = task.splits["validation"][: 8 * 128].long().view(8, 128)
    with torch.no_grad():
        model(tokens)
    handle.remove()
    with torch.no_grad():
        compare(layer, seen[0])
        with record(model) as batches:  # Batches of one window each.
            for window in task.splits["validation"][: 64 * 128].long().view(64, 128):
                model(window[None])
        with record(model) as steps:  # Decoding by one, of two sequences.
            state = model.init_state(2)
            for token in task.splits["validation"][:512].long().view(2, 256).T:
                model(token[:, None], state=state)
    print("\nhit rates of an expert buffer while decoding two sequences, mean over the layers")
    for size in (4, 8, 12):
        rates = {p: sum(replay(c, size, p).hit_rate for c in steps.values()) / len(steps) for p in POLICIES}
        print(f"    {size:>2} of {EXPERTS} resident: " + ", ".join(f"{policy} {rate:.3f}" for policy, rate in rates.items()))
    print("hit rates over batches of 128 tokens, mean over the layers")
    for size in (4, 8, 12):
        rates = {p: sum(replay(c, size, p).hit_rate for c in batches.values()) / len(batches) for p in POLICIES}
        print(f"    {size:>2} of {EXPERTS} resident: " + ", ".join(f"{policy} {rate:.3f}" for policy, rate in rates.items()))
    print("load of the busiest rank over the mean, batches of 128 tokens, placed by one half and measured on the other")
    for ranks in (2, 4, 8):
        found = {}
        for kind in ("contiguous", "greedy", "anti_correlated"):
            values = []
            for counts in batches.values():
                past, later = counts.chunk(2)
                placement = getattr(ExpertPlacement, kind)(EXPERTS if kind == "contiguous" else past, ranks)
                values.append(placement.imbalance(later))
            found[kind] = sum(values) / len(values)
        print(f"    {ranks} ranks: " + ", ".join(f"{kind} {value:.3f}" for kind, value in found.items()))
    with torch.no_grad():
        expected = [model(row[None]) for row in tokens]
        buffer = hold(layer, 8)
        for row_of, before in zip(tokens, expected, strict=True):
            assert torch.allclose(model(row_of[None]), before, atol=1e-5)
        print(f"a layer run from a buffer gives the same outputs: {buffer}, {buffer.bytes_moved / 2**20:.1f} MiB moved")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60)
