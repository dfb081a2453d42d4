"""``describe``: which blocks, attention, feed-forward, embedding and head a pretrained model has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from gatework.core.cost import count_parameters
from gatework.core.errors import PartError


@dataclass(frozen=True)
class Family:
    """Where the models of one family keep their parts; block parts are relative to the block, the rest to the base model."""

    blocks: str
    norms: tuple[str, str]
    attention: str
    feedforward: tuple[str, ...]
    embedding: str
    final_norm: str | None
    pre_norm: bool = True


_LLAMA = Family("layers", ("input_layernorm", "post_attention_layernorm"), "self_attn", ("mlp",), "embed_tokens", "norm")
#: Layouts by the ``model_type`` of a Hugging Face configuration.
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gpt2": Family("h", ("ln_1", "ln_2"), "attn", ("mlp",), "wte", "ln_f"),
    "bert": Family(
        "encoder.layer", ("attention.output.LayerNorm", "output.LayerNorm"), "attention", ("intermediate", "output"),
        "embeddings.word_embeddings", None, pre_norm=False,
    ),
}
#: The same parts inside a model whose blocks a depth policy runs; relative to the adapted block.
ADAPTED = Family("", ("mixer_norm", "feedforward_norm"), "mixer.attention", ("feedforward.network",), "", None)


@dataclass(frozen=True)
class BlockLayout:
    """One block: paths from the model to its parts, its linear maps, and the attention's shape."""

    path: str
    mixer_norm: str
    attention: str
    feedforward_norm: str
    feedforward: tuple[str, ...]
    linears: tuple[str, ...]
    heads: int
    kv_heads: int
    head_width: int
    window: int | None


@dataclass(frozen=True)
class Layout:
    """What :func:`describe` found; ``str`` prints it in 80 columns. Paths start at the model.

    Attributes:
        family: ``model_type`` of the configuration (``llama``, ``mistral``, ``qwen2``, ``qwen3``, ``smollm3``, ``gpt2``, ``bert``).
        model: class of the model.
        blocks_path: the module list with the blocks.
        blocks: the blocks, first to last.
        policy: the depth policy that runs the blocks, where a conversion has put one in.
        embedding, final_norm, head: paths; None where there is none.
        tied: whether the head's weight is the embedding's.
        pre_norm: whether each branch reads the normed stream and adds to it (BERT's norms follow the sum instead).
        width: channels of the stream.
        parameters: their number, shared ones once.
    """

    family: str
    model: str
    blocks_path: str
    blocks: tuple[BlockLayout, ...]
    policy: str | None
    embedding: str
    final_norm: str | None
    head: str | None
    tied: bool
    pre_norm: bool
    width: int
    parameters: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Paths of the linear maps of all blocks: attention projections and feed-forward."""
        return tuple(path for block in self.blocks for path in block.linears)

    def __str__(self) -> str:
        block = self.blocks[0]
        first, last = block.path.rpartition(".")[2], self.blocks[-1].path.rpartition(".")[2]
        kind = "pre-norm" if self.pre_norm else "post-norm"
        grouped = f", {block.kv_heads} for keys and values" if block.kv_heads != block.heads else ""
        window = f", window {block.window}" if block.window is not None else ""
        parts = (block.mixer_norm, block.attention, block.feedforward_norm, *block.feedforward)
        short = {path: path.removeprefix(block.path + ".") for path in (*parts, *block.linears)}
        attention = [short[path] for path in block.linears if path.startswith(block.attention + ".")]
        feedforward = [short[path] for path in block.linears if not path.startswith(block.attention + ".")]
        rows = [
            ("embedding", f"{self.embedding}{', tied with the head' if self.tied else ''}"),
            ("blocks", f"{block.path.rpartition('.')[0]}.{first} .. {last}, {kind}, width {self.width}"),
            ("  norms", f"{short[block.mixer_norm]}, {short[block.feedforward_norm]}"),
            ("  attention", f"{short[block.attention]}: {block.heads} heads of {block.head_width}{grouped}{window}"),
            ("", _leaves(attention)),
            ("  feed-forward", " and ".join(short[path] for path in block.feedforward)),
            ("", _leaves(feedforward)),
            ("final norm", self.final_norm or "none"),
            ("head", self.head or "none"),
        ]
        if self.policy is not None:
            rows.insert(2, ("  run by", self.policy))
        head = f"{self.family} ({self.model}), {len(self.blocks)} blocks, {self.parameters:,} parameters"
        return "\n".join([head, *(f"  {name:<16}{text}".rstrip() for name, text in rows if text)])


def _leaves(paths: Iterable[str]) -> str:
    return ", ".join(path.removesuffix(".base").rpartition(".")[2] for path in paths)


def describe(model: nn.Module) -> Layout:
    """Which blocks, norms, attention, feed-forward, embedding and head a Hugging Face model has.

    Knows the layouts of Llama (SmolLM and SmolLM2 have it), Mistral, Qwen 2 and 3, SmolLM3, GPT-2 and BERT, with any head or none,
    and these models after a conversion.

    Raises:
        PartError: for a layout that it does not know.
    """
    family_name = getattr(getattr(model, "config", None), "model_type", None)
    if family_name not in FAMILIES:
        what = "has no Hugging Face configuration" if family_name is None else f"has the model_type {family_name!r}"
        raise PartError(f"surgery does not know the layout of {type(model).__name__}, which {what}; it knows {', '.join(FAMILIES)}")
    family = FAMILIES[family_name]
    base: nn.Module = model.base_model  # type: ignore[assignment]
    prefix = "" if base is model else f"{model.base_model_prefix}."
    paths = {id(module): path for path, module in model.named_modules()}
    blocks_path = prefix + family.blocks
    blocks: Any = _part(model, blocks_path, family_name)
    config: Any = model.config
    policy = getattr(blocks[0], "policy", None) if len(blocks) else None
    if policy is not None:
        inner = f"{blocks_path}.0.policy.blocks"
        found = tuple(_block(model, f"{inner}.{i}", ADAPTED, family_name, config) for i in range(len(policy.blocks)))
    else:
        found = tuple(_block(model, f"{blocks_path}.{i}", family, family_name, config) for i in range(len(blocks)))
    if not found:
        raise PartError(f"the module list {blocks_path} of this {type(model).__name__} is empty; surgery needs at least one block")
    embedding = _part(model, prefix + family.embedding, family_name)
    if family.final_norm:
        _part(model, prefix + family.final_norm, family_name)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
    return Layout(
        family=family_name,
        model=type(model).__name__,
        blocks_path=blocks_path,
        blocks=found,
        policy=None if policy is None else type(policy).__name__,
        embedding=prefix + family.embedding,
        final_norm=prefix + family.final_norm if family.final_norm else None,
        head=None if head is None else paths[id(head)],
        tied=head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0),
        pre_norm=family.pre_norm,
        width=int(config.hidden_size),
        parameters=count_parameters(model),
    )


def _part(model: nn.Module, path: str, family: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise PartError(
            f"this {type(model).__name__} says it is a {family}, but has no module {path}; surgery looks for it there"
        ) from None


def _block(model: nn.Module, path: str, names: Family, family: str, config: Any) -> BlockLayout:
    parts = [f"{path}.{name}" for name in (*names.norms, names.attention, *names.feedforward)]
    modules = [_part(model, part, family) for part in parts]
    attention: Any = modules[2]
    linears = [name for name, module in model.get_submodule(path).named_modules() if is_linear(module)]
    heads = int(config.num_attention_heads)
    return BlockLayout(
        path=path,
        mixer_norm=parts[0],
        feedforward_norm=parts[1],
        attention=parts[2],
        feedforward=tuple(parts[3:]),
        linears=tuple(f"{path}.{name}" for name in linears),
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(attention, "head_dim", config.hidden_size // heads)),
        window=attention_window(attention, config),
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map that holds a weight of its own: ``nn.Linear`` or GPT-2's ``Conv1D``, also parametrized."""
    linear = isinstance(module, nn.Linear) or type(module).__name__.endswith("Conv1D")
    return linear and ("weight" in module._parameters or is_parametrized(module))


def attention_window(attention: Any, config: Any) -> int | None:
    """The sliding window of one layer's attention, None where it sees everything."""
    everywhere = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    window = getattr(attention, "sliding_window", everywhere)
    return None if window is None else int(window)
