"""``lsrl``: compiled programs against an interpreter, and what the paper's programs promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from gatework.core import PartError
from gatework.mixers.lsrl import (
    RecurrentProgram,
    both,
    choose,
    counter,
    equal,
    grid_lookup,
    larger,
    linear_state,
    mod_counter,
    noise_robustness,
    product,
    program_input,
    relu,
    since,
    step,
    table_lookup,
)


def interpreted(value, x):
    """A value at every token of one sequence (T, I), atom by atom and token by token."""
    states, rows = {}, []

    def of(value, seen, token):
        total = value.bias.clone()
        for atom, matrix in value.terms.items():
            total = total + matrix @ at(atom, seen, token)
        return total

    def at(atom, seen, token):
        if atom not in seen:
            if atom.kind == "input":
                seen[atom] = token
            elif atom.kind == "state":
                before = states.get(atom, atom.tensors["start"])
                seen[atom] = atom.tensors["matrix"] @ before + of(atom.operands[0], seen, token)
            else:
                parts = [of(operand, seen, token) for operand in atom.operands]
                seen[atom] = parts[0].clamp(min=0) if atom.kind == "relu" else parts[0] * parts[1]
        return seen[atom]

    for token in x:
        seen = {}
        rows.append(of(value, seen, token))
        states.update({atom: found for atom, found in seen.items() if atom.kind == "state"})
    return torch.stack(rows)


def winding_program():
    """States that read states, values that skip layers, an output of all kinds of values."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows, columns):
        return 0.5 * torch.randn(rows, columns, dtype=torch.float64, generator=generator)

    token = program_input(3)
    first = linear_state(token, matrix(2, 2), matrix(2, 3), start=[0.3, -1.0])
    second = linear_state(first.map(matrix(2, 2), [0.1, -0.2]), matrix(2, 2))  # Fed by a state of the same token.
    bent = relu(second + first * 2.0 - 0.1)
    gated = product(bent, 1.0 - token[:2])
    third = linear_state(gated - first, matrix(2, 2))
    return 3.0 - (third + relu(-third)) * 0.5 + token[1:] - second + bent.sum().repeat(2) + gated


def test_compiled_programs_say_what_the_interpreter_says():
    value = winding_program()
    x = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    program = RecurrentProgram(value)
    y, wanted = program(x), torch.stack([interpreted(value, row) for row in x])
    assert_close(y, wanted, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(said.sin().sum(), x)[0] for said in (y, wanted)]
    assert_close(*gradients, rtol=0, atol=1e-12)
    assert program.state_size == 6
    assert program.gated
    assert not any(p.requires_grad for p in program.parameters())
    assert_close(program(x[:, :4]), y[:, :4], rtol=0, atol=1e-12)


def test_a_program_of_linear_maps_alone_has_no_layers():
    token = program_input(2)
    program = RecurrentProgram(token.map([[1.0, 2.0]], [3.0]))
    assert len(program.layers) == 0
    assert program(torch.tensor([[[1.0, 1.0]]], dtype=torch.float64)).item() == 6


def run(build, *columns):
    """A program's output on one sequence, from its input's channels."""
    x = torch.tensor(columns, dtype=torch.float64).t()[None]
    return RecurrentProgram(build(program_input(len(columns))))(x)[0]


def test_steps_and_logic():
    numbers = [-3.0, -0.5, 0.0, 2.0**-11, 2.0**-10, 0.5, 1.0, 7.0]
    assert run(step, numbers)[:, 0].tolist() == [0, 0, 0, 0.5, 1, 1, 1, 1]
    left, right = (list(v) for v in zip(*itertools.product(range(4), repeat=2), strict=True))
    assert run(lambda x: larger(x[:1], x[1:]), left, right)[:, 0].tolist() == [a > b for a, b in zip(left, right, strict=True)]
    assert run(lambda x: equal(x[:1], x[1:]), left, right)[:, 0].tolist() == [a == b for a, b in zip(left, right, strict=True)]
    assert run(lambda x: both(x[:1], x[1:]), [0, 0, 1, 1], [0, 1, 0, 1])[:, 0].tolist() == [0, 0, 0, 1]
    for gated in (True, False):
        said = run(lambda x, gated=gated: choose(x[:1], x[1:], gated), [0, 1, 0, 1], [5.0, 5.0, -5.0, -5.0])
        assert said[:, 0].tolist() == [0, 5, 0, -5]


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12, 50, 333])
def test_counters_are_exact(n):
    length = 500
    x = torch.zeros(1, length, 1, dtype=torch.float64)
    token = program_input(1)
    assert RecurrentProgram(counter(token))(x)[0, :, 0].tolist() == list(range(length))
    program = RecurrentProgram(mod_counter(token, n))
    assert torch.equal(program(x)[0], torch.eye(n, dtype=torch.float64)[torch.arange(length) % n])
    assert program.state_size <= 2
    for start in (0, 1, 2, n):
        flag = RecurrentProgram(since(token, start))(x)[0, :, 0]
        assert flag.tolist() == [t >= start for t in range(length)]


def prompts(length, vocabulary, pairs, seed=0):
    """For each of the keys of a dictionary a prompt that asks for it, and the values, keys being all words in a random order."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)), dtype=torch.float64)
    keys = words[torch.randperm(len(words), generator=generator)[:pairs]]
    values = torch.randint(1, 30, keys.shape, generator=generator).double()
    told = torch.stack([keys, values], 1).flatten()
    return torch.cat([keys, told.expand(len(keys), -1)], 1)[..., None], values


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("length", "vocabulary", "pairs"), [(1, 12, 12), (2, 3, 9), (3, 2, 8), (4, 3, 10)])
def test_a_dictionary_is_looked_up_exactly_for_all_keys(length, vocabulary, pairs, gated):
    program = table_lookup(length, gated)
    x, values = prompts(length, vocabulary, pairs)
    y = program(x)
    assert torch.equal(y[:, -1], values)
    for row, (said, value) in enumerate(zip(y, values, strict=True)):
        read = length + (2 * row + 1) * length  # Where the value begins that this row asks for.
        assert not said[:read].any()
        for j in range(length):
            assert torch.equal(said[read + j, : j + 1], value[: j + 1])
            assert not said[read + j, j + 1 :].any()
        assert (said[read + length :] == value).all()
    assert program.gated == gated
    assert torch.equal(y, table_lookup(length, not gated)(x))
    unknown = x.clone()
    unknown[:, 0] = vocabulary + 1
    assert not program(unknown).any()


def test_the_state_does_not_grow_with_the_dictionary():
    assert [table_lookup(n).state_size for n in (1, 2, 3)] == [table_lookup(n, gated=False).state_size for n in (1, 2, 3)]
    program = table_lookup(2)
    for pairs in (1, 40):
        x, values = prompts(2, 7, pairs, seed=pairs)
        assert torch.equal(program(x)[:, -1], values)
    assert program.state_size == 16


def grid_prompts(function, queries, cells):
    """Prompts with the function's values at the middles of the cells, behind each query."""
    inputs = queries.shape[1]
    corners = torch.tensor(list(itertools.product(range(cells), repeat=inputs)), dtype=torch.float64) / cells
    told = torch.cat([corners, function(corners + 0.5 / cells)], 1)
    first = torch.cat([queries, torch.zeros(len(queries), told.shape[1] - inputs)], 1)
    return torch.cat([first[:, None], told.expand(len(queries), -1, -1)], 1)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("inputs", [1, 2])
def test_a_function_is_told_by_its_values_on_a_grid(inputs, gated):
    def function(x):
        return torch.stack([(3 * x).sin().sum(1), -x.square().sum(1), (x - 0.5).prod(1)], 1)

    errors = []
    for cells in (4, 8):
        queries = torch.rand(40, inputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        away = ((queries * cells) % 1).sub(0.5).abs().max(1).values < 0.48  # Not within a border's width.
        queries = queries[away]
        program = grid_lookup(inputs, 3, cells, gated)
        y = program(grid_prompts(function, queries, cells))[:, -1]
        middles = ((queries * cells).floor() + 0.5) / cells
        assert_close(y, function(middles), rtol=0, atol=1e-12 if gated else 1e-5)
        errors.append((y - function(queries)).abs().max().item())
        slope = 3 * inputs  # Of any of the three, in the largest difference of a coordinate.
        assert errors[-1] <= slope * 0.5 / cells + 1e-5
        assert program.state_size == 3 + inputs + 3
    assert errors[1] < 0.7 * errors[0]


def test_gates_stand_more_noise_than_large_constants():
    x, values = prompts(2, 3, 9)

    def right(y):
        return (y[:, -1].round() == values).all(1)

    shares = {}
    for gated in (True, False):
        program = table_lookup(2, gated)
        before = [p.clone() for p in program.parameters()]
        shares[gated] = noise_robustness(program, right, x, [0.0, 1e-8, 1e-2], trials=4)
        assert all(torch.equal(p, q) for p, q in zip(before, program.parameters(), strict=True))
        assert shares[gated] == noise_robustness(program, right, x, [0.0, 1e-8, 1e-2], trials=4)
    assert shares[True][:2] == [1.0, 1.0]
    assert shares[False][0] == 1.0
    assert shares[False][1] < 0.2
    assert max(shares[True][2], shares[False][2]) < 0.2


def test_empty_inputs():
    program = table_lookup(2)
    for shape in ((0, 4, 1), (2, 0, 1)):
        assert program(torch.zeros(shape, dtype=torch.float64)).shape == (*shape[:2], 2)


def test_what_does_not_fit_is_refused():
    token = program_input(2)
    for refused, message in (
        (lambda: token.map([[1.0]]), r"a map of 2 channels is a matrix with as many columns, not \(1, 1\)"),
        (lambda: token + token[:1], "values that are added have one width, not 2 and 1"),
        (lambda: product(token, token[:1]), "values that are multiplied have one width, not 2 and 1"),
        (lambda: linear_state(token, [[1.0]]), r"a state of 2 channels moves by a square matrix of that size, not \(1, 1\)"),
        (lambda: mod_counter(token, 0), "n of at least 1, not 0"),
        (lambda: table_lookup(0), "n of at least 1, not 0"),
        (lambda: grid_lookup(1, 0, 2), "at least 1, cells at most 256, got 1, 0 and 2"),
        (lambda: RecurrentProgram(token[:1] + program_input(1)), "a program has one input, not 2"),
        (lambda: table_lookup(1)(torch.zeros(1, 3, 2)), r"reads tokens of shape \(batch, time, 1\), not \(1, 3, 2\)"),
    ):
        with pytest.raises(PartError, match=message):
            refused()
