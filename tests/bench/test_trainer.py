from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from gatework.bench import trainer, trial
from gatework.bench.store import Plan
from gatework.bench.study import define
from gatework.bench.tasks import make_task
from gatework.core import GateworkError, decay_groups
from gatework.core.contracts import No
from gatework.experts.mixer_moe import MixERLayer
from gatework.mixers import Attention
from gatework.models import Decoder

TASK = {"name": "text", "length": 16, "eval_tokens": 512}
FIT = {"d_ff": None, "tokens": 64 * 20}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "book.txt"
    text = b"".join(b"%d times %d is %d\n" % (i % 13, i % 7, (i % 13) * (i % 7)) for i in range(2000))
    path.write_bytes(text)
    return str(path)


def make(data, **settings):
    values = {
        "task": TASK,
        "data": data,
        "model": {"d_model": 16, "layers": 1, "heads": 2},
        "tokens": 64 * 20,
        "batch_size": 4,
        "match": "none",
        "variants": {"mlp": "feedforward=mlp"},
        "evaluations": 2,
    }
    study = define(values | settings)
    return study, make_task(**study.task)


def plan(variant="baseline", seed=3, phase="final", rate=0.02):
    return Plan(f"{phase}/{variant}/{seed}", variant, phase, seed, seed, rate)


def timeless(record):
    cost = {k: v for k, v in record["cost"].items() if k not in ("seconds", "tokens_per_second")}
    return record | {"cost": cost, "curve": [{k: v for k, v in point.items() if k != "seconds"} for point in record["curve"]]}


def by_hand(task, seed=3, steps=20, rate=0.02):
    """The same run, written out: AdamW with decay 0.1 on matrices, warm-up of 5%, cosine to a tenth, gradients clipped at 1."""
    torch.manual_seed(seed)
    model = Decoder(256, d_model=16, layers=1, heads=2, mixer="attention", feedforward="glu")
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.95), eps=1e-8
    )
    warmup, losses = math.ceil(0.05 * steps), []
    for step, (x, y) in zip(range(steps), task.batches(seed, 4), strict=False):
        done = (step - warmup) / (steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad.mul_(torch.clamp(1.0 / (norm + 1e-6), max=1.0))
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def test_a_run_equals_a_loop_written_by_hand(data):
    study, task = make(data)
    record = trial.run(study, task, plan(), FIT)
    model, losses = by_hand(task)
    assert record["status"] == "ok", record["error"]
    assert [point["step"] for point in record["curve"]] == list(range(1, 21))
    assert [point["train_loss"] for point in record["curve"]] == pytest.approx(losses, rel=1e-5)
    with torch.no_grad():
        test = task.evaluate(model.eval(), "test")
    assert record["test"]["loss"] == pytest.approx(test["loss"], rel=1e-5)
    assert record["score"] == record["test"]["loss"]


def test_what_a_record_says(data):
    study, task = make(data)
    record = trial.run(study, task, plan(), FIT)
    model, _ = by_hand(task, steps=2)
    parameters = sum(p.numel() for p in model.parameters())
    weights = parameters - 16 - 16 - 16  # Without the norms' gains.
    attention = 2 * 2 * 16 * sum(range(1, 17)) / 16  # Two products over the pairs that see each other; backward has five.
    cost = record["cost"]
    assert cost["parameters"] == cost["active_parameters"] == parameters
    assert cost["forward_flops_per_token"] == pytest.approx(2 * weights + attention)
    assert cost["train_flops_per_token"] == pytest.approx(6 * weights + attention * 7 / 2)
    assert cost["train_flops"] == pytest.approx(cost["train_flops_per_token"] * 64 * 20)
    assert cost["tokens"] == 64 * 20
    assert cost["tokens_per_second"] == pytest.approx(64 * 20 / cost["seconds"])
    assert cost["decode_state_bytes"] == 2 * 16 * 16 * 4
    assert cost["peak_bytes"] > 4 * 64 * 256  # The logits at least.
    assert [point["step"] for point in record["curve"] if point["validation_loss"] is not None] == [10, 20]
    assert record["curve"][-1]["tokens"] == 64 * 20
    assert record["validation"]["loss"] == record["curve"][-1]["validation_loss"]
    assert record["data_hash"] == task.data_hash
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["threads"] == 1
    assert record["config"]["variant"]["optim"] == "adamw"
    assert (record["key"], record["variant"], record["phase"], record["seed"]) == ("final/baseline/3", "baseline", "final", 3)


def test_what_parts_measure_is_kept_over_time(data):
    study, task = make(data, variants={"moe": "feedforward=moe(experts=4, capacity=1.0)"}, evaluations=1)
    record = trial.run(study, task, plan("moe"), FIT)
    assert record["status"] == "ok", record["error"]
    told = {point["step"]: point["metrics"] for point in record["curve"] if "metrics" in point}
    assert list(told) == [1, 4, 7, 10, 13, 16, 19, 20]  # Every third point of the curve, and the last.
    path = "depth.blocks.0.feedforward"
    names = {f"{path}.gate.{leaf}" for leaf in ("load", "entropy", "max_violation", "dead")} | {f"{path}.dropped"}
    for metrics in told.values():
        assert set(metrics) == names
        load = metrics[f"{path}.gate.load"]
        assert sum(load) == pytest.approx(1)
        assert metrics[f"{path}.gate.max_violation"] == pytest.approx(4 * max(load) - 1, abs=1e-5)
        assert 0 <= metrics[f"{path}.dropped"] < 1
    assert record["metrics"].keys() == names


def test_metrics_over_time_are_those_of_training(data):
    """Noise makes training's routing even; what a validation at the same step leaves behind is not noted."""
    noisy = {"moe": "feedforward=moe(experts=4, gate=noisy_topk)"}
    often, once = (trial.run(*make(data, variants=noisy, evaluations=n), plan("moe"), FIT)["curve"] for n in (20, 1))
    assert [p["metrics"] for p in often if "metrics" in p] == [p["metrics"] for p in once if "metrics" in p]


def test_the_same_key_gives_the_same_record(data):
    study, task = make(data, variants={"drawn": "mixer=attention(window=8)"})
    first = trial.run(study, task, plan("drawn"), FIT)
    torch.randn(100)
    assert timeless(trial.run(study, task, plan("drawn"), FIT)) == timeless(first)
    assert timeless(trial.run(study, task, plan("drawn", seed=4), FIT))["curve"] != timeless(first)["curve"]


def test_variants_share_data_and_start(data):
    study, task = make(data, variants={"window": "mixer=attention(window=16)"})
    # A window as long as the text changes nothing, so neither start nor data may differ.
    base, window = (trial.run(study, task, plan(name), FIT) for name in ("baseline", "window"))
    assert [p["train_loss"] for p in base["curve"]] == pytest.approx([p["train_loss"] for p in window["curve"]], rel=1e-4)


def test_tuning_is_scored_on_all_of_validation_and_never_sees_the_test(data):
    study, task = make(data)
    asked = []
    real = task.evaluate
    task.evaluate = lambda predict, split, batches=None: asked.append((split, batches)) or real(predict, split, batches)
    record = trial.run(study, task, plan(phase="tune"), FIT | {"tokens": 64 * 20})
    assert asked == [("validation", None)]
    assert record["test"] is None
    assert record["score"] == record["validation"]["loss"]
    assert record["config"]["tokens"] == study.tune_tokens
    asked.clear()
    trial.run(study, task, plan(), FIT)
    assert asked == [("validation", trial.CURVE_BATCHES)] * 2 + [("test", None)]


def test_a_tuning_budget_is_scaled_with_the_final_one(data):
    study, task = make(data, tokens=6400, tune_tokens=3200)
    record = trial.run(study, task, plan(phase="tune"), {"d_ff": None, "tokens": 3200})
    assert record["config"]["tokens"] == 1600


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_divergence(data, bad):
    study, task = make(data)
    real, calls = task.loss, []
    task.loss = lambda out, y: real(out, y) * (bad if calls.append(1) or len(calls) > 7 else 1.0)
    record = trial.run(study, task, plan(), FIT)
    assert record["status"] == "diverged"
    assert "training loss" in record["error"]
    assert (record["score"], record["test"], record["validation"]) == (None, None, {})
    assert len(record["curve"]) == 7


def test_a_huge_learning_rate_diverges_and_says_so(data):
    study, task = make(data, baseline="optim=adamw(weight_decay=10.0)")
    record = trial.run(study, task, plan(rate=1e12), FIT | {"tokens": 64 * 200})
    assert record["status"] == "diverged"
    assert record["score"] is None


def test_a_validation_that_is_no_number_is_divergence(data):
    study, task = make(data)
    task.evaluate = lambda *args: {"loss": math.nan}
    record = trial.run(study, task, plan(), FIT)
    assert record["status"] == "diverged"
    assert "validation loss" in record["error"]


def test_a_failure_is_a_result(data):
    study, task = make(data)

    def broken(out, y):
        raise RuntimeError("no luck today")

    task.loss = broken
    record = trial.run(study, task, plan(), FIT)
    assert record["status"] == "failed"
    assert record["error"] == "RuntimeError: no luck today"
    assert "broken" in record["traceback"]


def test_an_interruption_is_no_result(data):
    study, task = make(data)

    def interrupt(point):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(study, task, plan(), FIT, progress=interrupt)


def test_an_interrupted_trial_continues_bit_for_bit(data, tmp_path, monkeypatch):
    study, task = make(data)
    whole = trial.run(study, task, plan(), FIT)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", -1.0)
    seen = []

    def interrupt(point):
        seen.append(point["step"])
        if point["step"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(study, task, plan(), FIT, progress=interrupt, folder=tmp_path)
    kept = list((tmp_path / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["final-baseline-3.safetensors"]
    resumed = []
    record = trial.run(study, task, plan(), FIT, progress=lambda point: resumed.append(point["step"]), folder=tmp_path)
    assert resumed[0] == 13
    assert timeless(record) == timeless(whole)
    assert not kept[0].exists()


def test_a_checkpoint_of_another_run_or_a_broken_one_is_not_used(data, tmp_path, monkeypatch):
    study, task = make(data)
    whole = trial.run(study, task, plan(), FIT)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", -1.0)

    def stop(point):
        if point["step"] == 13:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trial.run(study, task, dataclasses.replace(plan(), learning_rate=0.01), FIT, progress=stop, folder=tmp_path)
    steps = []
    record = trial.run(study, task, plan(), FIT, progress=lambda point: steps.append(point["step"]), folder=tmp_path)
    assert steps[0] == 1
    assert timeless(record) == timeless(whole)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    (tmp_path / "checkpoints" / "final-baseline-3.safetensors").write_bytes(b"half a fi")
    assert timeless(trial.run(study, task, plan(), FIT, folder=tmp_path)) == timeless(whole)


def test_a_kept_model_reads_back(data, tmp_path):
    from gatework.bench.saved import evaluate, load_model

    study, task = make(data)
    record = trial.run(study, task, plan(), FIT, folder=tmp_path, save=True)
    path = tmp_path / "models" / "final-baseline-3.safetensors"
    assert evaluate(path)["loss"] == record["test"]["loss"]
    model, loaded, _ = load_model(path)
    assert loaded == study
    assert sum(p.numel() for p in model.parameters()) == record["cost"]["parameters"]


class OneLength(Attention):
    """Attention that says of itself that it runs at one length only."""

    capabilities = Attention.capabilities | {"any_length": No("it has a table of its length")}


def test_a_part_of_one_length_is_refused_where_longer_sequences_are_evaluated(data):
    study, task = make(data)
    variant = dataclasses.replace(study.resolved["mlp"], model=study.resolved["mlp"].model | {"mixer": OneLength})
    assert trainer.build_model(task, variant)
    _, longer = make(data, task=TASK | {"extrapolate": True})
    assert trainer.build_model(longer, study.resolved["mlp"])
    words = "variant 'mlp': extrapolate=true evaluates sequences longer than in training, which OneLength cannot run"
    with pytest.raises(GateworkError, match=rf"{words} \(no: it has a table of its length\)$"):
        trainer.build_model(longer, variant)


def test_longer_sequences_are_in_the_record_and_change_nothing_else(data):
    tasks = (TASK, TASK | {"extrapolate": True})
    one, several = (trial.run(*make(data, task=task), plan(), FIT)["test"] for task in tasks)
    assert set(several) - set(one) == {"loss_at_16", "loss_at_32", "loss_at_64"}
    assert {name: several[name] for name in one} == one


def test_decay_is_for_matrices(data):
    study, task = make(data)
    model = trainer.build_model(task, study.resolved["baseline"])
    learner = trainer.build_learner(model, task, study.resolved["baseline"], 0.1, 10)
    decays = {p: group["weight_decay"] for group in learner.optimizer.param_groups for p in group["params"]}
    assert set(decays) == set(model.parameters())
    assert {p.ndim >= 2 for p, decay in decays.items() if decay > 0} == {True}
    assert {p.ndim < 2 for p, decay in decays.items() if decay == 0} == {True}


def test_decay_spares_what_a_part_names():
    model = torch.nn.Sequential(MixERLayer(d_in=2, d_out=1, environments=3), torch.nn.Linear(1, 2))
    model[1].weight.requires_grad_(False)
    decayed, others = decay_groups(model)
    assert [p.ndim for p in others].count(2) == 1
    assert any(p is model[0].contexts for p in others)
    assert sorted(map(id, decayed + others)) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_classifier_is_trained_by_the_same_loop():
    study = define({"task": "digits", "variants": {"r": "activation=gelu"}, "tokens": 64 * 60, "tune_tokens": 640})
    task = make_task("digits")
    record = trial.run(study, task, plan(rate=5e-3), {"d_ff": None, "tokens": 64 * 60})
    assert record["status"] == "ok", record["error"]
    assert record["score"] == record["test"]["error"]
    assert record["score"] < 0.5
    assert record["cost"]["decode_state_bytes"] is None
