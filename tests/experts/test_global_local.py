"""A frozen classifier, its local expert and the gate, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gatework.core import PartError, losses, metrics
from gatework.core.cost import count_flops
from gatework.experts import GlobalLocal
from gatework.models import Classifier

CLASSES = 4


def points(n: int = 60, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def truth(x):
    """What the global expert is trained for."""
    return x[:, 0, :CLASSES].argmax(1)


def trained(backbone="mlp") -> nn.Module:
    torch.manual_seed(0)
    model = Classifier((1, 6), CLASSES, backbone=backbone, d_model=16).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = points(400, seed=7)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), truth(x)).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def model():
    return trained()


def custom(model, **settings) -> GlobalLocal:
    torch.manual_seed(1)
    made = GlobalLocal(copy.deepcopy(model), **({"local": 8, "hidden": 5} | settings)).double()
    with torch.no_grad():
        made.gate[2].weight *= 8  # Both sides of the threshold.
    return made


def row(made, x):
    """One example by the equations: logits, phi, r, the local expert's logits."""
    phi = x[None]
    for block in made.model.blocks:
        phi = block(phi)
    phi = phi[0]
    r = torch.sigmoid(made.gate[2].weight[0] @ torch.relu(made.gate[0].weight @ phi + made.gate[0].bias) + made.gate[2].bias[0])
    local = made.local[2].weight @ torch.relu(made.local[0].weight @ phi + made.local[0].bias) + made.local[2].bias
    return made.model.head(phi), r, local


def test_each_row_is_one_expert_s_and_only_the_local_one_has_gradients(model):
    made, x = custom(model), points().requires_grad_()
    y = made(x)
    rows = [row(made, point) for point in x.detach()]
    chosen = [bool(r > 0.5) for _, r, _ in rows]
    assert 5 < sum(chosen) < 55
    expected = torch.stack([local if c else logits for (logits, _, local), c in zip(rows, chosen, strict=True)])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    assert metrics(made)["local_share"].item() == pytest.approx(sum(chosen) / 60)
    weights = torch.randn_like(y)
    mine = list(made.local.parameters())
    ours = torch.autograd.grad((y * weights).sum(), mine)
    wanted = torch.autograd.grad((expected * weights).sum(), mine)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert not any(p.requires_grad for p in made.model.parameters())


def test_the_losses_are_those_of_the_equations(model):
    made, x = custom(model).train(), points()
    labels = (truth(x) + (torch.arange(60) % 3 == 0)) % CLASSES
    user = torch.arange(60) % 2 == 0
    made(x, labels, user)
    said = losses(made)
    local_sum, gate_terms = 0.0, []
    for n, (logits, r, local) in enumerate(row(made, point) for point in x):
        right, local_right = logits.argmax() == labels[n], local.argmax() == labels[n]
        if user[n]:
            local_sum = local_sum - (0.2 if right else 1.0) * torch.log_softmax(local, 0)[labels[n]]
        if right:
            gate_terms.append(-torch.log(1 - r))
        elif local_right:
            gate_terms.append(-torch.log(r))
    assert 10 < len(gate_terms) < 60
    expected = {"local": local_sum / int(user.sum()), "gate": sum(gate_terms) / len(gate_terms)}
    wanted = [*made.local.parameters(), *made.gate.parameters()]
    for name, value in expected.items():
        torch.testing.assert_close(said[name], value, rtol=0, atol=1e-12)
        ours = torch.autograd.grad(said[name], wanted, materialize_grads=True)
        for got, want in zip(ours, torch.autograd.grad(value, wanted, materialize_grads=True), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    made(x)
    made.eval()(x, labels)
    assert not losses(made)


def test_extreme_thresholds_leave_one_expert(model):
    x = points()
    assert torch.equal(custom(model, threshold=1.0)(x), model(x))
    low = custom(model, threshold=-0.1)
    torch.testing.assert_close(low(x), low.local(low.features(x)[1]), rtol=0, atol=0)


def test_the_local_expert_is_run_for_its_rows_only(model):
    x = points()
    made = custom(model).eval()
    with torch.no_grad():
        share = int((made.gate_values(made.features(x)[1]) > 0.5).sum())
        with count_flops() as alone:
            made.model(x)
        with count_flops() as count:
            made(x)
    gate, local = 2 * (16 * 5 + 5), 2 * (16 * 8 + 8 * CLASSES)
    assert count.total - alone.total == 60 * gate + share * local
    small = (16 * 8 + 8 + 8 * CLASSES + CLASSES) + (16 * 5 + 5 + 5 + 1)
    report = made.overhead(x)
    assert report.parameters == pytest.approx(small / sum(p.numel() for p in model.parameters()))
    assert report.flops == pytest.approx((60 * gate + share * local) / alone.total)
    made.threshold.fill_(1.0)
    assert made.overhead(x).flops == pytest.approx(60 * gate / alone.total)


def test_customisation_serves_the_user_and_keeps_the_model(model):
    """The user swaps two classes where the fifth coordinate is large."""
    def data(n, seed, mine):
        x = points(n, seed)
        if mine:
            x[:, 0, 4] += 7
            labels = truth(x)
            return x, torch.where(labels < 2, 1 - labels, labels)
        x[:, 0, 4] -= 2
        return x, truth(x)

    made = custom(model, threshold=0.5).train()
    before = copy.deepcopy(made.model.state_dict())
    made.customise(data(200, 1, True), data(200, 2, False), steps=200)
    torch.testing.assert_close(dict(made.model.state_dict()), dict(before), rtol=0, atol=0)
    user, generic = data(300, 3, True), data(300, 4, False)
    x, labels = (torch.cat(pair) for pair in zip(user, generic, strict=True))
    held = made.choose_threshold(x, labels)
    made.eval()

    def share(expert, xs, ys):
        return (expert(xs).argmax(1) == ys).double().mean().item()

    assert share(made, x, labels) == pytest.approx(held)
    for xs, ys in (user, generic):
        logits, phi = made.features(xs)
        oracle = ((logits.argmax(1) == ys) | (made.local(phi).argmax(1) == ys)).double().mean().item()
        assert share(made, xs, ys) <= oracle
    assert share(made, *user) > share(made.model, *user) + 0.3
    assert share(made, *generic) > share(made.model, *generic) - 0.02
    best = max(share(custom_at(made, t), x, labels) for t in torch.linspace(-0.01, 1, 203).tolist())
    assert held >= best


def custom_at(made, threshold):
    other = copy.deepcopy(made)
    other.threshold.fill_(threshold)
    return other


def test_of_equal_thresholds_the_highest_wins(model):
    made, x = custom(model), points()
    logits, phi = made.features(x)
    made.local[2].weight.data.zero_()
    made.local[2].bias.data = torch.tensor([0.0, 0, 0, 1], dtype=torch.float64)
    made.choose_threshold(x, logits.argmax(1))  # The model is always right.
    assert made.threshold.item() == 1.0
    made.choose_threshold(x, torch.full((60,), 3))  # The local expert is: below every value, but not above.
    assert made.threshold < made.gate_values(phi).min()
    assert "threshold" in made.state_dict()


def test_batch_norms_stay_as_they_were():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    made = GlobalLocal(model, head="2")
    state = copy.deepcopy(model.state_dict())
    made.train()(points() + 5, torch.zeros(60, dtype=torch.long))
    assert not model.training
    assert made.local.training
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_no_rows_and_wrong_input(model):
    made = custom(model)
    assert made(points()[:0]).shape == (0, CLASSES)
    with pytest.raises(PartError, match="there is nothing at 'tail'"):
        GlobalLocal(model, head="tail")
    with pytest.raises(PartError, match=r"there is a Sequential at '_blocks\.0'"):
        GlobalLocal(trained(), head="_blocks.0")
    with pytest.raises(PartError, match="once per call"):
        GlobalLocal(nn.Sequential(nn.Linear(6, 3)), head="0")(torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match="at least 1, got 0 and 5"):
        custom(model, local=0)
    x = points()
    with pytest.raises(ValueError, match="replay has 0 inputs and 0 labels"):
        made.customise((x, truth(x)), (x[:0], truth(x)[:0]))
    with pytest.raises(ValueError, match="user has 60 inputs and 59 labels"):
        made.customise((x, truth(x)[1:]), (x, truth(x)))
    with pytest.raises(ValueError, match="the mixture has 60 inputs and 59 labels"):
        made.choose_threshold(x, truth(x)[1:])
    with pytest.raises(ValueError, match="the mixture has 0 inputs"):
        made.choose_threshold(x[:0], truth(x)[:0])
    with pytest.raises(PartError, match=r"one label per input, shape \(60,\), not \(59,\)"):
        made(x, truth(x)[1:])
    with pytest.raises(PartError, match=r"user has one boolean per input, shape \(60,\), not \(59,\) of torch.bool"):
        made(x, user=truth(x)[1:] == 0)
    with pytest.raises(ValueError, match="steps and batch_size"):
        made.customise((x, truth(x)), (x, truth(x)), steps=0)
