"""The task ``text``."""

from __future__ import annotations

import lzma
import math
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import gatework
from gatework.bench.tasks import make_task
from gatework.core import GateworkError

from .made import take, task


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


def test_longer_windows_are_evaluated_alike_and_scored_by_their_length():
    made = make_task("text", length=32, eval_tokens=3200, extrapolate=True)
    seen = {}

    def predict(x):
        """Knows nothing, and is surer of it the longer the window."""
        seen.setdefault(x.shape[1], []).append(x)
        output = torch.zeros(*x.shape, 256)
        output[..., 255] = x.shape[1] / 8
        return output

    said = made.evaluate(predict, "test")
    split = made.splits["test"]
    for length, count in ((32, 100), (64, 50), (128, 25)):
        windows = torch.cat(seen[length])
        starts = [i * (len(split) - length - 1) // (count - 1) for i in range(count)]
        assert torch.equal(windows, torch.stack([split[start : start + length] for start in starts]).long())
        assert said[f"loss_at_{length}"] == pytest.approx(math.log(255 + math.exp(length / 8)), rel=1e-5)
    assert said["loss"] == said["loss_at_32"]
    assert set(said) == {"loss", "bits_per_byte", "loss_at_32", "loss_at_64", "loss_at_128"}
    plain = make_task("text", length=32, eval_tokens=3200)
    assert plain.evaluate(predict, "test") == {"loss": said["loss"], "bits_per_byte": said["bits_per_byte"]}
    assert plain.data_hash == made.data_hash


def test_a_text_too_short_for_the_longest_windows_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 4000)
    make_task("text", data=str(file), length=64, eval_tokens=256)
    with pytest.raises(GateworkError, match=r"too short for windows of 256: at least \d+ are needed"):
        make_task("text", data=str(file), length=64, eval_tokens=256, extrapolate=True)
    with pytest.raises(GateworkError, match="eval_tokens 255 is less than one window of 256"):
        make_task("text", data=str(file), length=64, eval_tokens=255, extrapolate=True)


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
    made = make_task("text", data=str(path), eval_tokens=128)
    assert made.evaluate(lambda x: torch.zeros(*x.shape, 256), "test")["loss"] > 5


@pytest.mark.parametrize("call", ["exists", "read_bytes"])
def test_an_unreadable_file_is_refused_in_one_sentence(call, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 4000)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(GateworkError, match=r"the data file '.*file' cannot be read: Permission denied"):
        make_task("text", data=str(path))
