"""Checkpoints: a tree of tensors and plain values in one safetensors file, written atomically; nothing is ever
unpickled.

Tensors are stored under their path in the tree, everything else (structure, numbers, texts) as JSON in the file's
metadata.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatework.core.errors import GateworkError

_FORMAT = "gatework-1"
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


class CheckpointError(GateworkError):
    """A file that is not a checkpoint, is not whole, or belongs to something else."""


def save(path: str | Path, tree: Any, about: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint so that at every moment either the old or the new one is there, whole.

    Args:
        path: ``.safetensors`` file.
        tree: nested dicts, lists and tuples of tensors, numbers, texts and None; dict keys are texts or integers.
        about: JSON-able description, returned by :func:`describe` (``config_hash`` in it is what :func:`load`
            compares).

    Raises:
        CheckpointError: where the file cannot be written.
        TypeError: for anything else in the tree.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    shape = _flatten(tree, "", tensors, {})
    metadata = {"format": _FORMAT, "tree": json.dumps(shape), "about": json.dumps(dict(about or {}))}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or type(error).__module__.startswith("safetensors"):
            raise CheckpointError(f"the checkpoint {str(path)!r} cannot be written: {error}") from error
        raise


def load(path: str | Path, config_hash: str | None = None) -> Any:
    """Read the tree of a checkpoint.

    Raises:
        CheckpointError: no such file; a pickle; truncated; not safetensors; not gatework's; of another configuration.
    """
    metadata, tensors = _read(Path(path))
    about = json.loads(metadata["about"])
    if config_hash is not None and about.get("config_hash") != config_hash:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} is of another configuration ({about.get('config_hash')}, not {config_hash})"
        )
    return _unflatten(json.loads(metadata["tree"]), tensors)


def describe(path: str | Path) -> dict[str, Any]:
    """What :func:`save` was told about a checkpoint; raises as :func:`load`."""
    metadata, _ = _read(Path(path))
    about: dict[str, Any] = json.loads(metadata["about"])
    return about


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    _check(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{str(path)!r} is a safetensors file, but not a checkpoint of gatework's bench")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} is damaged: {error}") from None


def _check(path: Path) -> None:
    """Say plainly what is wrong with a file, where its first bytes and its size tell."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            header = file.read(struct.unpack("<Q", start)[0]) if len(start) == 8 and struct.unpack("<Q", start)[0] < size else b""
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {str(path)!r}") from None
    except OSError as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} cannot be read: {error.strerror or error}") from None
    if start.startswith(_PICKLES):
        raise CheckpointError(
            f"{str(path)!r} is a pickle (a torch.save file); gatework unpickles nothing, save it as safetensors instead"
        )
    if len(start) < 8:
        raise CheckpointError(f"the checkpoint {str(path)!r} is truncated: it has only {size} bytes")
    length = struct.unpack("<Q", start)[0]
    if length < 100_000_000 and length + 8 > size and path.suffix == ".safetensors":
        raise CheckpointError(f"the checkpoint {str(path)!r} is truncated: its header alone has {length} bytes, the file {size}")
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{str(path)!r} is not a safetensors file") from None
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        raise CheckpointError(f"the checkpoint {str(path)!r} is truncated: it has {size} bytes of {whole}")


def _flatten(value: Any, path: str, tensors: dict[str, Tensor], places: dict[Any, str]) -> Any:
    """The JSON form of a tree; tensors go to ``tensors`` as clones, one that stands in several places once."""
    if isinstance(value, Tensor):
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        known = places.setdefault(place, path) if value.numel() else path
        if known == path:
            tensors[path] = value.detach().cpu().clone().contiguous()
        return {"tensor": known}
    if isinstance(value, Mapping):
        items = [[key, _flatten(item, f"{path}/{key}".lstrip("/"), tensors, places)] for key, item in value.items()]
        if not all(isinstance(key, str | int) for key, _ in items):
            raise TypeError(f"a checkpoint's keys are texts and integers: {path}")
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{path}/{index}".lstrip("/"), tensors, places) for index, item in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__} ({path})")


def _unflatten(shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = shape.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        items = [_unflatten(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put :func:`random_state` back."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


__all__ = ["CheckpointError", "describe", "load", "random_state", "save", "set_random_state"]
