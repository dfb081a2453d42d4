from __future__ import annotations

import lzma
import math
import re
import sys
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import gatework
from gatework.bench.tasks import TASKS, make_task
from gatework.bench.tasks.base import RegressionTask
from gatework.bench.tasks.recall import IGNORE
from gatework.core import GateworkError
from gatework.models import BACKBONES

NAMES = [
    "text", "digits", "mnist1d", "recall", "click_through", "image_regression", "multitask_regression", "multitask_digits",
    "federated_digits", "mixture_regression", "dynamical_systems", "ranking",
]
SCORES = {
    "text": "loss", "click_through": "auc_error", "image_regression": "mse", "multitask_regression": "mse",
    "mixture_regression": "excess", "dynamical_systems": "mse", "ranking": "auc_error",
}
_made = {}


def task(name):
    if name not in _made:
        _made[name] = make_task(name)
    return _made[name]


def take(made, seed, batch_size, count):
    return list(islice(made.batches(seed, batch_size), count))


def uniform(made):
    """A model that knows nothing."""
    if made.backbone == "decoder":
        return lambda x: torch.zeros(*x.shape, made.model_arguments()["vocab_size"])
    if made.backbone in ("click_through", "ranker"):
        return lambda x: torch.zeros(len(x))
    if made.backbone == "mixture":
        return lambda x: torch.zeros(len(x), 3, 1)  # A standard normal distribution.
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
    if made.backbone in ("click_through", "ranker"):
        return math.log(2)
    if made.backbone == "mixture":
        return (y.double().square().mean().item() + math.log(2 * math.pi)) / 2
    return math.log(made.model_arguments().get("vocab_size") or made.model_arguments()["classes"])


def smallest(made):
    """A small model for the task."""
    sizes = {"decoder": {"layers": 1, "heads": 1}, "classifier": {"backbone": "mlp", "layers": 1}}
    if isinstance(made, RegressionTask):
        return BACKBONES[made.backbone](**made.model_arguments(), d_ff=8)
    if made.backbone == "mixture":
        model = BACKBONES[made.backbone](**made.model_arguments())
        torch.nn.init.zeros_(model.slope)
        torch.nn.init.zeros_(model.intercept)
        return model
    return BACKBONES[made.backbone](**made.model_arguments(), d_model=8, **sizes.get(made.backbone, {}))


# Every task


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
    assert made.units_per_batch(5) == (x.numel() if made.unit == "token" else len(x))
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
        ("recall", {"pairs": 0}, "0 pairs need"),
        ("recall", {"alpha": 0.0}, "alpha must be positive, got 0.0"),
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


# text


def test_the_bundled_text_is_split_contiguously():
    made = task("text")
    raw = lzma.decompress((Path(gatework.__file__).parent / "data" / "shakespeare.txt.xz").read_bytes())
    parts = [made.splits[name].numpy().tobytes() for name in ("train", "validation", "test")]
    assert b"".join(parts) == raw
    assert [round(len(part) / len(raw), 3) for part in parts] == [0.9, 0.05, 0.05]
    assert b"HAMLET" in raw.upper()


def test_windows_are_inputs_and_the_bytes_that_follow(tmp_path):
    file = tmp_path / "counting.bin"
    file.write_bytes(bytes(i % 251 for i in range(5000)))  # Every byte's successor is known; 0x00 and 0xFA are bytes too.
    made = make_task("text", data=str(file), length=16, eval_tokens=64)
    for x, y in take(made, 0, 32, 20):
        assert x.shape == y.shape == (32, 16)
        assert x.dtype == y.dtype == torch.long
        assert torch.equal(y, (x + 1) % 251)
    seen = []

    def oracle(x):
        seen.append(x)
        return torch.nn.functional.one_hot((x + 1) % 251, 256).float() * 50

    scores = made.evaluate(oracle, "test")
    assert scores["loss"] < 1e-3
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] / math.log(2))
    assert torch.cat(seen).shape == (4, 16)


def test_training_windows_reach_both_ends_and_stay_inside(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(200)))  # 180 train, 10 validate, 10 test: every byte tells its place.
    made = make_task("text", data=str(file), length=4, eval_tokens=8)
    starts = torch.cat([x[:, 0] for x, _ in take(made, 0, 64, 100)])
    ends = torch.cat([y[:, -1] for _, y in take(made, 0, 64, 100)])
    assert (starts.min(), ends.max()) == (0, 179)
    assert len(starts.unique()) == 176


@pytest.mark.parametrize("max_batches", [None, 1])
def test_evaluation_windows_are_evenly_spaced_over_the_split_and_do_not_overlap(max_batches):
    made = make_task("text", length=64, eval_tokens=6400)
    seen = []
    made.evaluate(lambda x: seen.append(x) or torch.zeros(*x.shape, 256), "validation", max_batches)
    windows, split = torch.cat(seen), made.splits["validation"]
    count = 100 if max_batches is None else 32
    starts = [math.floor(i * (len(split) - 65) / (count - 1)) for i in range(count)]
    assert len(windows) == count
    for window, start in zip(windows, starts, strict=True):
        assert torch.equal(window, split[start : start + 64].long())
    assert min(b - a for a, b in pairwise(starts)) > 64
    assert torch.equal(windows[0], split[:64].long())
    assert torch.equal(windows[-1], split[-65:-1].long())


def test_a_short_split_is_evaluated_whole_without_overlap(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(range(240)))
    made = make_task("text", data=str(file), length=4, eval_tokens=10_000)
    seen = []
    made.evaluate(lambda x: seen.append(x) or torch.zeros(*x.shape, 256), "test")
    assert torch.cat(seen).tolist() == [[228, 229, 230, 231], [235, 236, 237, 238]]


def test_loss_is_the_cross_entropy_in_nats():
    made = task("text")
    logits = torch.randn(2, 3, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([[1, 2, 3], [4, 5, 255]])
    expected = -sum(math.log(math.exp(logits[i, j, y[i, j]]) / logits[i, j].exp().sum()) for i in range(2) for j in range(3)) / 6
    assert made.loss(logits, y).item() == pytest.approx(expected, rel=1e-5)


def test_any_bytes_are_a_text(tmp_path):
    file = tmp_path / "random.bin"
    file.write_bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes())
    made = make_task("text", data=str(file), length=32, eval_tokens=64)
    assert made.splits["train"].unique().numel() == 256
    assert made.model_arguments() == {"vocab_size": 256}


def test_the_hash_tells_files_apart(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    a.write_bytes(b"x" * 4000)
    b.write_bytes(b"x" * 3999 + b"y")
    c.write_bytes(b"x" * 4000)
    hashes = [make_task("text", data=str(path), length=32, eval_tokens=64).data_hash for path in (a, b, c)]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no data file '.*file'"),
        ("folder", "'.*file' is not a file; give the path of one file"),
        (b"", "the data file '.*file' is empty"),
        (b"x" * 2000, r".*file has 2000 bytes, too short for windows of 128: at least \d+ are needed"),
    ],
    ids=["missing", "folder", "empty", "short"],
)
def test_files_that_do_not_serve_are_refused_in_one_sentence(content, sentence, tmp_path):
    path = tmp_path / "file"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(GateworkError, match=sentence) as caught:
        make_task("text", data=str(path))
    assert "\n" not in str(caught.value)


def test_the_size_that_is_asked_for_is_enough(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    with pytest.raises(GateworkError) as caught:
        make_task("text", data=str(path))
    path.write_bytes(b"x" * int(re.search(r"at least (\d+)", str(caught.value))[1]))
    assert make_task("text", data=str(path), eval_tokens=128).evaluate(uniform(task("text")), "test")["loss"] > 5


@pytest.mark.parametrize("call", ["exists", "read_bytes"])
def test_an_unreadable_file_is_refused_in_one_sentence(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4000)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(GateworkError, match=r"the data file '.*file' cannot be read: Permission denied"):
        make_task("text", data=str(path))


# Classification


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


def test_digits_are_stratified_pictures():
    made = task("digits")
    shares = [made.splits[part][1].bincount(minlength=10) / len(made.splits[part][1]) for part in ("train", "validation", "test")]
    assert (shares[0] - shares[1]).abs().max() < 0.005
    assert (shares[0] - shares[2]).abs().max() < 0.005
    x = made.splits["train"][0]
    assert (x.min(), x.max()) == (0, 1)
    assert make_task("digits", split_seed=1).data_hash != made.data_hash


def test_an_epoch_shows_every_example_once():
    made = task("digits")
    batches = take(made, 0, 359, 6)  # 1077 = 3 x 359: two epochs.
    for epoch in (batches[:3], batches[3:]):
        shown = torch.cat([x for x, _ in epoch]).flatten(1)
        assert sorted(map(tuple, shown.tolist())) == sorted(map(tuple, made.splits["train"][0].flatten(1).tolist()))
    assert not torch.equal(batches[0][0], batches[3][0])
    assert made.units_per_batch(10_000) == 1077
    assert len(take(made, 0, 10_000, 2)[1][0]) == 1077


def test_mnist1d_is_always_the_same_and_leaves_numpy_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    made = make_task("mnist1d")
    assert (np.random.get_state()[1] == before).all()
    assert made.data_hash == task("mnist1d").data_hash


def test_error_of_a_known_predictor():
    made = task("digits")
    x, y = made.splits["test"]
    answers = {row.numpy().tobytes(): label.item() for row, label in zip(x, y, strict=True)}

    def predict(inputs):  # Right, except for the digit 3.
        labels = torch.tensor([answers[row.numpy().tobytes()] for row in inputs])
        return torch.nn.functional.one_hot(torch.where(labels == 3, 4, labels), 10).float()

    assert made.evaluate(predict, "test")["error"] == pytest.approx((y == 3).float().mean().item())


# recall


@pytest.mark.parametrize(("vocab_size", "length", "pairs"), [(128, 64, 8), (34, 64, 16), (64, 32, 1), (256, 128, 4)])
def test_rows_of_recall(vocab_size, length, pairs):
    made = make_task("recall", vocab_size=vocab_size, length=length, pairs=pairs)
    half = vocab_size // 2
    for x, y in take(made, 1, 16, 4):
        assert x.shape == y.shape == (16, length)
        for row, labels in zip(x.tolist(), y.tolist(), strict=True):
            keys, values = row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2]
            book = dict(zip(keys, values, strict=True))
            assert len(book) == len(set(values)) == pairs
            assert all(1 <= key < half for key in keys)
            assert all(half <= value < vocab_size for value in values)
            asked = [i for i, label in enumerate(labels) if label != IGNORE]
            assert sorted(row[i] for i in asked) == sorted(keys)
            assert all(labels[i] == book[row[i]] and i >= 2 * pairs and i % 2 == 0 for i in asked)
            assert all(row[i] not in book for i in range(2 * pairs, length) if i not in asked)
            assert all(0 <= token < vocab_size for token in row)


def test_most_queries_come_soon():
    """Gaps follow a power law: for one pair, gap g has the probability alpha g^(alpha - 1), normalised."""
    made = make_task("recall", length=32, pairs=1)
    gaps = torch.cat([((y != IGNORE).long().argmax(1) - 2) // 2 for _, y in take(made, 0, 2000, 10)])
    share = gaps.bincount(minlength=15) / len(gaps)
    weights = torch.arange(1, 16, dtype=torch.float64) ** (0.01 - 1)
    torch.testing.assert_close(share.double(), weights / weights.sum(), rtol=0, atol=0.012)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**31 + 1, 2**32 + 1, 2**40])
def test_no_training_seed_shows_the_evaluation_rows(seed):
    made = task("recall")
    known = {row.numpy().tobytes() for split in ("validation", "test") for row in made.fixed[split][0]}
    keys = {row[: 2 * made.pairs : 2].numpy().tobytes() for split in ("validation", "test") for row in made.fixed[split][0]}
    assert len(known) == 2 * made.EVALUATION_ROWS
    for size in (32, 512):
        for x, _ in take(made, seed, size, 4):
            assert not known & {row.numpy().tobytes() for row in x}
            assert not keys & {row[: 2 * made.pairs : 2].numpy().tobytes() for row in x}


def test_only_queries_are_scored():
    made = task("recall")
    x, y = made.fixed["test"]
    books = {row.numpy().tobytes(): labels for row, labels in zip(x, y, strict=True)}

    def oracle(inputs):
        labels = torch.stack([books[row.numpy().tobytes()] for row in inputs])
        return torch.nn.functional.one_hot(labels.clamp_min(0), made.vocab_size).float() * 50

    scores = made.evaluate(oracle, "test")
    assert (scores["accuracy"], scores["error"]) == (1.0, 0.0)
    assert scores["loss"] < 1e-3
    assert made.loss(oracle(x), y).item() < 1e-3
    assert torch.equal(x, make_task("recall").fixed["test"][0])


# click_through


def test_half_of_the_fields_and_of_the_values_mean_nothing():
    made = make_task("click_through", fields=8, values=10, examples=2000)
    table = made.informative.view(8, 10)
    assert sorted(table.sum(1).tolist()) == [0] * 4 + [5] * 4
    x, y = made.splits["train"]
    assert [len(made.splits[name][0]) for name in ("train", "validation", "test")] == [2000, 500, 500]
    assert torch.equal(x.div(10, rounding_mode="floor"), torch.arange(8).expand_as(x))
    assert set(y.tolist()) == {0.0, 1.0}
    share = x[:, 0].bincount(minlength=10).double().sort(descending=True).values / len(x)
    weights = 1 / torch.arange(1, 11, dtype=torch.float64)
    torch.testing.assert_close(share, weights / weights.sum(), rtol=0, atol=0.03)
    assert make_task("click_through", fields=8, values=10, examples=2000, data_seed=1).data_hash != made.data_hash


def test_labels_of_clicks_follow_what_is_informative_and_nothing_else():
    """The share of clicks moves with an informative value by much more than chance, with another by chance."""
    made = make_task("click_through", fields=8, values=10, examples=40_000)
    x, y = made.splits["train"]
    z = []
    for feature in range(80):
        there = (x == feature).any(1)
        z.append(((y[there].mean() - y[~there].mean()) / (y.std() * (1 / there.sum() + 1 / (~there).sum()).sqrt())).abs())
    z = torch.stack(z)
    # A value that means nothing stands against the others of its field: it moves the share where the rest of the field means
    # something, so only the fields of pure noise are quiet.
    quiet = ~made.informative.view(8, 10).any(1)
    assert z.view(8, 10)[quiet].max() < 4
    assert z.view(8, 10)[~quiet].amax(1).min() > 8


def test_auc_is_that_of_the_ranks():
    made = task("click_through")
    _, y = made.splits["test"]
    assert made.evaluate(uniform(made), "test")["auc"] == 0.5
    scores = torch.linspace(-1, 1, len(y))[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))] + y
    given = iter(scores.split(made.EVALUATION_BATCH))
    found = made.evaluate(lambda x: next(given), "test")
    wins = (scores[y == 1][:, None] > scores[y == 0][None, :]).double().mean().item()
    assert found["auc"] == pytest.approx(wins, abs=1e-9)
    assert found["auc_error"] == pytest.approx(1 - wins, abs=1e-9)
    assert math.isnan(made.evaluate(lambda x: torch.full((len(x),), math.nan), "test")["auc"])


# image_regression


def test_the_picture_is_smooth_on_one_half_and_a_checkerboard_on_the_other():
    made = make_task("image_regression", side=32, square=2, seed=3)
    x, y = (torch.cat([made.splits[name][i] for name in ("train", "validation", "test")]) for i in (0, 1))
    assert [len(made.splits[name][0]) for name in ("train", "validation", "test")] == [616, 204, 204]
    picture = torch.full((32, 32), math.nan)
    where = x * 32 - 0.5
    assert torch.equal(where, where.round())
    picture[tuple(where.long().T)] = y[:, 0]
    assert not picture.isnan().any(), "every pixel is in one split"
    board = [[1.0 if (i // 2 + j // 2) % 2 == 0 else -1.0 for j in range(32)] for i in range(16, 32)]
    assert picture[16:].tolist() == board
    smooth = picture[:16]
    assert smooth.mean().item() == pytest.approx(0, abs=1e-6)
    assert smooth.var(correction=0).item() == pytest.approx(1, rel=1e-5)
    steps = torch.cat([smooth.diff(dim=0).flatten(), smooth.diff(dim=1).flatten()])
    assert steps.abs().max() < 0.8 < picture[16:].diff(dim=1).abs().max()
    perfect = made.evaluate(lambda x: picture[tuple((x * 32 - 0.5).long().T)][:, None] + 0.1, "test")
    assert perfect["mse"] == pytest.approx(0.01, rel=1e-4)
    assert perfect["psnr"] == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-4)


# federated_digits


def test_clients_share_out_the_digits_with_skewed_classes():
    made = task("federated_digits")
    parts = {name: made.clients(name) for name in ("train", "validation", "test")}
    rows = sorted(row.numpy().tobytes() for some in parts.values() for x, _ in some for row in x)
    every = sorted(row.numpy().tobytes() for x, _ in task("digits").splits.values() for row in x)
    assert rows == every
    shares = []
    for train, validation, test in zip(*parts.values(), strict=True):
        whole = sum(len(x) for x, _ in (train, validation, test))
        assert whole >= made.LEAST
        assert len(validation[0]) == len(test[0]) == whole // 5
        labels = torch.cat([y for _, y in (train, validation, test)])
        shares.append(labels.bincount(minlength=10) / whole)
    shares = torch.stack(shares)
    # With Dirichlet(0.4) a client's largest class is far above the tenth of an even split; with a large alpha it is not.
    assert shares.amax(1).mean() > 0.25
    even = make_task("federated_digits", alpha=1000.0).clients("train")
    assert torch.stack([y.bincount(minlength=10) / len(y) for _, y in even]).amax(1).mean() < 0.16
    assert len(make_task("federated_digits", count=5).clients()) == 5
    assert make_task("federated_digits", split_seed=1).data_hash != made.data_hash
    with pytest.raises(GateworkError, match="no split 'tests'; there are train, validation, test"):
        made.clients("tests")


def test_every_client_counts_the_same():
    made = task("federated_digits")
    sizes = [len(y) for _, y in made.clients("test")]
    asked = []

    def predict(x):  # All right for the first client, all wrong for the others.
        asked.append(len(x))
        y = made.clients("test")[len(asked) - 1][1]
        return torch.nn.functional.one_hot(y if len(asked) == 1 else (y + 1) % 10, 10).float()

    scores = made.evaluate(predict, "test")
    assert asked == sizes
    assert scores["accuracy"] == pytest.approx(1 / 8)
    assert scores["error"] == pytest.approx(7 / 8)
    asked.clear()
    assert made.evaluate(predict, "test", max_batches=2)["accuracy"] == 0.5


# dynamical_systems


def test_rates_are_those_of_the_differential_equations():
    """Against an adaptive solver; parameters and initial values are drawn family by family, in this order."""
    solve = pytest.importorskip("scipy.integrate").solve_ivp
    fields = [
        lambda t, z, a, b: [0.5 * z[0] - a * z[0] * z[1], b * z[0] * z[1] - 0.5 * z[1]],
        lambda t, z, a, b: [z[1], a * (1 - z[0] ** 2) * z[1] - b * z[0]],
        lambda t, z, a, b: [z[1], -a * math.sin(z[0]) - b * z[1]],
        lambda t, z, a, b: [-z[0] + a * z[1] + z[0] ** 2 * z[1], b - a * z[1] - z[0] ** 2 * z[1]],
    ]
    ranges = [[(0.25, 1), (0.25, 1)], [(0.2, 1.5), (0.5, 1.5)], [(1, 4), (0, 0.5)], [(0.05, 0.15), (0.3, 0.9)]]
    places = [(0.5, 2), (-2, 2), (-2, 2), (0.2, 1.5)]
    made = make_task("dynamical_systems", systems=2, trajectories=1, seed=5)
    x, y = (torch.cat([made.splits[name][i].view(8, -1, 20, 3 - i) for name in ("train", "validation", "test")], 1) for i in (0, 1))
    assert torch.equal(x[..., 0], torch.arange(8.0)[:, None, None].expand(8, 5, 20))
    generator = torch.Generator().manual_seed(5)
    for f, field in enumerate(fields):
        low, high = torch.tensor(ranges[f], dtype=torch.float64).T
        p = low + torch.rand(2, 1, 2, dtype=torch.float64, generator=generator) * (high - low)
        start = places[f][0] + (places[f][1] - places[f][0]) * torch.rand(2, 5, 2, dtype=torch.float64, generator=generator)
        paths = torch.tensor(
            [
                [
                    solve(field, (0, 4), start[s, j].tolist(), args=p[s, 0].tolist(), t_eval=[0.2 * i for i in range(21)],
                          rtol=1e-9, atol=1e-9, max_step=0.1).y.T.tolist()
                    for j in range(5)
                ]
                for s in range(2)
            ],
            dtype=torch.float64,
        )
        states, rates = paths[:, :, :-1], paths.diff(dim=2) / 0.2
        train = states[:, :1].flatten(0, 2)
        scaled = (states - train.mean(0)) / train.std(0, correction=0)
        torch.testing.assert_close(x[2 * f : 2 * f + 2, ..., 1:], scaled.float(), rtol=0, atol=2e-3)
        speed = rates[:, :1].flatten(0, 2).square().mean(0).sqrt()
        torch.testing.assert_close(y[2 * f : 2 * f + 2], (rates / speed).float(), rtol=0, atol=2e-3)


def test_unseen_systems_have_one_trajectory_to_adapt_to_and_two_to_score_on():
    made = make_task("dynamical_systems", families=2, trajectories=1)
    (x, y), (query_x, query_y) = made.unseen(systems=3)
    assert (x.shape, y.shape, query_x.shape, query_y.shape) == ((120, 3), (120, 2), (240, 3), (240, 2))
    assert x[:, 0].unique().tolist() == query_x[:, 0].unique().tolist() == [0.0, 1, 2, 3, 4, 5]
    known = {tuple(row.tolist()) for row in made.splits["train"][0][:, 1:]}
    assert not known & {tuple(row.tolist()) for row in x[:, 1:]}
    assert all(torch.equal(a, b) for a, b in zip(made.unseen(systems=3)[0], (x, y), strict=True))
