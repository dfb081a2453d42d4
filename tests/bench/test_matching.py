from __future__ import annotations

import math

import pytest
import torch

from gatework.bench import matching
from gatework.bench.matching import TOLERANCE, match, solve
from gatework.bench.study import define
from gatework.bench.tasks import make_task
from gatework.core.errors import GateworkError

TASK = {"name": "text", "length": 16, "eval_tokens": 256}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_bytes(bytes(range(256)) * 12)
    return str(path)


def fitted(data, **settings):
    study = define(
        {"task": TASK, "data": data, "model": {"d_model": 32, "layers": 2, "heads": 2}, "tokens": 1000, "batch_size": 4} | settings
    )
    return match(study, make_task(**study.task))


@pytest.mark.parametrize(("slope", "base"), [(1, 0), (192, 5000), (7, 123456), (0.25, 1)])
@pytest.mark.parametrize("start", [1, 64, 4096])
def test_solve_finds_the_nearest(slope, base, start):
    def cost(n):
        return float(base + slope * n)

    for target in (cost(1), cost(77.3), cost(1000), cost(12345.6)):
        best = min(range(1, 20000), key=lambda n: abs(cost(n) - target))
        found = solve(cost, target, start)
        assert abs(cost(found) / target - 1) <= max(abs(cost(best) / target - 1), matching.GOOD)


@pytest.mark.parametrize("divisor", [4, 6, 8, 48])
def test_solve_respects_what_fits(divisor):
    def cost(n):
        return None if n % divisor else 1000.0 + 3 * n

    target = 1000.0 + 3 * 1234
    found = solve(cost, target, 100)
    assert found % divisor == 0
    best = min(range(divisor, 5000, divisor), key=lambda n: abs(cost(n) - target))
    assert abs(cost(found) - target) <= max(abs(cost(best) - target), matching.GOOD * target)


def test_solve_prefers_round_sizes():
    assert solve(lambda n: 100_000.0 + n, 101_000.0, 500) % 32 == 0


def test_solve_on_costs_that_bend():
    found = solve(lambda n: n**1.5, 1000.0, 10)
    assert abs(found**1.5 / 1000 - 1) < 0.01


def test_solve_where_nothing_helps():
    assert solve(lambda n: 5.0, 7.0, 10) >= 1
    assert solve(lambda n: None, 7.0, 10) == 10


def glu_parameters(d_model, d_ff, layers, vocab=256):
    return vocab * d_model + layers * (4 * d_model**2 + 3 * d_model * d_ff + 2 * d_model) + d_model


def test_equal_parameters(data):
    got = fitted(data, baseline="feedforward=glu, d_ff=96", variants={"mlp": "feedforward=mlp", "deep": "layers=3"})
    assert got["baseline"]["parameters"] == glu_parameters(32, 96, 2)
    assert got["baseline"]["d_ff"] == 96
    for entry in got.values():
        assert abs(entry["parameters"] / got["baseline"]["parameters"] - 1) <= TOLERANCE
        assert entry["tokens"] == 1000
        assert entry["flops_per_token"] > 0
        assert entry["seconds_per_token"] > 0
    assert got["mlp"]["d_ff"] == 144  # Two matrices instead of three.
    assert got["deep"]["d_ff"] < 96


def test_what_is_equal_already_is_left_alone(data):
    got = fitted(data, variants={"w": "mixer=attention(window=4)"})
    assert got["w"]["d_ff"] is None
    assert got["w"]["parameters"] == got["baseline"]["parameters"]


def test_equal_flops(data):
    got = fitted(data, match="flops", baseline="feedforward=glu, d_ff=96", variants={"deep": "layers=3", "mlp": "feedforward=mlp"})
    flops = {name: entry["flops_per_token"] for name, entry in got.items()}
    # Per token: forward 2 per weight, backward 4, attention beside; the embedding costs nothing, the head does.
    weights = 2 * (4 * 32**2 + 3 * 32 * 96) + 256 * 32
    attention = 2 * (2 + 5) * 2 * 8.5 * 32  # Two layers; 2 products forward, 5 backward, over 8.5 of 16 positions on average.
    assert flops["baseline"] == pytest.approx(6 * weights + attention, rel=0.01)
    for value in flops.values():
        assert abs(value / flops["baseline"] - 1) <= TOLERANCE
    assert got["deep"]["parameters"] < got["baseline"]["parameters"] * 1.05


def test_equal_seconds_scales_the_budget(data, monkeypatch):
    monkeypatch.setattr(matching._Bench, "time", lambda self, sizes: {"baseline": 2.0, "slow": 4.0, "fast": 1.0})
    got = fitted(data, match="seconds", variants={"slow": "layers=4", "fast": "layers=1"})
    assert {name: entry["tokens"] for name, entry in got.items()} == {"baseline": 1000, "slow": 500, "fast": 2000}
    assert {entry["d_ff"] for entry in got.values()} == {None}


def test_none_leaves_all_alone(data):
    got = fitted(data, match="none", variants={"big": "layers=5"})
    assert got["big"]["parameters"] > 1.5 * got["baseline"]["parameters"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variants": {"big": "layers=12"}}, "variant 'big' cannot be made equal to the baseline in params.*no d_ff comes closer"),
        ({"variants": {"fat": "d_ff=500"}}, "variant 'fat' cannot be made equal.*its d_ff is given"),
        ({"variants": {"odd": "heads=5"}}, "variant 'odd': .*(divisible|multiple)"),
        ({"baseline": "heads=5", "variants": {"a": "heads=2"}}, "the baseline: .*(divisible|multiple)"),
        ({"variants": {"a": "mixer=attention(causal=false)"}}, "variant 'a': a language model needs a causal mixer"),
    ],
)
def test_what_cannot_be_made_equal(data, settings, message):
    with pytest.raises(GateworkError, match=message) as caught:
        fitted(data, **settings)
    assert "\n" not in str(caught.value)


def test_the_callers_random_state_is_left_alone(data):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fitted(data, variants={"mlp": "feedforward=mlp"})
    assert torch.equal(torch.get_rng_state(), before)
    assert math.isfinite(float(torch.rand(1)))
