"""``versatile_ffn`` in evaluation: how far its time falls with the mean number of loops, beside how far its FLOPs do.

One layer, and tokens whose first channels say how many loops they take, so that the mean can be set. FLOPs are those that ran. A
line is fitted through each side, relative to all tokens taking all loops; the figure is (slope of the time) / (slope of the FLOPs),
at least 0.8 asked for. The same weights looped for all tokens, without routers, stand beside it.
"""

from __future__ import annotations

from functools import partial

import torch
from _timing import interleaved, row

from gatework.core.cost import count_flops
from gatework.feedforward import VersatileFFN

LOOPS, WANT = 4, 0.8
#: Shares of the tokens that take 1, 2, 3 and 4 loops.
MIXES = (
    (1, 0, 0, 0), (0.5, 0.5, 0, 0), (0.4, 0.3, 0.2, 0.1), (0, 1, 0, 0), (0.25, 0.25, 0.25, 0.25), (0, 0.5, 0.5, 0),
    (0.1, 0.2, 0.3, 0.4), (0, 0, 0.5, 0.5), (0, 0, 0, 1),
)


def tokens(mix: tuple[float, ...], count: int, width: int) -> torch.Tensor:
    """Random tokens, in random order, whose first channels are 1 at the number of loops they take."""
    loops = torch.arange(LOOPS).repeat_interleave((count * torch.tensor(mix)).round().long())[torch.randperm(count)]
    x = torch.randn(count, width)
    x[:, :LOOPS] = torch.nn.functional.one_hot(loops, LOOPS)
    return x


def layers(width: int) -> tuple[VersatileFFN, VersatileFFN]:
    """The layer, and the same weights looped for all tokens."""
    torch.manual_seed(0)
    adaptive = VersatileFFN(width, loops=LOOPS).eval()
    fixed = VersatileFFN(width, loops=LOOPS, path="fixed").eval()
    fixed.load_state_dict(adaptive.state_dict(), strict=False)
    with torch.no_grad():
        adaptive.depth_router.weight.copy_(torch.eye(LOOPS, width))
    return adaptive, fixed


@torch.no_grad()
def forward(layer: VersatileFFN, x: torch.Tensor) -> torch.Tensor:
    return layer(x)


def slope(xs: torch.Tensor, ys: list[float]) -> float:
    """Least squares, relative to the last value."""
    values = torch.tensor(ys, dtype=torch.float64) / ys[-1]
    centred = xs - xs.mean()
    return float((centred * (values - values.mean())).sum() / centred.square().sum())


def compare(count: int, width: int) -> None:
    adaptive, fixed = layers(width)
    inputs = [tokens(mix, count, width) for mix in MIXES]
    x = inputs[-1]
    torch.testing.assert_close(forward(adaptive, x), forward(fixed, x), rtol=0, atol=1e-4)
    means, flops = [], []
    for x in inputs:
        with count_flops() as counted:
            forward(adaptive, x)
        flops.append(counted.total)
        means.append(float(adaptive.metrics["loops"]))
    *seconds, plain = interleaved(*(partial(forward, adaptive, x) for x in inputs), partial(forward, fixed, inputs[0]), repeats=9)
    print(f"{count} tokens, d_model {width}, d_ff {adaptive.d_ff}; all tokens looped {LOOPS} times: {plain * 1e3:.2f} ms")
    for mix, mean, flop, second in zip(MIXES, means, flops, seconds, strict=True):
        shares = " ".join(f"{share:4.0%}" for share in mix)
        print(f"  {shares}   mean loops {mean:.2f}   {flop / 1e9:6.2f} GFLOP ({flop / flops[-1]:5.1%})"
              f"   {second * 1e3:7.2f} ms ({second / seconds[-1]:5.1%})")
    loops = torch.tensor(means, dtype=torch.float64)
    share = slope(loops, seconds) / slope(loops, flops)
    row(f"versatile_ffn {count}x{width}: {share:.0%} of the FLOP slope", seconds[0], seconds[-1], "1 loop", f"{LOOPS} loops",
        f">= {WANT:.0%}", share >= WANT)
    row(f"versatile_ffn {count}x{width}: {LOOPS} loops for all", seconds[-1], plain, "chosen", "fixed")


def main() -> None:
    torch.set_num_threads(2)
    compare(4096, 256)
    compare(2048, 576)


if __name__ == "__main__":
    main()
