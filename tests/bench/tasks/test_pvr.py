"""The task ``pvr``, and the Boolean measures."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gatework.bench.tasks import boolean_influence, make_task, noise_stability
from gatework.bench.tasks.pvr import cube
from gatework.core import GateworkError
from gatework.models import Classifier

AGGREGATIONS = {
    "majority": lambda bits: (sum(bits) > 0) - (sum(bits) < 0), "parity": math.prod, "min": min, "max": max,
}  # fmt: skip


def slow(x, pointer, window, aggregation, cyclic):
    """The value of one point, by its definition."""
    start = int("".join("1" if bit > 0 else "0" for bit in x[:pointer]), 2)
    data = x[pointer:]
    chosen = [(data * 2 if cyclic else data)[i] for i in range(start, min(start + window, len(data) * (1 + cyclic)))]
    return AGGREGATIONS[aggregation](chosen)


def fourier(function, d):
    """All coefficients, by subsets."""
    x = cube(d).double()
    values = function(x)
    subsets = [s for size in range(d + 1) for s in itertools.combinations(range(d), size)]
    return {s: float((values * x[:, list(s)].prod(1)).mean()) for s in subsets}


def neighbours(x):
    """f1 of the paper: the sum of i x_i x_{i+1}, i = 1 .. d - 1."""
    return (x[:, :-1] * x[:, 1:] * torch.arange(1, x.shape[1])).sum(1)


def staircase(x):
    """f2 of the paper: x_1 + x_1 x_2 + ... + x_1 .. x_d."""
    return x.cumprod(1).sum(1)


def test_the_cube_has_every_point_once_in_order():
    assert cube(3).tolist() == [list(map(float, point)) for point in itertools.product([-1, 1], repeat=3)]


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("pointer", "window"), [(1, 1), (2, 1), (2, 3), (3, 3), (3, 7)])
def test_values_by_hand(pointer, window, aggregation, cyclic):
    made = make_task("pvr", pointer=pointer, window=window, aggregation=aggregation, cyclic=cyclic)
    x = cube(pointer + 2**pointer)
    wanted = [slow(list(map(int, row)), pointer, window, aggregation, cyclic) for row in x.tolist()]
    assert made.value(x).tolist() == wanted


def test_the_pointer_is_big_endian_and_all_minus_is_the_first_window():
    made = make_task("pvr", pointer=2, window=1)
    data = torch.tensor([1.0, -1.0, -1.0, -1.0])
    for number, bits in enumerate([(-1, -1), (-1, 1), (1, -1), (1, 1)]):
        x = torch.cat([torch.tensor(bits).float(), data.roll(number)])[None]
        assert made.value(x).item() == 1


@pytest.mark.parametrize("held_out", [0, 2, 5])
def test_splits(held_out):
    made = make_task("pvr", held_out=held_out)
    sizes = {name: tuple(x.shape) for name, (x, _) in made.splits.items()}
    assert sizes == {"train": (1900, 1, 11), "validation": (1024, 1, 11), "test": (2048, 1, 11)}
    bits = {name: x[:, 0] for name, (x, _) in made.splits.items()}
    assert (bits["train"][:, held_out] == 1).all()
    assert (bits["validation"][:, held_out] == 1).all()
    others = [k for k in range(11) if k != held_out]
    torch.testing.assert_close(bits["train"][:, others].mean(0), torch.zeros(10), rtol=0, atol=0.1)
    assert set(map(tuple, bits["test"].tolist())) == set(map(tuple, cube(11).tolist()))
    assert not torch.equal(bits["test"], cube(11))
    assert len(bits["validation"].unique(dim=0)) == 1024
    for x, y in made.splits.values():
        assert torch.equal(y, made.value(x[:, 0])[:, None])
    assert make_task("pvr", held_out=held_out, seed=1).data_hash != made.data_hash


def test_large_cubes_are_sampled():
    made = make_task("pvr", pointer=4, examples=100, held_out=19)
    test, validation = made.splits["test"][0], made.splits["validation"][0]
    assert test.shape == (8192, 1, 20)
    assert len(validation) == pytest.approx(4096, abs=200)
    assert (validation[:, 0, 19] == 1).all()
    assert test[:, 0, 19].mean().item() == pytest.approx(0, abs=0.05)


# The measures


@pytest.mark.parametrize("function", [neighbours, staircase, lambda x: x[:, 0].clamp(min=0) * x.sum(1)])
def test_the_influence_is_the_fourier_weight_of_a_bit(function):
    found, weights = boolean_influence(function, 6), fourier(function, 6)
    wanted = [sum(w * w for s, w in weights.items() if k in s) for k in range(6)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert found.dtype == torch.float64


def test_the_influences_of_the_papers_functions():
    d = 14
    assert boolean_influence(staircase, d).tolist() == [float(d - k) for k in range(d)]
    squares = [i * i for i in range(1, d)]
    assert boolean_influence(neighbours, d).tolist() == [
        float((squares[k - 1] if k else 0) + (squares[k] if k < d - 1 else 0)) for k in range(d)
    ]


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_influences_of_pointer_values(aggregation, cyclic):
    made = make_task("pvr", aggregation=aggregation, cyclic=cyclic)
    x, influence = cube(11), boolean_influence(made.value, 11)
    values = made.value(x).double()
    assert influence.sum() >= values.var(correction=0) - 1e-12
    for k in range(11):
        flipped, frozen = x.clone(), x.clone()
        flipped[:, k] *= -1
        frozen[:, k] = 1
        half = (values - made.value(frozen)).square().mean() / 2
        assert influence[k].item() == pytest.approx(half.item(), abs=1e-12)
        if set(values.tolist()) == {-1.0, 1.0}:
            assert influence[k].item() == pytest.approx((made.value(flipped) != values).double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("window", [1, 2, 3, 8])
def test_a_data_bit_of_a_cyclic_parity_has_the_share_of_windows_that_hold_it(window):
    made = make_task("pvr", window=window, aggregation="parity", cyclic=True)
    influence = boolean_influence(made.value, 11)
    assert influence[3:].tolist() == [window / 8] * 8
    # A pointer bit moves the window: another product unless both windows are all data bits.
    assert influence[:3].tolist() == [0.0 if window == 8 else 0.5] * 3


def test_twenty_bits_are_enumerated():
    made = make_task("pvr", pointer=4, window=2, aggregation="parity", cyclic=True, examples=1, held_out=10)
    assert made.influence == pytest.approx(2 / 16, abs=1e-15)


@pytest.mark.parametrize("delta", [0.0, 0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("function", [neighbours, staircase, lambda x: x.sum(1).sign()])
def test_the_noise_stability_weighs_degrees(function, delta):
    wanted = sum((1 - 2 * delta) ** len(s) * w * w for s, w in fourier(function, 5).items())
    assert noise_stability(function, 5, delta) == pytest.approx(wanted, abs=1e-12)


def test_the_noise_stability_by_its_definition():
    made = make_task("pvr", pointer=2, window=3)
    x, delta, total = cube(6), 0.3, 0.0
    for flips in itertools.product([1, -1], repeat=6):
        chance = math.prod(delta if flip < 0 else 1 - delta for flip in flips)
        total += chance * float((made.value(x) * made.value(x * torch.tensor(flips))).mean())
    assert noise_stability(made.value, 6, delta) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: boolean_influence(staircase, 21), "functions of 1 to 20 bits are enumerated, got 21"),
        (lambda: noise_stability(staircase, 0, 0.1), "functions of 1 to 20 bits are enumerated, got 0"),
        (lambda: noise_stability(staircase, 3, 1.5), "delta is a probability, got 1.5"),
    ],
)
def test_what_cannot_be_enumerated_is_refused(call, sentence):
    with pytest.raises(GateworkError, match=sentence):
        call()


# The score


@pytest.mark.parametrize("held_out", range(11))
@pytest.mark.parametrize("cyclic", [False, True])
def test_the_function_with_its_bit_frozen_has_exactly_the_influence_as_its_error(held_out, cyclic):
    made = make_task("pvr", held_out=held_out, cyclic=cyclic)

    def frozen(x):
        x = x[:, 0].clone()
        x[:, held_out] = 1
        return made.value(x)[:, None]

    assert made.evaluate(frozen, "validation") == {"loss": 0.0, "mse": 0.0, "generalisation_error": 0.0}
    said = made.evaluate(frozen, "test")
    assert said["generalisation_error"] == pytest.approx(said["influence"], abs=1e-12)
    assert said["seen_error"] == 0
    assert said["unseen_error"] == pytest.approx(2 * said["influence"], abs=1e-12)
    known = made.evaluate(lambda x: made.value(x[:, 0])[:, None], "test")
    assert (known["generalisation_error"], known["unseen_error"], known["influence"]) == (0, 0, said["influence"])


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "mlp"},
        {"backbone": "vit", "patch": 1, "heads": 2},
        {"backbone": "vit", "patch": 1, "heads": 2, "mixer": "gla"},
    ],
)
def test_networks_on_bits_have_one_output(settings):
    made = make_task("pvr")
    model = Classifier(**made.model_arguments(), d_model=8, layers=2, **settings)
    x, y = made.splits["train"][0][:5], made.splits["train"][1][:5]
    assert model(x).shape == y.shape == (5, 1)
    made.loss(model(x), y).backward()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pointer": 5}, "pointer must be 1 to 4 bits, got 5"),
        ({"window": 9}, "window must be 1 to 8 data bits, got 9"),
        ({"window": 2}, "a majority needs an odd window, got 2"),
        ({"held_out": 11}, "held_out must be one of the bits 0 to 10, got 11"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"aggregation": "mean"}, "aggregation must be one of 'majority', 'parity', 'min', 'max', got 'mean'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, sentence):
    with pytest.raises(GateworkError, match=sentence):
        make_task("pvr", **options)
