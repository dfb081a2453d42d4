"""One shared array behind many weights: the maps against the equations entry by entry, and what the papers promise of them."""

from __future__ import annotations

import copy
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatework import weights
from gatework.core import PartError
from gatework.weights import Roast, SharedArray
from gatework.weights.stable_rps import MAPS, P, Place

LAMS = (0.5, 2.0, 1.0)


class Net(nn.Module):
    """Three weights of different spread: a stack of two matrices, a matrix, a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 3, 4))
        self.linear = nn.Linear(7, 5, bias=False)
        self.conv = nn.Conv2d(2, 3, 2, bias=False)
        with torch.no_grad():
            for weight, lam in zip(self.weights(), LAMS, strict=True):
                weight.normal_().mul_(lam)

    def weights(self) -> list[Tensor]:
        return [self.stack, self.linear.weight, self.conv.weight]


SIZES = (24, 35, 24)
TOTAL = sum(SIZES)


def net(draw: int = 0, **settings) -> Net:
    torch.manual_seed(draw)
    model = Net().double()
    weights.apply(model, ["linear", "stack", "conv"], SharedArray(**({"tile": (2, 3)} | settings)))
    return model


def array(model: Net) -> nn.Parameter:
    (psi,) = model.parameters()
    return psi


def flat(model: Net) -> Tensor:
    return torch.cat([weight.flatten() for weight in model.weights()])


def lams(model: Net) -> Tensor:
    parts = [model.parametrizations.stack[0], model.linear.parametrizations.weight[0], model.conv.parametrizations.weight[0]]
    return torch.cat([part.place.lam.expand(size) for part, size in zip(parts, SIZES, strict=True)])


def jacobian(model: Net) -> Tensor:
    """J of W = J psi, column by column."""
    psi = array(model)
    before, columns = psi.detach().clone(), []
    with torch.no_grad():
        for j in range(psi.numel()):
            psi.copy_(F.one_hot(torch.tensor(j), psi.numel()))
            columns.append(flat(model).clone())
        psi.copy_(before)
    return torch.stack(columns, 1)


# -- the map


def numbers(seed: int, purpose: str) -> list[int]:
    found = []
    for k in range(3):
        digest = hashlib.sha256(f"{seed} {purpose} {k}".encode()).digest()
        found.append(int.from_bytes(digest[:8], "big") % (P // 2 - 1) * 2 + 1)
    return found


def slot(kind: str, seed: int, m: int, offset: int, i: int, columns: int, rows: int, tile: tuple[int, int]) -> tuple[int, int]:
    """The slot and the sign of entry i, with Python's integers, which do not overflow."""
    a, b, d = numbers(seed, "slots")
    p = offset + i
    if kind == "cyclic":
        c, r = p // m, p % m
        index = ((a * c + b * c * c + d) % P % m + r) % m
    elif kind == "hashed":
        index = (a * p + b * p * p + d) % P % m
    else:
        row, column = i // columns, i % columns
        x, y = row // tile[0] + offset, column // tile[1] + offset + rows
        start = (a * x + b * y + d) % P % (m - tile[0] * tile[1])
        index = start + row % tile[0] * tile[1] + column % tile[1]
    a, b, d = numbers(seed, "signs")
    return index, 1 if (a * p + b * p * p + d) % P % 2 == 0 else -1


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 1.3])
@pytest.mark.parametrize("seed", [0, 12345])
def test_every_entry_equals_the_equation(kind, ratio, seed):
    model = net(map=kind, ratio=ratio, seed=seed)
    psi = array(model).detach()
    m = int(ratio * TOTAL)
    assert psi.numel() == m
    wanted, offset = [], 0
    for size, (rows, columns) in zip(SIZES, [(6, 4), (5, 7), (3, 8)], strict=True):
        for i in range(size):
            index, sign = slot(kind, seed, m, offset, i, columns, rows, (2, 3))
            wanted.append(sign * psi[index])
        offset += size
    torch.testing.assert_close(flat(model).detach(), torch.stack(wanted) * lams(model), rtol=1e-15, atol=0)


def test_the_hashes_do_not_overflow():
    """Positions of a model of two billion weights, against Python's integers."""
    from gatework.weights.stable_rps import _hash, _hash_of_two

    xs = [0, 1, 59_999, 10**6, 2**31 - 1, P - 1]
    a, b, d = key = [P - 2, P - 4, P - 6]
    assert _hash(torch.tensor(xs), key).tolist() == [(a * x + b * x * x + d) % P for x in xs]
    assert _hash_of_two(torch.tensor(xs), torch.tensor(xs[::-1]), key).tolist() == [
        (a * x + b * y + d) % P for x, y in zip(xs, xs[::-1], strict=True)
    ]


def test_a_ratio_of_one_can_express_any_weights_with_the_cyclic_map_alone():
    """(a) One to one from ratio 1 on."""
    for ratio in (1.0, 1.7):
        assert torch.linalg.matrix_rank(jacobian(net(map="cyclic", ratio=ratio))) == TOTAL
        for kind in ("roast", "hashed"):
            assert torch.linalg.matrix_rank(jacobian(net(map=kind, ratio=ratio))) < TOTAL


@pytest.mark.parametrize("ratio", [0.1, 0.31, 0.5, 0.99, 1.0, 2.0])
def test_the_cyclic_map_uses_all_slots_alike(ratio):
    """(b) floor(n/m) or ceil(n/m) times."""
    uses = (jacobian(net(map="cyclic", ratio=ratio)) != 0).sum(0)
    m = int(ratio * TOTAL)
    assert set(uses.tolist()) <= {TOTAL // m, math.ceil(TOTAL / m)}
    hashed = (jacobian(net(map="hashed", ratio=ratio)) != 0).sum(0)
    assert hashed.max() - hashed.min() > 1


def test_tiles_are_stretches_of_the_array():
    model = net(map="roast", ratio=0.5)
    order = jacobian(model).abs().argmax(1)[24:59].view(5, 7)
    assert order[:2, :3].flatten().diff().tolist() == [1] * 5
    assert order[2:4, 3:6].flatten().diff().tolist() == [1] * 5
    assert order[4, :3].diff().tolist() == [1, 1]  # A tile cut by the edge.
    assert torch.equal(flat(net(map="roast", ratio=0.5)), flat(net_of(Roast(ratio=0.5, tile=(2, 3)))))


def net_of(part) -> Net:
    torch.manual_seed(0)
    model = Net().double()
    weights.apply(model, ["linear", "stack", "conv"], part)
    return model


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("scaler", ["none", "v1", "v2", "v3", "v4", "v5"])
def test_the_gradient_of_the_array(kind, scaler):
    """(c) dpsi_j = sum lam g dW over the uses of j, divided by 1e-6 + G_j."""
    model = net(map=kind, ratio=0.3, scaler=scaler)
    upstream = torch.randn(TOTAL, dtype=torch.float64)
    (flat(model) * upstream).sum().backward()
    j = jacobian(model)
    uses, lam = (j != 0).double(), lams(model)
    k, used, squares = uses.sum(0), (uses * lam[:, None]).sum(0), (uses * lam[:, None] ** 2).sum(0)
    scale = {
        "none": torch.ones_like(k) - 1e-6, "v1": used**2 / (1e-3 + k), "v2": used, "v3": used / (1e-3 + k), "v4": squares.sqrt(),
        "v5": squares,
    }[scaler]
    torch.testing.assert_close(array(model).grad, (j.t() @ upstream) / (1e-6 + scale), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", MAPS)
def test_sgd_moves_the_weights_by_a_projection(kind):
    """(d) J^T J is diagonal and is v5; with v5 a step is the dense step, projected on what the array can express."""
    model = net(map=kind, ratio=0.3, scaler="v5")
    j = jacobian(model)
    product = j.t() @ j
    torch.testing.assert_close(product, product.diagonal().diag(), rtol=0, atol=1e-14)
    torch.testing.assert_close(product.diagonal(), model.linear.parametrizations.weight[0].scale.scale, rtol=1e-12, atol=1e-14)
    upstream, before = torch.randn(TOTAL, dtype=torch.float64), flat(model).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (flat(model) * upstream).sum().backward()
    optimizer.step()
    projection = j @ torch.linalg.pinv(j)
    torch.testing.assert_close(flat(model).detach() - before, -0.1 * projection @ upstream, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("scaler", "tolerance"), [("v5", 1e-5), ("v1", 2e-3)])
def test_without_sharing_training_is_dense_sgd(scaler, tolerance):
    model = net(map="cyclic", ratio=1.0, scaler=scaler)
    dense = copy.deepcopy(model)
    weights.fold(dense)
    x, target = torch.randn(9, 7, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    rules = [torch.optim.SGD(some.parameters(), lr=0.1) for some in (model, dense)]
    start = flat(dense).detach().clone()
    for _ in range(5):
        for some, rule in zip((model, dense), rules, strict=True):
            rule.zero_grad()
            (F.linear(x, some.linear.weight) - target).square().mean().backward()
            rule.step()
    moved = flat(dense).detach() - start
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(flat(model).detach() - start, moved, rtol=0, atol=tolerance * float(moved.abs().max()))


@pytest.mark.parametrize("kind", MAPS)
def test_v1_is_at_most_v5(kind):
    """(e) By Cauchy-Schwarz; equal (up to its 1e-3) where all lam are."""
    v1, v5 = (net(map=kind, ratio=0.2, scaler=s).linear.parametrizations.weight[0].scale.scale for s in ("v1", "v5"))
    assert (v1 <= v5).all()
    assert (v1 < 0.9 * v5).any()
    alike = []
    for scaler in ("v1", "v5"):
        model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)).double()
        with torch.no_grad():
            model[1].weight.copy_(model[0].weight.mul_(1).flip(0))
        torch.manual_seed(3)
        weights.apply(model, "*", SharedArray(map=kind, ratio=0.2, scaler=scaler, tile=(2, 3), init=0.5))
        part = model[0].parametrizations.weight[0]
        alike.append(part.scale.scale / part.place.lam**2)
    torch.testing.assert_close(alike[0], alike[1], rtol=0, atol=1e-3)


def test_a_sketch_keeps_inner_products():
    """(f) Over hash and signs the mean of <J^T x, J^T y> is <x, y>, and with the hashed map its variance is the textbook's."""
    n, m, draws = 40, 16, 1500
    generator = torch.Generator().manual_seed(5)
    x, y = torch.randn(2, n, dtype=torch.float64, generator=generator).unbind()
    found: dict[str, list[float]] = {"hashed": [], "cyclic": []}
    for kind, values in found.items():
        for seed in range(draws):
            index = Place((MAPS.index(kind), seed, 1, 1, m, 0), torch.Size((n,)), n, torch.ones(())).index.long()
            sign, slots = (index >> 63) | 1, index ^ (index >> 63)
            sketch = torch.zeros(2, m, dtype=torch.float64).index_add_(1, slots, torch.stack((x, y)) * sign)
            values.append(float(sketch[0] @ sketch[1]))
    exact = float(x @ y)
    variance = float((x.square().sum() * y.square().sum() + exact**2 - 2 * (x * y).square().sum()) / m)
    for kind, values in found.items():
        sample = torch.tensor(values, dtype=torch.float64)
        assert abs(sample.mean() - exact) < 4 * sample.std() / draws**0.5, kind
    assert abs(torch.tensor(found["hashed"], dtype=torch.float64).var() / variance - 1) < 0.2


# -- the start


@pytest.mark.parametrize("init", [None, 0.04, 3.0])
@pytest.mark.parametrize("kind", MAPS)
def test_every_weight_starts_with_its_own_spread(kind, init):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 80), nn.Linear(80, 100), nn.Embedding(50, 60)).double()
    with torch.no_grad():
        model[1].weight.mul_(10)
    spreads, total = [layer.weight.detach().std() for layer in model], sum(layer.weight.numel() for layer in model)
    weights.apply(model, "*", SharedArray(ratio=0.3, map=kind, init=init, tile=(4, 4)))
    psi = model[0].parametrizations.weight.original
    wanted = 3**0.5 * math.sqrt(sum(float(s) ** 2 * n for s, n in zip(spreads, (4800, 8000, 3000), strict=True)) / total)
    assert float(psi.detach().abs().max()) == pytest.approx(init or wanted, rel=0.01)
    for layer, spread in zip(model, spreads, strict=True):
        assert float(layer.weight.detach().std()) == pytest.approx(float(spread), rel=0.1)
    if init is None:
        used = torch.cat([layer.parametrizations.weight[0].place.lam.expand(layer.weight.numel()) for layer in model])
        assert float(used.square().mean().sqrt()) == pytest.approx(1.0, rel=0.05)


def test_one_array_for_each_call():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)))
    weights.apply(model, ["0", "1"], "stable_rps")
    weights.apply(model, ["2", "3"], "stable_rps")
    stored = [layer.parametrizations.weight.original for layer in model]
    assert stored[0] is stored[1]
    assert stored[2] is stored[3]
    assert stored[0] is not stored[2]
    assert [p.numel() for p in model.parameters()] == [16, 16]
    with pytest.raises(PartError, match=r"^SharedArray is bound to weights by weights.apply\(model, pattern, part\)$"):
        SharedArray()(torch.ones(3))


def test_the_map_is_not_drawn_from_the_global_random_state():
    first, second = net(0), net(1)
    assert torch.equal(jacobian(first) != 0, jacobian(second) != 0)
    assert not torch.equal(array(first), array(second))
    assert not torch.equal(jacobian(first) != 0, jacobian(net(0, seed=1)) != 0)


# -- saved and packed


@pytest.mark.parametrize("kind", MAPS)
def test_loading_takes_the_map_over(kind):
    """Also into a model that was built with another map, tile and seed, packed or not."""
    model, other = net(0, map=kind, seed=3), net(1, map="hashed" if kind == "cyclic" else "cyclic", tile=(1, 5), seed=8)
    other.load_state_dict(model.state_dict())
    assert torch.equal(flat(other), flat(model))
    for some in (model, other):
        flat(some).square().sum().backward()
    assert torch.equal(array(other).grad, array(model).grad)
    again, packed = net(2, seed=4), copy.deepcopy(model)
    weights.pack(packed)
    weights.pack(again)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(flat(again), flat(model))


def test_memory():
    """In training the array and 4 bytes of index for each weight, packed the array and a few numbers."""
    layer = nn.Linear(256, 128, bias=False)
    n = layer.weight.numel()
    weights.apply(layer, "*", SharedArray(ratio=1 / 16))
    assert weights.stored_bytes(layer) == 4 * n // 16 * 2 + 4 * n + 4 + 48  # With the scale of the gradient.
    weights.pack(layer)
    assert weights.stored_bytes(layer) == 4 * n // 16 + 4 + 48


def test_gradients_pass_through_the_packed_form():
    """Unscaled, that is: training is for the model that is not packed."""
    model, x = nn.Linear(12, 9).double(), torch.randn(4, 12, dtype=torch.float64)
    weights.apply(model, "weight", SharedArray(ratio=0.25, scaler="none"))
    model(x).square().sum().backward()
    wanted = model.parametrizations.weight.original.grad.clone()
    model.zero_grad()
    weights.pack(model)
    model(x).square().sum().backward()
    torch.testing.assert_close(model.parametrizations.weight.original.grad, wanted, rtol=1e-12, atol=1e-12)


# -- refusals


def refusal(model: nn.Module, part) -> str:
    before = repr(model)
    with pytest.raises(PartError) as caught:
        weights.apply(model, "*", part)
    assert "\n" not in str(caught.value)
    assert repr(model) == before
    return str(caught.value)


def test_refusals():
    layer = nn.Linear(10, 10)
    said = "the shared array of ratio 0.001 over 100 weights has 0 numbers; map=cyclic takes 1 to 2,038,074,742, for fewer than "
    assert refusal(layer, "stable_rps(ratio=0.001)") == said + "2,038,074,743 weights"
    assert refusal(layer, "stable_rps(ratio=0)") == "stable_rps: ratio and init must be above 0, got 0.0 and None"
    assert refusal(layer, "stable_rps(map=random)").startswith("stable_rps: map must be one of 'cyclic', 'roast', 'hashed', got ")
    mixed = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9).double())
    said = "the weights that share an array must be of one dtype and on one device; apply it to each kind alone"
    assert refusal(mixed, "stable_rps") == said
    zeros = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    nn.init.zeros_(zeros[1].weight)
    said = "a weight of shape (9, 9) has equal entries, so that its spread is 0; leave it out"
    assert refusal(zeros, "stable_rps") == said


def test_a_checkpoint_of_the_bench_holds_the_array_once(tmp_path):
    from gatework.bench import checkpoint

    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6))).double()
    weights.apply(model, "*", SharedArray(ratio=0.5))
    checkpoint.save(tmp_path / "m.safetensors", model.state_dict())
    size = 8 * 6 * 32 * 32 // 2
    assert (tmp_path / "m.safetensors").stat().st_size < 2 * size + 12_000  # The array and the scale of its gradient.
    other = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(6))).double()
    weights.apply(other, "*", SharedArray(ratio=0.5, seed=4))
    other.load_state_dict(checkpoint.load(tmp_path / "m.safetensors"))
    x = torch.randn(3, 32, dtype=torch.float64)
    assert torch.equal(other(x), model(x))
