"""``lizard``: a pretrained decoder's attention replaced by gated linear attention with a short window, in two short trainings.

Nguyen et al., Lizard, 2025, arXiv 2507.09025, section 4. First each new layer learns to give what the old one gave for the same
input (:func:`attention_transfer`), then the whole model is trained on text.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.contracts import in_backward
from gatework.core.errors import PartError
from gatework.mixers.lizard import Lizard, LizardState
from gatework.surgery.adapters import Pass
from gatework.surgery.conversion import Conversion, convert, converter
from gatework.surgery.layout import describe


def lizard(
    model: nn.Module,
    features: int | None = None,
    window: int = 128,
    sinks: int = 4,
    gates: Literal["shared", "head"] = "shared",
) -> Conversion:
    """Replace the attention of a pretrained decoder by :class:`gatework.mixers.Lizard`, in place.

    The new layers use the projections of the old ones and add feature maps, gates, sinks and the weight of the window. Decoding
    then keeps as much whatever the length; ``generate`` goes on working, with batches, left padding and beams. The function
    changes, so train afterwards, in the paper's two stages (with AdamW, 10% of warm-up and a cosine, 20 million tokens each)::

        surgery.lizard(model)
        with surgery.attention_transfer(model):
            surgery.distill(model, None, batches, steps, lr=1e-3, parameters="new")
        surgery.distill(model, teacher, batches, steps, lr=5e-4)

    The paper's second stage trains LoRA of rank 8 on the projections of queries, keys and values, and on the text alone
    (``teacher=None``).

    Args:
        model: a Hugging Face model of the layout of Llama (SmolLM2 is one), Mistral or Qwen 2, with plain rotary positions and
            heads that together are as wide as the stream.
        features, window, sinks, gates: as :class:`~gatework.mixers.Lizard` takes them.

    Raises:
        PartError: for other models, or settings out of range.
    """
    return convert(model, "lizard", {"features": features, "window": window, "sinks": sinks, "gates": gates})


@contextlib.contextmanager
def attention_transfer(model: nn.Module) -> Iterator[None]:
    """Inside this block a converted model in training runs its old attention, and its new layers learn to give the same.

    Every new layer sees what the old model's layer sees, and leaves a loss: the mean square of the difference of the two outputs
    (behind the output projection), over that of the old one's, for real tokens. Nothing else has a gradient for the new parameters,
    so that :func:`~gatework.surgery.distill` with ``parameters="new"`` is the first stage; what it reports has the old model's loss
    on the text in it, a constant.

    Raises:
        PartError: for a model without such layers.
    """
    layers = [module for module in model.modules() if isinstance(module, LizardAttention)]
    if not layers:
        raise PartError(f"there is no attention to learn in this {type(model).__name__}: convert it by surgery.lizard first")
    try:
        for layer in layers:
            layer.transfer = True
        yield
    finally:
        for layer in layers:
            layer.transfer = False


class LizardAttention(nn.Module):
    """A :class:`~gatework.mixers.Lizard` in the place of a pretrained layer's attention, whose projections it has taken over.

    ``transfer``, in training, runs the old attention instead and leaves the new one's distance from it as a loss.
    """

    def __init__(self, part: Lizard, attention: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.transfer = False
        # Not a submodule: it has no weights but those that the part holds.
        self._old = (attention,)
        self.layer_idx: int = attention.layer_idx  # type: ignore[assignment]

    def forward(self, hidden_states: Float[Tensor, "B T D"], *args: Any, **given: Any) -> tuple[Tensor, None]:
        """What the model's layer calls its attention with; only the mask and the cache are read."""
        call = Pass(given, hidden_states)
        state = None
        if call.cache is not None:
            state = _state(call.cache, self.layer_idx, self.part, hidden_states)
            call.past = state.window.fed  # Earlier layers have moved the cache's length already.
        real = call.real()
        if real is not None and bool(real.all()):
            real = None
        if not (self.transfer and self.training):
            return self.part(hidden_states, state=state, mask=real), None
        if state is not None:
            raise PartError("attention is transferred from whole sequences: call the model with use_cache=False")
        with torch.no_grad():
            target: Tensor = self._old[0](hidden_states, *args, **given)[0]
        difference, size = self.part(hidden_states.detach(), mask=real) - target, target
        if real is not None:
            difference, size = difference[real], size[real]
        loss = difference.float().square().mean() / size.float().square().mean().clamp(min=torch.finfo(torch.float32).tiny)
        if not in_backward():
            self.part.losses = {"transfer": loss}
        return target, None


class LizardCache:
    """What a converted layer keeps in a cache of ``transformers``, which asks for these attributes and methods."""

    is_compileable = is_croppable = is_sliding = False
    is_initialized = True
    supports_early_init = False
    keys = values = None

    def __init__(self, empty: LizardState) -> None:
        self._empty = empty
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = copy.deepcopy(self._empty)

    def get_seq_length(self, cache_position: object = None) -> int:
        """Tokens fed, padding included."""
        return self.state.window.fed

    def get_max_length(self) -> int:
        """-1: none."""
        return -1

    get_max_cache_shape = get_max_length  # Its name in transformers 5.0.

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Length and offset of the mask that the model makes."""
        new = query_length if isinstance(query_length, int) else len(query_length)
        return self.state.window.fed + new, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences ``beam_idx``, in that order."""
        self.state.reorder(beam_idx)
        self._empty.reorder(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence ``repeats`` times."""
        rows = torch.arange(self.state.batch_size, device=self.state.memory.device)
        self.reorder_cache(rows.repeat_interleave(repeats))


    def lazy_initialization(self, *_: Any) -> None:
        """Nothing: it is made with the first tokens."""

    def update(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Refused: there are no keys and values."""
        raise PartError("a layer whose attention lizard has replaced keeps no keys and values")


@functools.cache
def _cache_layer() -> type[LizardCache]:
    """:class:`LizardCache` as transformers knows its own; it is not imported before a model is there."""
    from transformers.cache_utils import CacheLayerMixin

    return type("LizardCacheLayer", (LizardCache, CacheLayerMixin), {})


def _state(cache: Any, index: int, part: Lizard, x: Tensor) -> LizardState:
    layers = cache.layers
    if index == len(layers):
        layers.append(None)
    layer = layers[index]
    if not isinstance(layer, LizardCache):
        if layer is not None and layer.get_seq_length():
            raise PartError("this cache holds keys and values of the model before its conversion: begin with an empty one")
        layer = layers[index] = _cache_layer()(part.init_state(len(x), dtype=x.dtype, device=x.device))
    state: LizardState = layer.state
    return state


@converter("lizard", new=("*.part.q_features", "*.part.k_features", "*.part.gate_proj.weight", "*.part.sinks", "*.part.alpha"))
def _lizard(model: nn.Module, conversion: Conversion, initialise: bool, **settings: Any) -> None:
    found = describe(model)
    config: Any = model.config
    if found.policy is not None:
        raise PartError(f"{found.policy} runs the layers whose attention lizard replaces: undo that conversion first")
    rope = getattr(config, "rope_parameters", None) or {}
    made = []
    for block in found.blocks:
        attention: Any = model.get_submodule(block.attention)
        if isinstance(attention, LizardAttention):
            raise PartError("the attention is lizard already: undo that conversion first")
        problem = None
        if not all(isinstance(getattr(attention, name, None), nn.Module) for name in ("q_proj", "k_proj", "v_proj", "o_proj")):
            problem = "it has no q_proj, k_proj, v_proj and o_proj"
        elif hasattr(attention, "q_norm") or not getattr(attention, "use_rope", True):
            problem = "its queries and keys have norms, or no rotary positions"
        elif block.heads * block.head_width != found.width:
            problem = f"its {block.heads} heads of {block.head_width} are not as wide as the stream, {found.width}"
        elif rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            problem = "its rotary positions are not the plain ones"
        if problem:
            raise PartError(f"lizard cannot take over {block.attention}: {problem}")
        try:
            part = Lizard(
                found.width, block.heads, block.kv_heads, rope_base=float(rope.get("rope_theta", 10000.0)), **settings
            )
        except ValueError as error:
            raise PartError(f"lizard cannot take over {block.attention}: {error}") from error
        weight = next(attention.parameters())
        part.to(weight.device, weight.dtype)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(part, name, getattr(attention, name))
        made.append(LizardAttention(part, attention).train(attention.training))
    for block, layer in zip(found.blocks, made, strict=True):
        conversion.swap(block.attention, layer)
    owned = ("q_features", "k_features", "gate_proj", "sinks", "alpha")
    added = sum(p.numel() for layer in made for name, p in layer.part.named_parameters() if name.startswith(owned))
    conversion.replaced.append(f"{len(made)} attentions by lizard, {added:,} parameters of features, gates, sinks and alphas")
