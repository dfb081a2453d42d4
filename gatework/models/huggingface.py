"""``GateworkConfig`` and ``GateworkForCausalLM``: a :class:`~gatework.models.Decoder` as a ``transformers`` model.

Importing this module registers both with ``AutoConfig`` and ``AutoModelForCausalLM``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State, losses
from gatework.core.errors import GateworkError
from gatework.core.expression import parse_pattern
from gatework.core.registry import check
from gatework.depth.stack import Stack
from gatework.mixers.base import KVCache
from gatework.models.decoder import Decoder

try:
    from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.modeling_outputs import CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    message = 'gatework.models.huggingface needs transformers: pip install "gatework[hf]"'
    raise ModuleNotFoundError(message, name="transformers") from None

#: What a checkpoint means; it rises when the same names come to mean something else.
FORMAT = 1


class GateworkConfig(PreTrainedConfig):
    """The settings of a :class:`~gatework.models.Decoder`, for ``transformers``.

    Args:
        vocab_size, d_model, layers, heads, d_ff, tie_embeddings: as in :class:`~gatework.models.Decoder`; also under the usual
            names ``hidden_size``, ``num_hidden_layers``, ``num_attention_heads``, ``intermediate_size``, ``tie_word_embeddings``.
        mixer, feedforward, depth, weight: part expressions; the first two may be patterns, as in ``"gla, gla, attention"``. They
            are checked here, and stored in their canonical form.
        format: format of the checkpoint that this configuration belongs to.
        **kwargs: what every ``transformers`` configuration takes (``pad_token_id``, ``eos_token_id``, ``dtype``, ...).

    Raises:
        PartError: an unknown part or argument.
        GateworkError: a checkpoint of another format.

    Example:
        >>> GateworkConfig(mixer="gla,attention").mixer
        'gla, attention'
    """

    model_type = "gatework"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "d_model", "num_hidden_layers": "layers", "num_attention_heads": "heads", "intermediate_size": "d_ff",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(
        self,
        vocab_size: int = 256,
        d_model: int = 128,
        layers: int = 4,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: str = "attention",
        feedforward: str = "glu",
        depth: str = "stack",
        tie_embeddings: bool = True,
        weight: str | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        format: int = FORMAT,
        **kwargs: Any,
    ) -> None:
        if format != FORMAT:
            raise GateworkError(f"this checkpoint has format {format}, and this gatework reads {FORMAT}: use the one that wrote it")
        self.format = format
        self.vocab_size, self.d_model, self.layers, self.heads, self.d_ff = vocab_size, d_model, layers, heads, d_ff
        self.mixer, self.feedforward = _pattern(mixer, "mixer"), _pattern(feedforward, "feedforward")
        self.depth = str(check(depth, "depth"))
        self.weight = None if weight is None else str(check(weight, "weight"))
        self.tie_embeddings = tie_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        super().__init__(**kwargs)

    def build(self) -> Decoder:
        """A new decoder of these settings."""
        names = ("vocab_size", "d_model", "layers", "heads", "d_ff", "mixer", "feedforward", "depth", "tie_embeddings", "weight")
        return Decoder(**{name: getattr(self, name) for name in names})


def _pattern(text: str, slot: str) -> str:
    return ", ".join(str(check(spec, slot)) for spec in parse_pattern(text))


class GateworkCache(Cache):
    """What :class:`GateworkForCausalLM` keeps between the steps of a generation: the decoding state of its depth policy.

    Attention's part of it grows with the sequence, or has room for ``room`` tokens from the start; other mixers keep what they
    keep. It is made by ``model.new_cache(batch_size)``, ``model.generate`` or ``model(..., use_cache=True)``.
    """

    def __init__(self, state: State, batch_size: int, room: int = 0) -> None:
        super().__init__(layers=[])
        self.room, self._rows = room, batch_size
        self._empty = state
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = copy.deepcopy(self._empty)
        self.seen = 0
        if self.room:
            for part in _parts(self.state):
                if isinstance(part, KVCache):
                    part.make_room(self.room if part.window is None else min(self.room, 2 * part.window))

    def __len__(self) -> int:
        return len(getattr(self.state, "layers", [self.state]))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={self._rows}, seen={self.seen}, nbytes={self.state.nbytes})"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens fed so far, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows beyond the room that was made in advance."""
        return -1

    get_max_cache_shape = get_max_length  # Its name in transformers 5.0.

    def reorder_cache(self, beam_idx: Int[Tensor, "B2"]) -> None:
        """Keep the sequences ``beam_idx``, in that order."""
        for state in (self.state, self._empty):
            state.reorder(beam_idx)
        self._rows = len(beam_idx)

    def batch_select_indices(self, indices: Int[Tensor, "B2"]) -> None:
        """Keep the sequences ``indices``, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Keep each sequence ``repeats`` times."""
        tensor = next(value for part in _parts(self.state) for value in vars(part).values() if isinstance(value, Tensor))
        self.reorder_cache(torch.arange(self._rows, device=tensor.device).repeat_interleave(repeats))

    def crop(self, tokens: int) -> None:
        """Forget the last ``-tokens`` tokens, or for a positive number all but the first ``tokens``.

        Raises:
            GateworkError: a mixer that cannot go back.
        """
        remove = -tokens if tokens <= 0 else max(0, self.seen - tokens)
        if remove and not self.is_croppable:
            raise GateworkError("this model cannot take back tokens: only attention without a window keeps what came before")
        for part in _parts(self.state) if remove else ():
            part.remove(remove)  # type: ignore[attr-defined]
        self.seen -= remove

    @property
    def is_croppable(self) -> bool:
        """Whether :meth:`crop` can take tokens back."""
        return all(isinstance(part, KVCache) and part.window is None for part in _parts(self.state))

    @property
    def is_initialized(self) -> bool:
        """Always: the state is made with the cache."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Never: the number of tokens is part of a compiled step, which would be compiled anew for every token."""
        return False

    @property
    def batch_size(self) -> int:
        """Sequences."""
        return self._rows

    max_batch_size = batch_size


def _parts(state: State) -> Iterator[State]:
    """The states inside a state that hold tensors themselves."""
    values = [getattr(state, field.name) for field in dataclasses.fields(state)]
    if any(isinstance(value, Tensor) for value in values):
        yield state
    for value in chain.from_iterable(value if isinstance(value, list) else [value] for value in values):
        if isinstance(value, State):
            yield from _parts(value)


class GateworkForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`~gatework.models.Decoder` with the interface of a ``transformers`` language model.

    Saving, loading (safetensors only), ``generate``, ``Trainer``, ``peft`` and what else works on such models work on it. The
    decoder is ``model``; ``gatework.core.advance(model, step, total_steps)`` moves the schedules of its parts.

    Gradient checkpointing recomputes each block in the backward pass. It is never reentrant, whatever ``use_reentrant`` says: a
    reentrant checkpoint has no gradient for the losses that parts leave beside their output.

    Tensors that a checkpoint does not hold start as in a new model.

    Args:
        config: the settings.

    Raises:
        GateworkError: a ``weight`` part whose weights share an array (``stable_rps``, ``roast``).
    """

    config_class = GateworkConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}
    _supports_sdpa = True  # The mixers call it themselves.

    def __init__(self, config: GateworkConfig) -> None:
        super().__init__(config)
        self.model = config.build()
        shared = list(self.model.named_buffers(remove_duplicate=False))
        if len({id(buffer) for _, buffer in shared}) < len(shared):
            wanted = "which a transformers checkpoint cannot hold"
            raise GateworkError(f"weight={config.weight} keeps one array for many weights, {wanted}")
        if type(self.model.depth) is not Stack:
            # Sharding gathers a module's weights where its forward is called, and other policies run the blocks' branches alone.
            self._no_split_modules = [type(self.model.depth).__name__]
        if self.model.embedding.weight.is_meta:
            # Loading fills one tensor by name after the other and ties afterwards.
            self.model.head.weight = nn.Parameter(self.model.head.weight.detach())
        else:
            for module in self.model.modules():
                module._is_hf_initialized = True  # All parts have started as their constructors say.
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> GateworkForCausalLM:
        """As in ``transformers``, from safetensors: nothing is ever unpickled."""
        model: GateworkForCausalLM = super().from_pretrained(*args, **(kwargs | {"use_safetensors": True}))
        return model

    def _init_weights(self, module: nn.Module) -> None:
        """Start a resized embedding or head."""
        if isinstance(module, nn.Embedding | nn.Linear):
            init.normal_(module.weight, std=self.config.d_model**-0.5)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Give what no constructor and no checkpoint has filled the values of a new model; called after loading, too."""
        new = None
        for path, module in self.model.named_modules():
            if getattr(module, "_is_hf_initialized", False):
                continue
            for name, tensor in chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False)):
                if not getattr(tensor, "_is_hf_initialized", False) and not tensor.is_meta:
                    new = self.config.build() if new is None else new
                    tensor.copy_(getattr(new.get_submodule(path), name))
            module._is_hf_initialized = True

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.model.head = new_embeddings

    def new_cache(self, batch_size: int, room: int = 0) -> GateworkCache:
        """An empty cache for so many sequences, with room for so many tokens made in advance."""
        return GateworkCache(self.model.init_state(batch_size), batch_size, room)

    @can_return_tuple
    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and the loss where there are ``labels``.

        Args:
            input_ids: token ids (B, T).
            attention_mask: (B, T), or (B, past + T) behind a cache; nonzero for real tokens.
            past_key_values: a :class:`GateworkCache`; it then holds the new tokens too.
            inputs_embeds: embedded tokens (B, T, d_model), instead of ``input_ids``.
            labels: (B, T), shifted inside, -100 where there is none. While training, the loss is the cross-entropy plus
                ``gatework.core.losses``, which are thereby handed out; with ``num_items_in_batch`` they count by this batch's
                share of the items, as the cross-entropy does.
            use_cache: make a cache if none is given.
            logits_to_keep: compute the logits of so many last tokens only (0: all), or of the positions in a tensor.
            **kwargs: ``position_ids`` that start again at 0 mark packed documents, which then stay apart (without a cache;
                elsewhere a token's position counts the real tokens before it). ``num_items_in_batch`` divides the loss. Others
                are ignored.

        Raises:
            GateworkError: neither or both of ``input_ids`` and ``inputs_embeds``, another cache, a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise GateworkError("give either input_ids or inputs_embeds")
        x = self.model.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        length = x.shape[1]
        if use_cache and past_key_values is None and not (self.training and self.model.depth.gradient_checkpointing):
            past_key_values = self.new_cache(x.shape[0])
        if past_key_values is not None and not isinstance(past_key_values, GateworkCache):
            raise GateworkError(f"a gatework model continues from its own new_cache, not from a {type(past_key_values).__name__}")
        state = None if past_key_values is None else past_key_values.state
        mask = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < length:
                raise GateworkError(f"attention_mask has a number for each token, not the shape {tuple(attention_mask.shape)}")
            mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
            if not torch.compiler.is_compiling() and bool(mask.all()):
                mask = None  # Without padding the mixers are faster.
        positions, segments = kwargs.pop("position_ids", None), None
        if positions is not None and state is None:
            segments = (positions == 0).cumsum(1).expand(x.shape[0], -1)
        x = self.model.depth(x, state=state, mask=mask, segments=segments)
        if isinstance(past_key_values, GateworkCache):
            past_key_values.seen += length
        if isinstance(logits_to_keep, Tensor) or logits_to_keep:
            x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.model.head(self.model.norm(x))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and (extra := losses(self.model)):
                items = kwargs.get("num_items_in_batch")
                share = 1 if items is None else (labels[:, 1:] != -100).sum() / items
                loss = loss + share * torch.stack([value.to(loss.dtype) for value in extra.values()]).sum()
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        """Called by ``generate``: put a cache into its arguments."""
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic", "static"):
            raise GateworkError(f"cache_implementation is dynamic or static for a gatework model, not {implementation!r}")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = self.new_cache(rows, max_cache_length if implementation == "static" else 0)


AutoConfig.register("gatework", GateworkConfig, exist_ok=True)
AutoModelForCausalLM.register(GateworkConfig, GateworkForCausalLM, exist_ok=True)

__all__ = ["GateworkCache", "GateworkConfig", "GateworkForCausalLM"]
