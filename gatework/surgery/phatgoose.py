"""``PhatgooseGates`` and ``phatgoose``: adapters that were trained apart from each other, routed token by token in one model.

Three stages, of which the first is peft's own:

1. each adapter is trained by itself (LoRA on linear layers) and saved by ``peft_model.save_pretrained(folder)``;
2. :class:`PhatgooseGates` trains one vector per adapted layer beside the frozen adapter, saved into the same folder;
3. :func:`phatgoose` puts any number of such folders into the base model (:class:`gatework.experts.Phatgoose`), without training.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import GateworkError, PartError
from gatework.experts.phatgoose import Phatgoose
from gatework.ops.precision import without_autocast
from gatework.surgery.conversion import Conversion, convert, converter
from gatework.surgery.layout import is_linear

#: The gate vectors, beside peft's files of the adapter.
GATES = "phatgoose.safetensors"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "1"
PREFIX = "base_model.model."
#: Settings of peft that make an adapter more than ``W + scale B A`` on linear layers; off in a plain one.
_NOT_PLAIN = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication", "modules_to_save",
    "trainable_token_indices", "target_parameters", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)
#: Starts of the factors that leave the base weights as they are.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
#: A (r, d_in), B (d_out, r) and the scale of an update ``scale B A u``.
Factors = tuple[Tensor, Tensor, float]


class PhatgooseGates(nn.Module):
    """Sigmoid gates beside the LoRA updates of a ``PeftModel``, all else frozen: ``y = W u + sigmoid(v . u) scale B A u``.

    Making it puts the gates in place, by hooks: modules, names and ``save_pretrained`` of the model stay as they are, and its
    dropout in front of the adapter is off. All gates are exactly 1/2 at the start. Train ``gates.parameters()`` on the adapter's
    own task and loss (the paper: 100 steps, AdamW; 5e-3 is a good learning rate), then ``gates.save(folder)`` and ``gates.undo()``.
    The gate's product runs in float32 (float64 stays) whatever the autocast dtype is.

    Args:
        model: a ``PeftModel`` with plain LoRA on linear layers.
        adapter: which of its adapters; None is the active one.

    Attributes:
        sites: paths of the adapted layers in the base model.
        vectors: v (d_in), one per site, 0 at the start.

    Raises:
        PartError: not a model with such an adapter.
    """

    def __init__(self, model: nn.Module, adapter: str | None = None) -> None:
        super().__init__()
        config = getattr(model, "peft_config", None)
        if not isinstance(config, dict) or not hasattr(model, "active_adapters"):
            raise PartError(f"gates stand beside the adapters of a PeftModel, and this is a {type(model).__name__}")
        if adapter is None:
            active = list(model.active_adapters)  # type: ignore[arg-type]
            if len(active) != 1:
                raise PartError(f"{len(active)} adapters are active: say which one gets gates")
            adapter = active[0]
        if adapter not in config:
            raise PartError(f"the model has no adapter {adapter!r}; there are {', '.join(config)}")
        _plain(adapter, config[adapter])
        found: dict[str, Any] = {}
        for path, module in model.named_modules():
            if adapter in getattr(module, "lora_A", {}):
                if not isinstance(module.lora_A[adapter], nn.Linear):
                    raise PartError(f"the adapter {adapter!r} is on {path}, which is no linear layer")
                found[path.removeprefix(PREFIX)] = module
        if not found:
            raise PartError(f"the adapter {adapter!r} is on no layer of the model")
        self.adapter, self.sites = adapter, tuple(found)
        self._of = _fingerprint({
            path: (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter])
            for path, layer in found.items()
        })
        self._layers: list[Any] = list(found.values())  # A list: the model's modules are not the gates' own.
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._dropouts = [layer.lora_dropout[adapter] for layer in self._layers]
        self.vectors = nn.ParameterList()
        self._hooks = []
        model.requires_grad_(False)
        for layer in self._layers:
            first = layer.lora_A[adapter]
            dtype = torch.promote_types(first.weight.dtype, torch.float32)
            vector = nn.Parameter(torch.zeros(first.in_features, dtype=dtype, device=first.weight.device))
            self.vectors.append(vector)
            layer.lora_dropout[adapter] = nn.Identity()
            self._hooks.append(first.register_forward_hook(_Gate(vector)))

    def undo(self) -> None:
        """Take the gates off: the model is as before, ``requires_grad`` and dropout too. The vectors stay here."""
        for hook in self._hooks:
            hook.remove()
        for layer, dropout in zip(self._layers, self._dropouts, strict=True):
            layer.lora_dropout[self.adapter] = dropout
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        self._hooks, self._layers, self._dropouts, self._trained = [], [], [], []

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the vectors into the folder where ``save_pretrained`` has put the adapter.

        Raises:
            GateworkError: a folder without this adapter, or one that cannot be written.
        """
        factors, _ = _factors(self.adapter, Path(folder))
        if _fingerprint(factors) != self._of:
            raise GateworkError(f"the adapter in {str(folder)!r} is another one than these gates were made for")
        tensors = {path: vector.detach().cpu() for path, vector in zip(self.sites, self.vectors, strict=True)}
        part = Path(folder) / f"{GATES}.part"
        try:
            safetensors.torch.save_file(tensors, part, {"format": FORMAT, "adapter": self._of})
            part.replace(Path(folder) / GATES)
        except (OSError, safetensors.SafetensorError) as error:
            raise GateworkError(f"the gates cannot be saved in {str(folder)!r}: {error}") from error

    @torch.no_grad()
    def load(self, folder: str | os.PathLike[str]) -> None:
        """Read the vectors that :meth:`save` wrote.

        Raises:
            GateworkError: no gates there, or gates of another adapter.
        """
        saved = _vectors(self.adapter, Path(folder), self._of)
        for path, vector in zip(self.sites, self.vectors, strict=True):
            vector.copy_(saved[path])


class _Gate:
    """Scales the low-rank code ``A u`` by ``sigmoid(v . u)``, which scales the update: B is linear."""

    def __init__(self, vector: nn.Parameter) -> None:
        self.vector = vector

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], code: Float[Tensor, "*B r"]) -> Float[Tensor, "*B r"]:
        (u,) = given
        with without_autocast(u.device):
            gate = (u.to(torch.promote_types(u.dtype, self.vector.dtype)) @ self.vector).sigmoid()
        return code * gate[..., None].to(code.dtype)


def phatgoose(model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]], k: int = 2) -> Conversion:
    """Route every token through k of several adapters, in each adapted layer, in place (:class:`gatework.experts.Phatgoose`).

    Nothing is trained. The adapters may differ in rank and scale; they are on the same layers of the same base model. Their names,
    in their order, are kept in the conversion, so that they travel with :func:`~gatework.surgery.save`.

    Args:
        model: the base model, without adapters.
        adapters: folders by name, each with the files of peft's ``save_pretrained`` and of :meth:`PhatgooseGates.save`. Nothing is
            unpickled.
        k: adapters per token and layer.

    Raises:
        GateworkError: folders that lack files or hold gates of another adapter.
        PartError: adapters of different base models or layers, of another base model than this one, that are more than plain LoRA,
            or whose gates are untrained; k outside 1 to the number of adapters.
    """
    if hasattr(model, "peft_config"):
        raise PartError("the base model itself is converted, without adapters: call unload() on it first")
    if not adapters or not 1 <= k <= len(adapters):
        raise PartError(f"k must be between 1 and the number of adapters {len(adapters)}, got {k}")
    names, found, bases = list(adapters), [], {}
    for name, folder in adapters.items():
        factors, config = _factors(name, Path(folder))
        vectors = _vectors(name, Path(folder), _fingerprint(factors))
        if not any(vector.any() for vector in vectors.values()):
            raise PartError(f"the gates of the adapter {name!r} are all 0: train them first (PhatgooseGates)")
        found.append({path: (a, b * scale, vectors[path]) for path, (a, b, scale) in factors.items()})
        if config.base_model_name_or_path:
            bases[name] = config.base_model_name_or_path
    _same_base(model, bases)
    for name, sites in zip(names, found, strict=True):
        if apart := sorted(set(sites) ^ set(found[0])):
            raise PartError(f"the adapters {names[0]!r} and {name!r} are on different layers: only one of them is on {apart[0]}")
        _check_fit(model, name, sites)
    rank = max(a.shape[0] for sites in found for a, _, _ in sites.values())
    done = convert(model, "phatgoose", {"adapters": names, "layers": _patterns(model, list(found[0])), "rank": rank, "k": k})
    for path in found[0]:
        layer: Any = model.get_submodule(path)
        device = layer.a.device
        a, b, v = zip(*(sites[path] for sites in found), strict=True)
        layer.a.data = torch.stack([_filled(factor, rank, 0) for factor in a]).to(device)
        layer.b.data = torch.stack([_filled(factor, rank, 1) for factor in b]).to(device)
        layer.v.data = torch.stack(v).to(device)
    return done


@converter("phatgoose")
def _phatgoose(
    model: nn.Module, conversion: Conversion, initialise: bool, adapters: list[str], layers: list[str], rank: int, k: int
) -> None:
    paths = _matching(model, layers)
    for path in paths:
        base: Any = model.get_submodule(path)
        width_out, width_in = _shape(base)
        n, zeros = len(adapters), base.weight.new_zeros
        layer = Phatgoose(base, zeros(n, rank, width_in), zeros(n, width_out, rank), zeros(n, width_in), k).train(base.training)
        for tensor in (layer.a, layer.b, layer.v):
            tensor.requires_grad_(False)
        conversion.swap(path, layer)
    conversion.replaced.append(f"{len(paths)} linear layers by ones with {len(adapters)} adapters of rank {rank}, {k} per token")


def _factors(name: str, folder: Path) -> tuple[dict[str, Factors], Any]:
    """What peft saved: by site A (r, d_in), B (d_out, r) and the scale; and its configuration."""
    try:
        from peft import PeftConfig
        from peft.utils.other import get_pattern_key
    except ImportError:
        raise GateworkError('adapters are read by peft: pip install "gatework[hf]"') from None
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise GateworkError(f"there is no {file} of the adapter {name!r} in {str(folder)!r}: save it with save_pretrained")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError, safetensors.SafetensorError) as error:
        raise GateworkError(f"the adapter {name!r} in {str(folder)!r} cannot be read: {error}") from error
    _plain(name, config)
    factors: dict[str, Factors] = {}
    for key in tensors:
        found = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_(A|B)\.weight", key)
        if found is None or tensors[key].dim() != 2:
            raise PartError(f"the adapter {name!r} holds {key}: only plain LoRA on linear layers can be routed")
        if found[2] == "A":
            path, a, b = found[1], tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
            rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, path), config.r)
            alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, path), config.lora_alpha)
            factors[path] = a, b, alpha / (rank**0.5 if config.use_rslora else rank)
    return factors, config


def _plain(name: str, config: Any) -> None:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise PartError(f"the adapter {name!r} is of the type {kind}: only LoRA can be routed")
    settings = {key: getattr(config, key, None) for key in _NOT_PLAIN}
    odd = [f"{key}={value!r}" for key, value in settings.items() if value]
    if config.bias != "none":
        odd.append(f"bias={config.bias!r}")
    if config.init_lora_weights not in _STARTS:
        odd.append(f"init_lora_weights={config.init_lora_weights!r}")
    if odd:
        raise PartError(f"the adapter {name!r} has {odd[0]}: only plain LoRA on linear layers can be routed")


def _fingerprint(factors: Mapping[str, Factors]) -> str:
    """Says which adapter gates were trained beside; the same in every dtype that holds its values."""
    sha = hashlib.sha256()
    for path in sorted(factors):
        *tensors, scale = factors[path]
        sha.update(f"{path} {scale}".encode())
        for tensor in tensors:
            sha.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def _vectors(name: str, folder: Path, fingerprint: str) -> dict[str, Tensor]:
    path = folder / GATES
    if not path.is_file():
        raise GateworkError(f"the adapter {name!r} has no gates in {str(folder)!r}: train some with PhatgooseGates and save them")
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = file.metadata() or {}
            vectors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, safetensors.SafetensorError) as error:
        raise GateworkError(f"{str(path)!r} is truncated or not a safetensors file ({error})") from None
    if about.get("format") != FORMAT:
        raise GateworkError(f"{str(path)!r} has the format version {about.get('format')}; this gatework reads version {FORMAT}")
    if about.get("adapter") != fingerprint:
        raise GateworkError(f"the gates in {str(folder)!r} were trained beside another adapter than {name!r}")
    return vectors


def _same_base(model: nn.Module, bases: Mapping[str, str]) -> None:
    first = next(iter(bases), None)
    for name, base in bases.items():
        if base != bases[first]:  # type: ignore[index]
            raise PartError(f"adapters of different base models: {first!r} is for {bases[first]!r}, {name!r} for {base!r}")  # type: ignore[index]
    own = getattr(model, "name_or_path", None) or None
    if first is not None and own is not None and own != bases[first]:
        raise PartError(
            f"the adapters are for {bases[first]!r}, and this model is {own!r}; "
            f"if that is the same model under another name, correct base_model_name_or_path in their {CONFIG}"
        )


def _check_fit(model: nn.Module, name: str, sites: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    modules = dict(model.named_modules())
    for path, (a, b, _) in sites.items():
        if path not in modules or not is_linear(modules[path]):
            raise PartError(f"the adapter {name!r} is for another base model: this one has no linear layer {path}")
        if (b.shape[0], a.shape[1]) != _shape(modules[path]):
            has, wants = _shape(modules[path])[::-1], (a.shape[1], b.shape[0])
            raise PartError(f"the adapter {name!r} is for another base model: {path} maps {has[0]} to {has[1]} channels here, "
                            f"{wants[0]} to {wants[1]} there")


def _shape(module: Any) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer; GPT-2's ``Conv1D`` holds the transposed weight."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    linears = [path for path, module in model.named_modules() if is_linear(module)]
    return [path for path in linears if any(fnmatch(path, pattern) for pattern in patterns)]


def _patterns(model: nn.Module, paths: list[str]) -> list[str]:
    """The paths, those of all blocks as one where that names no others."""
    patterns = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", path) for path in paths))
    return patterns if set(_matching(model, patterns)) == set(paths) else paths


def _filled(factor: Tensor, rank: int, axis: int) -> Tensor:
    """A factor with zeros behind, up to the common rank."""
    missing = rank - factor.shape[axis]
    return torch.cat([factor, factor.new_zeros([missing if i == axis else n for i, n in enumerate(factor.shape)])], axis)
