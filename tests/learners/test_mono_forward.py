from __future__ import annotations

import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from gatework.bench import checkpoint
from gatework.core import Part, PartError, build
from gatework.learners import Backprop, MonoForward
from gatework.models import Classifier, Decoder
from gatework.optim import AdaBelief, Cosine


class Penalised(Part):
    """A part that leaves a loss while it trains."""

    slot = "feedforward"

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d_in, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.linear(x))
        if self.training:
            self.losses = {"power": 0.1 * (y**2).mean()}
        return y


class Net(nn.Module):
    def __init__(self, widths=(5, 4, 7, 6), block=Penalised) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(widths[-1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def plain(a, b):
    return nn.Sequential(nn.Linear(a, b), nn.ReLU())


def net(widths=(5, 4, 7, 6), block=Penalised, seed=0):
    torch.manual_seed(seed)
    return Net(widths, block).double()


def batch(rows=6, seed=50, width=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), torch.randint(3, (rows,), generator=generator)


def learner(model, **options):
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    return MonoForward(model, nn.functional.cross_entropy, optimizer, **options)


def cross_entropy(logits, y):
    return (torch.logsumexp(logits, 1) - logits[torch.arange(len(y)), y]).mean()


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_estimate_is_the_gradient_of_each_block_s_own_loss():
    """Against the equations, block by block: every h_k is a constant for block k + 1."""
    model = net()
    rule = learner(model)
    x, y = batch()
    for _ in range(2):  # The second estimate starts from zero again.
        said = rule.estimate((x, y))
    h, expected = x, {"loss": None}
    for k, block in enumerate(model.blocks):
        weight, bias = block.linear.weight, block.linear.bias
        a = torch.clamp(h @ weight.T + bias, min=0)
        extra = 0.1 * (a**2).mean()
        top = [rule.projections[k]] if k < 2 else [model.head.weight, model.head.bias]
        logits = a @ top[0].T + (top[1] if k == 2 else 0)
        loss = cross_entropy(logits, y)
        wanted = torch.autograd.grad(loss + extra, [weight, bias, *top])
        for p, g in zip([weight, bias, *top], wanted, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12)
        expected |= {f"loss/{k}": loss.detach(), f"blocks.{k}.power": extra.detach()}
        h = a.detach()
    expected["loss"] = expected["loss/2"]
    assert list(said) == ["loss", "loss/0", "blocks.0.power", "loss/1", "blocks.1.power", "loss/2", "blocks.2.power"]
    for name, value in said.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
        assert not value.requires_grad


@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_with_one_block_it_is_backprop_on_the_block_and_its_projection(clip_norm):
    model, twin = net((5, 8)), net((5, 8))
    ours, plain = learner(model, clip_norm=clip_norm), None
    plain = Backprop(twin, nn.functional.cross_entropy, torch.optim.SGD(twin.parameters(), lr=0.1), clip_norm=clip_norm)
    for step in range(5):
        a, b = ours.step(batch(seed=step)), plain.step(batch(seed=step))
        assert torch.equal(a["loss"], b["loss"])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not ours.projections


def test_later_blocks_do_not_matter_to_earlier_ones():
    model, other = net(), net()
    with torch.no_grad():
        for p in [*other.blocks[1].parameters(), *other.blocks[2].parameters(), *other.head.parameters()]:
            p.mul_(-3).add_(1)
    rules = []
    for some in (model, other):
        torch.manual_seed(3)  # The same projections.
        rules.append(learner(some))
        rules[-1].estimate(batch())
    a, b = (grads(some) for some in (model, other))
    assert all(torch.equal(a[name], b[name]) for name in a if name.startswith("blocks.0"))
    assert not any(torch.equal(a[name], b[name]) for name in a if not name.startswith("blocks.0"))
    assert torch.equal(rules[0].projections[0].grad, rules[1].projections[0].grad)


def test_no_block_s_loss_reaches_another_block():
    """Only loss/k moves block k: with any other loss alone switched on, its gradient is that of a constant."""
    x, y = batch()
    for only in range(3):
        model = net(block=plain)
        calls = []

        def loss_fn(logits, target, only=only, calls=calls):
            calls.append(len(calls))
            return nn.functional.cross_entropy(logits, target) * (1.0 if calls[-1] == only else 0.0)

        rule = MonoForward(model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.1))
        rule.estimate((x, y))
        assert [any(p.grad.any() for p in block.parameters()) for block in model.blocks] == [k == only for k in range(3)]


def test_saved_bytes_do_not_grow_with_depth():
    """Most bytes that were saved for a backward pass at one time, parameters left out; back-propagation's grow."""

    def peak(cls, layers):
        model = Classifier((1, 16), classes=3, d_model=32, layers=layers).double()
        rule = cls(model, nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
        x = torch.randn(64, 1, 16, dtype=torch.float64)
        known = {p.untyped_storage()._cdata for p in model.parameters()}
        live, most = {}, [0]

        class Saved:
            def __init__(self, tensor):
                self.tensor, self.key = tensor, tensor.untyped_storage()._cdata
                if self.key not in known and self.key not in {p.untyped_storage()._cdata for p in getattr(rule, "projections", [])}:
                    live[id(self)] = (self.key, tensor.untyped_storage().nbytes())
                    weakref.finalize(self, live.pop, id(self))
                    most[0] = max(most[0], sum(dict(live.values()).values()))

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            rule.estimate((x, torch.randint(3, (64,))))
        return most[0]

    ours = {layers: peak(MonoForward, layers) for layers in (2, 3, 6, 12)}
    theirs = {layers: peak(Backprop, layers) for layers in (2, 3, 6, 12)}
    assert ours[3] == ours[6] == ours[12] > 0
    assert theirs[2] < theirs[3] < theirs[6] < theirs[12]
    assert all(ours[layers] < theirs[layers] for layers in (3, 6, 12))


def test_predictions():
    """The last projection alone is the model; the sum is over all projections."""
    model = net(block=plain)
    rule = learner(model, prediction="sum")
    x, y = batch()
    torch.testing.assert_close(rule.predict(x), model(x))  # Nothing has been projected yet.
    rule.step((x, y))
    a = torch.relu(model.blocks[0][0](x))
    b = torch.relu(model.blocks[1][0](a))
    total = a @ rule.projections[0].T + b @ rule.projections[1].T + model(x)
    torch.testing.assert_close(rule.predict(x), total, rtol=1e-10, atol=1e-12)
    rule.prediction = "last"
    assert torch.equal(rule.predict(x), model(x).detach())
    assert not any(block._forward_hooks for block in model.blocks)


def test_projections_join_the_optimizer_and_are_linear_s():
    model = net(block=plain)
    optimizer = AdaBelief([{"params": [p for p in model.parameters() if p.dim() > 1], "lr": 0.05}, {"params": model.head.bias}])
    rule = learner(model, optimizer=optimizer, schedule=Cosine(optimizer, total_steps=9), total_steps=9)
    rule.estimate(batch())
    assert [tuple(p.shape) for p in rule.projections] == [(3, 4), (3, 7)]
    assert all(any(p is q for q in optimizer.param_groups[0]["params"]) for p in rule.projections)
    for p, width in zip(rule.projections, (4, 7), strict=True):
        assert p.dtype == torch.float64
        assert 0.5 * width**-0.5 < p.abs().max() <= width**-0.5
    before = [p.detach().clone() for p in rule.projections]
    rule.step(batch())
    assert not any(torch.equal(p, b) for p, b in zip(rule.projections, before, strict=True))
    assert len(optimizer.param_groups[0]["params"]) == 6, "projections are made once"


def test_the_first_batch_draws_nothing_that_training_sees():
    model = net(block=plain)
    rule = learner(model)
    torch.manual_seed(5)
    rule.estimate(batch())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_each_block_is_clipped_alone():
    model, free = net(block=plain), net(block=plain)
    rules = []
    for some, clip_norm in ((model, 0.05), (free, None)):
        torch.manual_seed(3)
        rules.append(learner(some, clip_norm=clip_norm))
        rules[-1].estimate(batch())
        rules[-1].clip()
    for k in range(3):
        norms = []
        for some, rule in zip((model, free), rules, strict=True):
            last = [rule.projections[k]] if k < 2 else list(some.head.parameters())
            norms.append(torch.cat([p.grad.flatten() for p in (*some.blocks[k].parameters(), *last)]).norm().item())
        assert norms[1] > 0.05
        assert norms[0] == pytest.approx(0.05, rel=1e-4)


@pytest.mark.parametrize("prediction", ["last", "sum"])
def test_resumes_bit_for_bit_from_a_checkpoint(prediction, tmp_path):
    def rule(seed):
        model = net(seed=seed)
        optimizer = AdaBelief(model.parameters(), lr=0.02, amsgrad=True)
        schedule = Cosine(optimizer, total_steps=12)
        return learner(model, optimizer=optimizer, schedule=schedule, total_steps=12, clip_norm=0.5, prediction=prediction)

    for done in (0, 5):
        first = rule(0)
        for step in range(done):
            first.step(batch(seed=step))
        checkpoint.save(tmp_path / f"{done}.safetensors", first.state_dict())
        second = rule(1)
        second.load_state_dict(checkpoint.load(tmp_path / f"{done}.safetensors"))
        for step in range(done, 12):
            ours, theirs = first.step(batch(seed=step)), second.step(batch(seed=step))
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q in zip(first.projections, second.projections, strict=True))
        assert torch.equal(first.predict(batch()[0]), second.predict(batch()[0]))


@pytest.mark.parametrize(
    "arguments",
    [
        {"backbone": "mlp", "feedforward": "glu", "layers": 3},
        {"backbone": "convnet", "layers": 3},
        {"backbone": "vit", "layers": 2, "heads": 2, "d_model": 16},
    ],
    ids=lambda arguments: arguments["backbone"],
)
def test_learns_with_every_backbone(arguments):
    torch.manual_seed(0)
    model = Classifier((1, 8, 8), classes=2, **{"d_model": 16} | arguments)
    optimizer = build("adamw", "optim", params=model.parameters(), lr=0.01)
    rule = build("mono_forward", "learner", model=model, loss_fn=nn.functional.cross_entropy, optimizer=optimizer, total_steps=40)
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0, :4].sum((1, 2)) > 0).long()
    first = rule.step((x, y))
    for _ in range(39):
        last = rule.step((x, y))
    for name, value in last.items():
        if name.startswith("loss"):
            assert value < 0.6 * first[name], name
    assert (rule.predict(x).argmax(1) == y).float().mean() > 0.9


def test_learns_a_sequence_with_a_decoder():
    """A label per token: the projections see the features of each token."""
    torch.manual_seed(0)
    model = Decoder(8, d_model=16, layers=2, heads=2)

    def loss_fn(output, y):
        return nn.functional.cross_entropy(output.flatten(0, 1), y.flatten())

    rule = MonoForward(model, loss_fn, AdaBelief(model.parameters(), lr=0.01), total_steps=100, clip_norm=1.0)
    tokens = torch.arange(17).remainder(7).repeat(2, 1)
    seen = [rule.step((tokens[:, :-1], tokens[:, 1:]))["loss"].item() for _ in range(100)]
    assert seen[-1] < 0.2 < 1.5 < seen[0]
    assert [tuple(p.shape) for p in rule.projections] == [(8, 16)]


def test_a_model_that_does_not_run_its_blocks_in_order_is_refused():
    class Backwards(Net):
        def forward(self, x):
            return self.head(self.blocks[0](self.blocks[1](x)))

    class Skips(Net):
        def forward(self, x):
            return self.head(self.blocks[1](x))

    class Twice(Net):
        def forward(self, x):
            return self.head(self.blocks[1](self.blocks[0](self.blocks[0](x))))

    for cls in (Backwards, Skips, Twice):
        model = cls((4, 4, 4)).double()
        with pytest.raises(PartError, match="mono_forward needs a model that runs each of its blocks once, first to last"):
            learner(model).estimate(batch(width=4))
        assert not any(block._forward_hooks for block in model.blocks)


def test_wrong_models_and_values_are_refused():
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="MonoForward needs a model with 'blocks', which Linear has not"):
        MonoForward(nn.Linear(2, 2), nn.functional.cross_entropy, sgd)
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        learner(model, total_steps=0)
    with pytest.raises(PartError, match="prediction must be one of 'last', 'sum', got 'first'"):
        build("mono_forward(prediction=first)", "learner", model=model, loss_fn=nn.functional.cross_entropy, optimizer=sgd)
    with pytest.raises(PartError, match=r"a block's output of shape \(6, 4\) has no activities beyond the target's 2 axes"):
        learner(model).estimate((batch()[0], torch.zeros(6, 3, dtype=torch.long)))
    model.head = nn.Sequential(model.head)
    with pytest.raises(ValueError, match="MonoForward needs a linear head, not Sequential"):
        learner(model)
