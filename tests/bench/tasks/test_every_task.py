"""What every task keeps."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from gatework.bench.tasks import TASKS, make_task
from gatework.bench.tasks.base import RegressionTask
from gatework.core import GateworkError
from gatework.models import BACKBONES

from .made import take, task

NAMES = [
    "text", "digits", "mnist1d", "recall", "click_through", "image_regression", "multitask_regression", "multitask_digits",
    "federated_digits", "mixture_regression", "dynamical_systems", "ranking", "selective_copy", "listops", "parity", "s5_words",
    "pvr", "masked_digits", "in_context_ar", "pfn_gp", "reversal",
    "graph_algorithms",
]
SCORES = {
    "text": "loss", "click_through": "auc_error", "image_regression": "mse", "multitask_regression": "mse",
    "mixture_regression": "excess", "dynamical_systems": "mse", "ranking": "auc_error", "pvr": "generalisation_error",
    "masked_digits": "mse", "in_context_ar": "relative_mse", "pfn_gp": "gap", "reversal": "mrr_error",
    "graph_algorithms": "trace_error",
}


def uniform(made):
    """A model that knows nothing."""
    if made.backbone == "decoder":
        return lambda x: torch.zeros(*x.shape, made.model_arguments()["vocab_size"])
    if made.backbone in ("click_through", "ranker"):
        return lambda x: torch.zeros(len(x))
    if made.backbone == "mixture":
        return lambda x: torch.zeros(len(x), 3, 1)  # A standard normal distribution.
    if made.backbone == "sequence_regressor":
        return lambda x: torch.zeros(*x.shape[:2], made.model_arguments()["outputs"])
    if made.backbone == "pfn":
        return lambda x: torch.zeros(len(x), int((x[0, :, -1] == 0).sum()), made.distribution.bars)
    if made.backbone == "entities":
        return lambda x: torch.full((len(x), made.entities), -math.log(made.entities))
    if made.backbone == "graph_processor":
        return lambda x: torch.zeros(len(x), x.shape[1] - 1, x.shape[1], 1)
    if isinstance(made, RegressionTask):
        return lambda x: torch.zeros(len(x), made.splits["train"][1].shape[1])
    if made.backbone == "multitask":
        return lambda x: torch.zeros(len(x), sum(made.model_arguments()["outputs"]))
    return lambda x: torch.zeros(len(x), made.model_arguments()["classes"])


def chance(made, y):
    """The loss on targets ``y`` of a model that knows nothing."""
    if isinstance(made, RegressionTask):
        return y.square().mean().item()
    if made.backbone == "multitask":
        return sum(math.log(classes) for classes in made.model_arguments()["outputs"]) / y.shape[1]
    if made.backbone in ("click_through", "ranker", "graph_processor"):
        return math.log(2)
    if made.backbone == "mixture":
        return (y.double().square().mean().item() + math.log(2 * math.pi)) / 2
    if made.backbone == "sequence_regressor":
        return y[:, 1:].square().mean().item()
    if made.backbone == "pfn":  # Of a split, the mean over the sizes of the context.
        asked = [y[:, m:] for m in made.contexts] if y.shape[1] == made.points else [y]
        return -sum(made.distribution(torch.zeros(*y.shape, made.distribution.bars), y).mean().item() for y in asked) / len(asked)
    if made.backbone == "entities":
        return math.log(made.entities)
    return math.log(made.model_arguments().get("vocab_size") or made.model_arguments()["classes"])


def smallest(made):
    """A small model for the task."""
    tied = made.defaults["model"].get("tie_embeddings", True)
    sizes = {
        "decoder": {"layers": 1, "heads": 1, "tie_embeddings": tied}, "classifier": {"backbone": "mlp", "layers": 1},
        "entities": {"level": "concept"},
    }
    if isinstance(made, RegressionTask):
        return BACKBONES[made.backbone](**made.model_arguments(), d_ff=8)
    if made.backbone == "mixture":
        model = BACKBONES[made.backbone](**made.model_arguments())
        torch.nn.init.zeros_(model.slope)
        torch.nn.init.zeros_(model.intercept)
        return model
    model = BACKBONES[made.backbone](**made.model_arguments(), d_model=8, **sizes.get(made.backbone, {}))
    if made.backbone == "decoder" and not tied:
        torch.nn.init.zeros_(model.head.weight)  # With few ids a random head is far from chance.
    if made.backbone == "sequence_regressor":
        torch.nn.init.zeros_(model.head.weight)
    if made.backbone == "graph_processor":
        torch.nn.init.zeros_(model.decode.weight)
    return model


def test_every_task_is_tested():
    assert sorted(TASKS) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_batches_are_a_function_of_the_seed(name):
    made = task(name)
    first, again, other = take(made, 3, 8, 4), take(made, 3, 8, 4), take(made, 4, 8, 4)
    for (x, y), (x2, y2), (x3, _) in zip(first, again, other, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert not torch.equal(x, x3)
    assert not torch.equal(first[0][0], first[1][0])
    state = torch.get_rng_state()
    take(made, 3, 8, 2)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_built_from_its_arguments_fits_and_is_scored(name):
    made = task(name)
    torch.manual_seed(0)
    model = smallest(made)
    ((x, y),) = take(made, 0, 4, 1)
    loss = made.loss(model(x), y)
    loss.backward()
    assert loss.ndim == 0
    assert loss.item() == pytest.approx(chance(made, y), rel=0.3)
    with torch.no_grad():
        model.eval()
        scores = made.evaluate(model, "validation", max_batches=1)
        assert scores == made.evaluate(model, "validation", max_batches=1)
    assert {"loss", made.score_name} <= set(scores)
    assert all(isinstance(value, float) for value in scores.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_knows_nothing_scores_chance(name):
    made = task(name)
    for split in ("validation", "test"):
        scores = made.evaluate(uniform(made), split)
        assert scores["loss"] == pytest.approx(chance(made, made.splits[split][1] if hasattr(made, "splits") else None), rel=1e-5)
        if "error" in scores:
            assert scores["error"] == pytest.approx(1 - scores["accuracy"])


@pytest.mark.parametrize("name", NAMES)
def test_units_are_counted_and_the_hash_is_of_the_data(name):
    made = task(name)
    ((x, _),) = take(made, 0, 5, 1)
    assert made.units_per_batch(5) == (x.shape[:2].numel() if made.unit == "token" else len(x))
    assert (made.score_name, made.lower_is_better) == (SCORES.get(name, "error"), True)
    if name != "mnist1d":  # Seconds to make; its own test makes it twice.
        assert make_task(name).data_hash == made.data_hash
    assert len({task(other).data_hash for other in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("txet", {}, "no task 'txet'; did you mean 'text'?"),
        ("text", {"lenght": 3}, "the task text has no option 'lenght'; did you mean 'length'?"),
        ("mnist1d", {"length": 3}, "the task mnist1d has no option 'length'; it has none"),
        ("text", {"length": "12"}, "the task text: length must be a whole number, got '12'"),
        ("text", {"data": 3}, "the task text: data must be a word or None, got 3"),
        ("text", {"length": 1}, "length must be at least 2 bytes, got 1"),
        ("text", {"eval_tokens": 5}, "eval_tokens 5 is less than one window of 128"),
        ("recall", {"vocab_size": 31}, "vocab_size 31 and length 64 must be even"),
        ("recall", {"pairs": 17}, "17 pairs need a length of at least 68, got 64"),
        ("recall", {"pairs": 16, "vocab_size": 32}, "16 pairs need a vocabulary of at least 34, got 32"),
        ("recall", {"pairs": 0}, "pairs must be at least 1, got 0"),
        ("recall", {"alpha": 0.0}, "alpha must be positive and at most 10, got 0.0"),
        ("recall", {"alpha": math.nan}, "alpha must be positive and at most 10, got nan"),
        ("recall", {"alpha": 1e9}, "alpha must be positive and at most 10, got 1000000000.0"),
        ("dynamical_systems", {"families": 5}, "families is 1 to 4, systems and trajectories at least 1, got 5, 8 and 4"),
        ("image_regression", {"side": 9}, "an even side of at least 8 and squares of 1 to side / 2, got 9 and 6"),
        ("federated_digits", {"count": 1}, "count must be between 2 and 20 clients and alpha at least 0.05, got 1 and 0.4"),
        ("federated_digits", {"alpha": 0.0}, "got 8 and 0.0"),
        ("mixture_regression", {"experts": 0}, "inputs and experts must be at least 1, got 2 and 0"),
        ("ranking", {"history": 1}, "items, queries, types and history must be at least 2, got 200, 20, 4, 1"),
        ("ranking", {"effect": 0.0}, "examples must be at least 100 and effect positive, got 60000 and 0.0"),
        ("click_through", {"fields": 5}, "fields must be even and at least 4, values even and at least 2, got 5 and 100"),
        ("click_through", {"values": 0}, "got 12 and 0"),
        ("click_through", {"effect": 0.0}, "examples must be at least 100 and effect positive, got 20000 and 0.0"),
    ],
)
def test_wrong_names_and_options_are_refused_in_one_sentence(name, options, sentence):
    with pytest.raises(GateworkError, match=sentence) as caught:
        make_task(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("digits", "sklearn.datasets"),
        ("multitask_digits", "sklearn.datasets"),
        ("masked_digits", "sklearn.datasets"),
        ("federated_digits", "sklearn.datasets"),
        ("mnist1d", "mnist1d.data"),
        ("click_through", "sklearn.metrics"),
        ("ranking", "sklearn.metrics"),
    ],
)
def test_a_missing_extra_is_named_with_its_installation(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(GateworkError, match=r'pip install "gatework\[bench\]"'):
        make_task(name)


@pytest.mark.parametrize(
    ("name", "sizes", "shape"), [("digits", (1077, 360, 360), (1, 8, 8)), ("mnist1d", (3200, 800, 1000), (1, 40))]
)
def test_splits_of_the_classification_tasks(name, sizes, shape):
    made = task(name)
    splits = [made.splits[part] for part in ("train", "validation", "test")]
    assert tuple(len(x) for x, _ in splits) == sizes
    assert made.model_arguments() == {"input_shape": shape, "classes": 10}
    rows = [row.numpy().tobytes() for x, _ in splits for row in x]
    assert len(set(rows)) >= len(rows) - 5  # No example stands in two splits.
    for x, y in splits:
        assert x.dtype == torch.float32
        assert tuple(x.shape[1:]) == shape
        counts = y.bincount(minlength=10) / len(y)
        assert counts.min() > 0.07
        assert counts.max() < 0.13
