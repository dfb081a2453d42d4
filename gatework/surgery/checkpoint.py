"""``save`` and ``load``: a converted model as a folder with ``gatework.json`` and ``gatework.safetensors``.

The names differ from those of transformers on purpose: plain ``from_pretrained`` finds no model there and says so, where it would
fill weights that it does not know with random numbers. The JSON holds the class, the configurations and the conversions in order;
loading builds the model, does the conversions again and puts every tensor in place. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from gatework.core.errors import GateworkError
from gatework.surgery.conversion import convert, records

FORMAT = 1
JSON, TENSORS = "gatework.json", "gatework.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Save a converted model, or one without conversions, for :func:`load`.

    Every parameter and buffer is stored as it is, shared ones once. A tokenizer is saved beside it by its own ``save_pretrained``.

    Raises:
        GateworkError: for a model that is not a Hugging Face model, or a folder that cannot be written.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        raise GateworkError(f"surgery saves Hugging Face models, and this {type(model).__name__} has no configuration")
    tensors, alias = _tensors(model)
    generation: Any = getattr(model, "generation_config", None)
    about = {
        "format": FORMAT,
        "class": type(model).__name__,
        "config": config.to_dict(),
        "generation_config": None if generation is None else generation.to_dict(),
        "attention": config._attn_implementation,
        "conversions": records(model) if hasattr(model, "gatework_conversions") else [],
        "shared": alias,
    }
    folder = Path(folder)
    try:
        text = json.dumps(about, indent=1)
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{TENSORS}.part"
        safetensors.torch.save_file(_apart(tensors), part)
        part.replace(folder / TENSORS)
        part = folder / f"{JSON}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / JSON)
    except (OSError, safetensors.SafetensorError) as error:
        raise GateworkError(f"the model cannot be saved in {str(folder)!r}: {error}") from error


def load(folder: str | os.PathLike[str], device: torch.device | str | None = None) -> Any:
    """The model that :func:`save` wrote, in evaluation mode, bitwise and with its conversions; they can be seen but not undone.

    Args:
        folder: where it was saved.
        device: where the tensors go; the CPU by default.

    Raises:
        GateworkError: for a folder without a saved model, a truncated or foreign file, another format version, a class that this
            transformers does not have.
    """
    folder = Path(folder)
    about = _read(folder)
    import transformers
    from transformers.initialization import no_init_weights

    cls: Any = getattr(transformers, about["class"], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        version = transformers.__version__
        raise GateworkError(f"{str(folder / JSON)!r} names {about['class']!r}, and transformers {version} has no such model")
    config: Any = cls.config_class
    config = config.from_dict(about["config"])
    config._attn_implementation = about["attention"]
    # Every tensor is loaded next: a random start is not worth the time, nor the caller's random numbers.
    with torch.random.fork_rng(devices=[]):
        with no_init_weights():
            model: Any = cls(config)
        model.tie_weights()
        for record in about["conversions"]:
            try:
                convert(model, record["name"], record["arguments"], initialise=False)
            except (TypeError, KeyError) as error:
                where = str(folder / JSON)
                raise GateworkError(f"{where!r} lists a conversion that this gatework does not know: {error}") from None
    if about["generation_config"] is not None:
        model.generation_config = transformers.GenerationConfig.from_dict(about["generation_config"])
    _fill(model, folder / TENSORS, about["shared"], device)
    return model.eval()


def _read(folder: Path) -> dict[str, Any]:
    path = folder / JSON
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GateworkError(f"there is no converted model in {str(folder)!r}: no file {JSON}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GateworkError(f"{str(path)!r} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise GateworkError(f"{str(path)!r} is truncated or not JSON ({error})") from None
    if not isinstance(about, dict) or "format" not in about:
        raise GateworkError(f"{str(path)!r} is not a model that gatework.surgery saved")
    if about["format"] != FORMAT:
        raise GateworkError(f"{str(path)!r} has the format version {about['format']}; this gatework reads version {FORMAT}")
    missing = {"class", "config", "generation_config", "attention", "conversions", "shared"} - set(about)
    if missing:
        raise GateworkError(f"{str(path)!r} is incomplete: it lacks {', '.join(sorted(missing))}")
    return about


def _named(model: nn.Module) -> dict[str, Tensor]:
    # Buffers that a state_dict leaves out count too: rotary frequencies follow a change of dtype.
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Distinct tensors by their first name, and the other names of shared ones."""
    first: dict[int, str] = {}
    tensors, alias = {}, {}
    for name, tensor in _named(model).items():
        if id(tensor) in first:
            alias[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    return tensors, alias


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous, and none a view of another's memory, as safetensors wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return apart


def _fill(model: nn.Module, path: Path, shared: dict[str, str], device: torch.device | str | None) -> None:
    try:
        saved = safetensors.torch.load_file(path, device=str(device or "cpu"))
    except FileNotFoundError:
        raise GateworkError(f"there is no file {path.name} in {str(path.parent)!r}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise GateworkError(f"{str(path)!r} is truncated or not a safetensors file ({error})") from None
    there, alias = _tensors(model)
    named = _named(model)
    wrong = [
        *(f"{name} is missing" for name in there if name not in saved),
        *(f"{name} is unknown" for name in saved if name not in there),
        *(f"{name} has the shape {tuple(saved[name].shape)}, not {tuple(there[name].shape)}" for name in there
          if name in saved and saved[name].shape != there[name].shape),
    ]
    if wrong or alias != shared:
        what = wrong[0] if wrong else "other tensors are shared"
        raise GateworkError(f"{str(path)!r} does not fit the model that {JSON} describes: {what}")
    for name, tensor in saved.items():
        named[name].data = tensor.clone()  # Out of the mapped file, where tensors are not aligned for the fastest kernels.
