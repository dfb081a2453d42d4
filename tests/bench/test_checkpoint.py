from __future__ import annotations

import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from gatework.bench import checkpoint
from gatework.bench.checkpoint import CheckpointError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def tree():
    weight = torch.randn(3, 4)
    return {
        "model": {"weight": weight, "again": weight, "view": weight.t(), "empty": torch.zeros(0)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(2, dtype=torch.float64)}}, "betas": (0.9, 0.95)},
        "text": "ä",
        "none": None,
        "flag": True,
        "list": [1, 2.5, torch.arange(3)],
        "bf16": torch.ones(2, dtype=torch.bfloat16),
    }


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


def test_round_trip(path):
    saved = tree()
    checkpoint.save(path, saved, {"config_hash": "abc", "step": 3})
    same(checkpoint.load(path), saved)
    same(checkpoint.load(path, "abc"), saved)
    assert checkpoint.describe(path) == {"config_hash": "abc", "step": 3}
    assert os.listdir(path.parent) == ["a.safetensors"]


def test_an_optimizer_continues_bit_for_bit(path):
    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    xs = torch.randn(6, 2, 4)
    model, optimizer = make()
    for x in xs[:3]:
        step(model, optimizer, x)
    checkpoint.save(path, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for x in xs[3:]:
        step(model, optimizer, x)
    other, other_optimizer = make()
    loaded = checkpoint.load(path)
    other.load_state_dict(loaded["model"])
    other_optimizer.load_state_dict(loaded["optimizer"])
    for x in xs[3:]:
        step(other, other_optimizer, x)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_random_state(path):
    checkpoint.save(path, checkpoint.random_state(torch.device("cpu")))
    first = torch.rand(4)
    checkpoint.set_random_state(checkpoint.load(path), torch.device("cpu"))
    assert torch.equal(torch.rand(4), first)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_truncated(path, share):
    checkpoint.save(path, {"a": torch.randn(5000), "b": torch.randn(100)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="is truncated") as caught:
        checkpoint.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_refused_and_not_run(path, protocol):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(path.parent / "ran"),))

    path.write_bytes(pickle.dumps(Evil(), protocol=protocol))
    with pytest.raises(CheckpointError, match="is a pickle"):
        checkpoint.load(path)
    assert not (path.parent / "ran").exists()


@pytest.mark.parametrize("new", [True, False])
def test_torch_save_is_refused(path, new):
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="is a pickle"):
        checkpoint.load(path)


def test_other_files(path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path.parent)
    path.write_bytes(struct.pack("<Q", 20) + b"this is no JSON text at all, but long enough")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(path)
    text = path.with_suffix(".txt")
    text.write_text("To be, or not to be, that is the question.")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        checkpoint.load(text)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of gatework's bench"):
        checkpoint.load(path)


def test_damaged_inside(path):
    checkpoint.save(path, {"a": torch.randn(50)})
    raw = bytearray(path.read_bytes())
    at = raw.index(b'"F32"')
    raw[at : at + 5] = b'"F99"'
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path)


def test_another_configuration(path):
    checkpoint.save(path, {"a": torch.ones(1)}, {"config_hash": "abc"})
    with pytest.raises(CheckpointError, match="another configuration"):
        checkpoint.load(path, "xyz")


def test_what_cannot_be_written(path):
    with pytest.raises(TypeError, match="cannot hold a object"):
        checkpoint.save(path, {"a": object()})
    with pytest.raises(TypeError, match="keys"):
        checkpoint.save(path, {1.5: 1})
    path.write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        checkpoint.save(path / "below" / "b.safetensors", {})
    assert path.read_text() == "x"
