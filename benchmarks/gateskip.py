"""GateSkip at a 50% budget: how much of the FLOPs it saves is saved on the clock, at T = 512.

Two GateSkip models with the same weights differ in the budget only, 0.5 against 1.0 (every branch for every token; the gates are
paid for on both sides). FLOPs are those that ran. The figure is (share of time saved) / (share of FLOPs saved), at least 0.8 asked
for. The plain stack, without gates, stands beside it: against it the gates' own cost is not hidden.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
from _timing import interleaved, row

from gatework.core.cost import count_flops
from gatework.depth import GateSkip, Stack, gateskip
from gatework.depth.base import Block
from gatework.feedforward import GLU
from gatework.mixers import Attention

BATCH, LENGTH, WIDTH, LAYERS, HEADS, D_FF = 8, 512, 256, 4, 4, 704
WANT = 0.8


def forward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


def forward_backward(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss = model(x).square().mean() + sum(getattr(model, "losses", {}).values())
    loss.backward()
    return loss


def flops(call, *args) -> int:
    with count_flops() as count:
        call(*args)
    return count.total


def check(skipping: GateSkip, x: torch.Tensor) -> None:
    """Gathered equals computed densely and masked, before any time is taken.

    In float64: importances crowd so closely around a threshold that in float32 a last bit decides about some token.
    """
    skipping, x = copy.deepcopy(skipping).double().eval(), x.double()
    gathered = forward(skipping, x)
    few, gateskip.DENSE_ABOVE = gateskip.DENSE_ABOVE, 0.0
    try:
        masked = forward(skipping, x)
    finally:
        gateskip.DENSE_ABOVE = few
    torch.testing.assert_close(gathered, masked, rtol=0, atol=1e-10)


def compare(gate_form: str) -> None:
    torch.manual_seed(0)
    blocks = [Block(Attention(WIDTH, HEADS), GLU(WIDTH, D_FF), WIDTH) for _ in range(LAYERS)]
    skipping = GateSkip(blocks, WIDTH, budget=0.5, gate_form=gate_form, warmup=0)
    whole, plain = copy.deepcopy(skipping), Stack(copy.deepcopy(blocks))
    whole.set_budget(1.0)
    with torch.no_grad(), skipping.calibrating():
        skipping(torch.randn(BATCH, LENGTH, WIDTH))
    x = torch.randn(BATCH, LENGTH, WIDTH)
    check(skipping, x)
    forward(skipping.eval(), x)
    kept = torch.cat([skipping.metrics["kept_mixer"], skipping.metrics["kept_feedforward"]]).mean()
    print(f"{gate_form} gates, B {BATCH}, T {LENGTH}, d_model {WIDTH}, {LAYERS} layers; kept outside training: {float(kept):.1%}")
    for name, call, training in (("forward", forward, False), ("forward+backward", forward_backward, True)):
        models = [model.train(training) for model in (skipping, whole, plain)]
        cost = [flops(call, model, x) for model in models]
        seconds = interleaved(*(partial(call, model, x) for model in models), repeats=5 if training else 9, warmup=2)
        print("  " + "   ".join(
            f"{side} {f / 1e9:6.1f} GFLOP {s * 1e3:7.1f} ms"
            for side, f, s in zip(("budget 0.5", "budget 1.0", "plain stack"), cost, seconds, strict=True)
        ))
        for other, side, want in ((1, "budget 1", WANT), (2, "stack", None)):
            saved_flops, saved_time = 1 - cost[0] / cost[other], 1 - seconds[0] / seconds[other]
            share = saved_time / saved_flops
            print(f"  against {side}: {saved_flops:.1%} of the FLOPs saved, {saved_time:.1%} of the time: a share of {share:.0%}")
            judged = want is not None and not training
            row(f"gateskip {gate_form} {name}: {share:.0%} of saved FLOPs", seconds[0], seconds[other], "budget 0.5", side,
                ">= 80%" if judged else "", share >= want if judged else None)


def main() -> None:
    torch.set_num_threads(2)
    for gate_form in ("vector", "scalar"):
        compare(gate_form)


if __name__ == "__main__":
    main()
