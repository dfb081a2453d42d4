"""The hash encoding against a loop over points, grids and corners in Python's unbounded integers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gatework.ops.hash_grid import PRIMES, HashGridEncoding, resolutions

SIZES = {"levels": 4, "features": 3, "log2_size": 6, "n_min": 3, "n_max": 41}


def grid(d: int = 2, **settings) -> HashGridEncoding:
    torch.manual_seed(0)
    made = HashGridEncoding(d, **(SIZES | settings)).double()
    torch.nn.init.normal_(made.table)
    return made


def points(d: int, n: int = 9, seed: int = 1) -> torch.Tensor:
    x = torch.rand(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[0], x[1] = 0.0, 1.0
    return x


def cells(levels, n_min, n_max):
    b = math.exp((math.log(n_max) - math.log(n_min)) / (levels - 1))
    return [math.floor(n_min * b**level + 1e-9) for level in range(levels)]


def row(corner, n, d, t):
    if (n + 1) ** d <= 2**t:
        index = 0
        for i in corner:
            index = index * (n + 1) + i
        return index
    index = 0
    for i, prime in zip(corner, PRIMES, strict=False):
        index ^= i * prime % 2**64
    return index % 2**t


def tables(made):
    sizes = [min((n + 1) ** made.d, 2**made.log2_size) for n in cells(made.levels, made.n_min, made.n_max)]
    return made.table.split(sizes)


def reference(made, x):
    encoded = []
    for point in x:
        parts = []
        for n, table in zip(cells(made.levels, made.n_min, made.n_max), tables(made), strict=True):
            cell = [min(int(c * n), n - 1) for c in point.tolist()]
            total = torch.zeros(made.features, dtype=torch.float64)
            for bits in itertools.product((0, 1), repeat=made.d):
                weight = torch.ones((), dtype=torch.float64)
                for j, bit in enumerate(bits):
                    inside = point[j] * n - cell[j]
                    weight = weight * (inside if bit else 1 - inside)
                total = total + weight * table[row([c + b for c, b in zip(cell, bits, strict=True)], n, made.d, made.log2_size)]
            parts.append(total)
        encoded.append(torch.cat(parts))
    return torch.stack(encoded)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_encoding_and_gradients_follow_the_equations(d):
    made, x = grid(d), points(d).requires_grad_()
    assert made.hashed.tolist() == [(n + 1) ** d > 64 for n in made.cells.tolist()]
    assert d == 1 or len(set(made.hashed.tolist())) == 2, "both kinds of index are wanted"
    weights = torch.randn(9, made.width, dtype=torch.float64)
    results = []
    for forward in (made, lambda x: reference(made, x)):
        y = forward(x)
        results.append([y, *torch.autograd.grad((y * weights).sum(), [x, made.table])])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_resolutions_run_from_the_least_to_the_largest():
    assert resolutions(16, 16, 2048) == [math.floor(16 * 128 ** (level / 15) + 1e-9) for level in range(16)]
    assert resolutions(1, 4, 7) == [7]
    for n_min, n_max, levels in itertools.product((1, 3, 16), (16, 100, 999, 2048), (2, 5, 16)):
        found = resolutions(levels, n_min, n_max)
        assert (found[0], found[-1], sorted(found)) == (n_min, n_max, found)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_at_a_node_of_a_grid_its_row_comes_out(d):
    made = grid(d)
    for level, (n, table) in enumerate(zip(made.cells.tolist(), tables(made), strict=True)):
        for corner in itertools.islice(itertools.product(range(n + 1), repeat=d), 0, None, max(1, (n + 1) ** d // 40)):
            x = torch.tensor([[i / n for i in corner]], dtype=torch.float64)
            found = made(x)[0].view(made.levels, made.features)[level]
            torch.testing.assert_close(found, table[row(corner, n, d, made.log2_size)], rtol=0, atol=1e-11)


def test_weights_sum_to_one_and_the_encoding_is_continuous_and_linear_within_a_cell():
    made, x = grid(), points(2, 200)
    rows, weights = made.locate(x)
    torch.testing.assert_close(weights.sum(2), torch.ones(200, made.levels, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (weights >= 0).all()
    assert rows.min() >= 0
    assert rows.max() < len(made.table)
    # Across a border of cells, from both sides; at x = 1 from the inside.
    for n in made.cells.tolist():
        border = torch.tensor([[1 / n, 0.3], [0.77, (n - 1) / n], [1.0, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(made(border - 1e-13), made(border + 1e-13), rtol=0, atol=1e-9)
    # Along an axis within a cell of the finest grid (and so of all that it divides): the middle is the mean of the ends.
    fine = grid(n_min=5, n_max=40, levels=4)  # 5, 10, 20, 40
    assert fine.cells.tolist() == [5, 10, 20, 40]
    a = torch.tensor([[7.1 / 40, 0.31]], dtype=torch.float64)
    b = torch.tensor([[7.9 / 40, 0.31]], dtype=torch.float64)
    torch.testing.assert_close(fine((a + b) / 2), (fine(a) + fine(b)) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("d", [2, 3])
def test_a_point_s_gradient_touches_few_rows(d):
    made = grid(d, log2_size=14)
    made(points(d)[5:6]).sum().backward()
    touched = made.table.grad.any(1).sum().item()
    assert 0 < touched <= made.levels * 2**d


def test_large_grids_do_not_overflow():
    made = grid(3, levels=2, n_min=1 << 19, n_max=1 << 20, log2_size=10)
    x = points(3)
    torch.testing.assert_close(made(x), reference(made, x), rtol=0, atol=1e-8)


def test_points_outside_are_clamped_and_dtypes_kept():
    made = grid()
    outside = torch.tensor([[-0.5, 1.5]], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(made(outside), made(torch.tensor([[0.0, 1.0]], dtype=torch.float64)), rtol=0, atol=0)
    made(outside).sum().backward()
    assert not outside.grad.any()
    half = grid().bfloat16()
    assert half(points(2).bfloat16()).dtype == torch.bfloat16
    # Places are found in float32 even so: with 8 bits the finest grid's cells could not be told apart.
    x = points(2).bfloat16()
    close = grid()
    close.table.data = half.table.data.double()
    torch.testing.assert_close(half(x).double(), close(x.double()), rtol=0.01, atol=0.01)
    assert made(torch.zeros(0, 2, dtype=torch.float64)).shape == (0, made.width)


def test_initialisation_and_size():
    made = HashGridEncoding(2, levels=3, features=2, log2_size=6, n_min=4, n_max=64)
    assert made.table.shape == (25 + 64 + 64, 2)  # 5^2 corners, then 17^2 and 65^2 hashed
    assert made.table.abs().max() <= 1e-4
    assert made.table.std().item() == pytest.approx(1e-4 / 3**0.5, rel=0.1)
    assert sorted(made.state_dict()) == ["table"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d": 4}, "1, 2 or 3 coordinates, got 4"), ({"levels": 0}, "at least 1"), ({"n_max": 2}, "n_max 2 is below n_min 3"),
        ({"log2_size": 31}, "in 0..30"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        HashGridEncoding(**({"d": 2} | SIZES | settings))
    with pytest.raises(ValueError, match="2 coordinates, not 3"):
        grid()(torch.zeros(4, 3, dtype=torch.float64))
