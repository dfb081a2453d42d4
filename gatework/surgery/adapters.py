"""Adapters that make a pretrained decoder's layers :class:`gatework.depth.base.Block` layers, so that any depth policy runs them.

The adapters hold the model's own modules; no weight is copied. Everything that a Hugging Face model hands its layers in one
forward pass (attention mask, rotary angles, cache) reaches the attention adapters inside the policy's ``state``. The cache stays
the model's own, so ``generate`` goes on working with batches, left padding, beams, static and dynamic caches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import DepthState, FeedForward, No, SequenceMixer, State
from gatework.core.errors import PartError
from gatework.depth.base import Block, BlockPolicy
from gatework.surgery.layout import Layout, describe

#: Kept queries per step: each step meets only the keys that one of its queries may see.
CHUNK = 128
IMPLEMENTATIONS = ("sdpa", "eager")


class Pass:
    """What the model hands its layers in one forward pass, read the same way for every version of transformers."""

    def __init__(self, given: dict[str, Any], x: Tensor) -> None:
        self.given = given
        self.cache = given.get("past_key_values")
        self.mask: Tensor | None = given.get("attention_mask")
        if self.mask is not None and (not isinstance(self.mask, Tensor) or self.mask.dim() != 4):
            raise PartError(f"a depth policy runs with the attention implementations {' and '.join(IMPLEMENTATIONS)} only")
        self.batch, self.new = x.shape[:2]
        self.past = 0 if self.cache is None else int(self.cache.get_seq_length())

    def real(self) -> Tensor | None:
        """Which tokens are real (B, T): those that may see themselves. None where there is no mask: all are."""
        if self.mask is None:
            return None
        entries = self.mask.shape[-1]
        # The new keys stand behind the past ones; a full sliding cache has dropped the oldest, a static one has room behind.
        own = min(self.past + self.new, entries) - self.new + torch.arange(self.new, device=self.mask.device)
        seen = self.mask[:, 0].gather(2, own[None, :, None].expand(len(self.mask), -1, -1))[..., 0]
        return _visible(seen).expand(self.batch, -1)

    def rows(self, token: Int[Tensor, "B M"], entries: int) -> Tensor | None:
        """The attention mask's rows (B, 1 or H, M, S) of some queries, boolean or additive; None where they see everything."""
        if self.mask is not None:
            mask = self.mask[..., :entries].expand(self.batch, -1, -1, -1)
            return mask.gather(2, token[:, None, :, None].expand(-1, mask.shape[1], -1, entries))
        if self.new == 1 or self.given.get("is_causal") is False:
            return None
        # Without a mask the models rely on torch's causal attention, which lines up the first query with the first key.
        return torch.arange(entries, device=token.device) <= token[:, None, :, None]

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """All keys and values so far, the new ones behind."""
        if self.cache is None:
            return keys, values
        position = self.given.get("cache_position")
        extra = () if position is None else ({"cache_position": position},)
        keys, values = self.cache.update(keys, values, layer, *extra)
        return keys, values


@dataclass
class LayerState(State):
    """Carries the pass to the attention of one layer; the decoding state itself is the model's cache."""

    given: Pass | None = None

    @property
    def keeps(self) -> bool:
        """Whether the model has a cache in this pass."""
        return self.given is not None and self.given.cache is not None


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min


class PretrainedAttention(SequenceMixer):
    """The attention of a pretrained layer as a sequence mixer.

    Without ``keep`` it calls the model's own module. With ``keep`` the keys and values of all tokens are computed and enter the
    cache; queries, scores and output projection run for the kept tokens. Padding, packing and causality are in the attention mask
    that the model makes; ``mask`` adds nothing.

    Args:
        attention: the model's module: separate projections ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, with or without
            ``q_norm`` and ``k_norm``, rotary positions from the model, grouped heads.
        heads, kv_heads, head_width: its shape.

    ``scale`` multiplies the output: a gate that starts at g multiplies a branch scaled by 1 / g.
    """

    capabilities = SequenceMixer.capabilities | {
        "packs": No("the model's own attention mask keeps documents apart"),
        "compiles": No("the cache and the mask are the model's, and torch.compile is offered on the model"),
    }

    def __init__(self, attention: nn.Module, heads: int, kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.attention: Any = attention
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.scale = 1.0

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; ``state`` comes from the model's forward pass."""
        if not isinstance(state, LayerState) or state.given is None:
            raise ValueError("a pretrained attention runs inside its model, which makes its state")
        if segments is not None:
            raise ValueError("a pretrained attention keeps documents apart by the model's attention mask, not by segments")
        if keep is None:
            y: Tensor = self.attention(x, **state.given.given)[0]
        else:
            y = self._kept(x, state.given, keep)
        return y if self.scale == 1 else y * self.scale

    # The three stages that differ between layouts.

    def query(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N H K"]:
        """Queries of tokens, normed where the model does, before rotation."""
        queries: Tensor = self.attention.q_proj(x).unflatten(-1, (-1, self.head_width))
        return self.attention.q_norm(queries) if hasattr(self.attention, "q_norm") else queries

    def keys_values(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
        """Keys (normed where the model does, before rotation) and values."""
        keys: Tensor = self.attention.k_proj(x).unflatten(-1, (-1, self.head_width))
        values: Tensor = self.attention.v_proj(x).unflatten(-1, (-1, self.head_width))
        return (self.attention.k_norm(keys) if hasattr(self.attention, "k_norm") else keys), values

    def output(self, heads: Float[Tensor, "N H K"]) -> Float[Tensor, "N D"]:
        """Output projection."""
        y: Tensor = self.attention.o_proj(heads.flatten(-2))
        return y

    @property
    def dropout(self) -> float:
        """Share of attention weights that training drops."""
        return float(self.attention.attention_dropout) if self.training else 0.0

    def _kept(self, x: Tensor, given: Pass, keep: Tensor) -> Tensor:
        batch, new, width = x.shape
        keys, values = self.keys_values(x)
        angles = given.given.get("position_embeddings") if getattr(self.attention, "use_rope", True) else None
        if angles is not None:
            angles = tuple(angle.expand(batch, -1, -1) for angle in angles)
            keys = _rotate(keys, *angles)
        keys, values = given.update(keys.transpose(1, 2), values.transpose(1, 2), self.attention.layer_idx)
        rows = keep.flatten().nonzero()[:, 0]
        if not len(rows):
            return torch.zeros_like(x)
        queries_N = self.query(x.reshape(-1, width).index_select(0, rows))
        if angles is not None:
            queries_N = _rotate(queries_N, *(angle.flatten(0, 1).index_select(0, rows) for angle in angles))
        y_N = self.output(self._attend(queries_N, rows, keep, keys, values, given))
        return y_N.new_zeros(batch * new, width).index_copy_(0, rows, y_N).view(batch, new, width)

    def _attend(self, queries_N: Tensor, rows: Tensor, keep: Tensor, keys: Tensor, values: Tensor, given: Pass) -> Tensor:
        """What the kept queries (N, H, K), which stand at the flat places ``rows``, read from keys and values (B, G, S, K)."""
        batch, new = keep.shape
        # Each sequence's kept tokens in time order, side by side; a shorter one ends in places that are computed in vain.
        rank = (keep.cumsum(1) - 1)[keep]
        most = int(rank.max()) + 1
        place = rows // new * most + rank
        token = rows.new_full((batch * most,), -1).index_copy_(0, place, rows % new).view(batch, most)
        queries = queries_N.new_zeros(batch * most, *queries_N.shape[1:]).index_copy_(0, place, queries_N)
        queries = queries.view(batch, most, *queries_N.shape[1:]).transpose(1, 2)
        heads = []
        for some, chunk in zip(queries.split(CHUNK, 2), token.split(CHUNK, 1), strict=True):
            mask = given.rows(chunk.clamp(min=0), keys.shape[2])
            begin, end = 0, keys.shape[2]
            if mask is not None:
                visible = _visible(mask) & (chunk >= 0)[:, None, :, None]
                seen = visible.flatten(0, 2).any(0).nonzero()[:, 0]
                begin, end = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)
                # No row of the softmax is empty: places computed in vain see everything.
                empty = ~visible.any(-1, keepdim=True)
                mask = (mask | empty if mask.dtype == torch.bool else mask.masked_fill(empty, 0))[..., begin:end]
            heads.append(F.scaled_dot_product_attention(
                some, keys[:, :, begin:end], values[:, :, begin:end], mask, self.dropout, scale=self.scaling,
                enable_gqa=self.kv_heads != self.heads,
            ))
        return torch.cat(heads, dim=2).transpose(1, 2).flatten(0, 1).index_select(0, place)

    @property
    def scaling(self) -> float:
        """What the scores are multiplied by."""
        return float(getattr(self.attention, "scaling", self.head_width**-0.5))

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LayerState:
        """A place for what the model hands over; the decoding state is the model's cache."""
        return LayerState()

    def state_bytes(self, length: int) -> int:
        """Bytes per sequence that the model's cache keeps of this layer without a window."""
        weight = next(self.attention.parameters())
        return 2 * self.kv_heads * self.head_width * length * weight.element_size()


class FusedAttention(PretrainedAttention):
    """GPT-2's attention: one map for queries, keys and values (``c_attn``, ``c_proj``), no rotary positions."""

    def _part(self, x: Tensor, part: slice) -> Tensor:
        maps = self.attention.c_attn
        if not type(maps).__name__.endswith("Conv1D"):  # Wrapped, by a LoRA say: it cannot be asked for some columns.
            return maps(x)[..., part]
        return F.linear(x, maps.weight[:, part].T, maps.bias[part])

    def query(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N H K"]:
        """Queries of tokens."""
        return self._part(x, slice(0, self.heads * self.head_width)).unflatten(-1, (self.heads, self.head_width))

    def keys_values(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
        """Keys and values."""
        both = self._part(x, slice(self.heads * self.head_width, None)).unflatten(-1, (2, self.heads, self.head_width))
        return both[..., 0, :, :], both[..., 1, :, :]

    def output(self, heads: Float[Tensor, "N H K"]) -> Float[Tensor, "N D"]:
        """Output projection and the residual dropout."""
        y: Tensor = self.attention.resid_dropout(self.attention.c_proj(heads.flatten(-2)))
        return y

    @property
    def dropout(self) -> float:
        """Share of attention weights that training drops."""
        return float(self.attention.attn_dropout.p) if self.training else 0.0


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (..., H, K) rotated by the angles (..., K) of their tokens; channel i turns with channel i + K/2."""
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(-2) + torch.cat([-second, first], -1) * sin.unsqueeze(-2)


class PretrainedFeedForward(FeedForward):
    """The feed-forward of a pretrained layer; ``scale`` multiplies its output."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.scale = 1.0

    def forward(self, x: Float[Tensor, "*B D"], mask: Bool[Tensor, "*B"] | None = None) -> Float[Tensor, "*B D"]:
        """Transform every token."""
        y: Tensor = self.network(x)
        return y if self.scale == 1 else y * self.scale


class PretrainedBlock(Block):
    """A pretrained pre-norm layer as a :class:`~gatework.depth.base.Block`, made of the layer's own modules."""

    def __init__(self, mixer_norm: nn.Module, mixer: PretrainedAttention, feedforward_norm: nn.Module, network: nn.Module) -> None:
        nn.Module.__init__(self)
        self.mixer_norm: Any = mixer_norm
        self.mixer: Any = mixer
        self.feedforward_norm: Any = feedforward_norm
        self.feedforward: Any = PretrainedFeedForward(network)


class Runner(nn.Module):
    """Stands where a model's list of layers stood, as its only layer, and runs them by a depth policy.

    Takes what the model hands a layer and returns what it expects back.
    """

    def __init__(self, policy: BlockPolicy, layer: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        signature = inspect.signature(type(layer).forward)
        self._names = list(signature.parameters)[1:]
        self._in_tuple = "tuple" in str(signature.return_annotation)  # transformers 5.0's GPT-2
        if hasattr(layer, "attention_type"):
            self.attention_type = layer.attention_type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the policy over all layers."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if given.get("output_hidden_states"):
            raise PartError("a model whose layers a depth policy runs has no hidden states of single layers to hand out")
        x: Tensor = given.pop("hidden_states")
        call = Pass(given, x)
        state = self.policy.init_state(len(x))
        if not isinstance(state, DepthState) or len(state.layers) != len(self.policy.blocks):
            raise PartError(f"{type(self.policy).__name__} keeps a state of its own and cannot run pretrained layers")
        for slot in state.layers:
            slot.given = call  # type: ignore[attr-defined]
        x = self.policy(x, state=state, mask=call.real())
        return (x,) if self._in_tuple else x


def adapt(model: nn.Module, layout: Layout | None = None) -> list[PretrainedBlock]:
    """The layers of a pretrained model as blocks.

    Raises:
        PartError: for a layout without pre-norm residual branches, attention layers of several kinds, cross-attention, an attention
            implementation other than sdpa and eager, blocks that a depth policy runs already.
    """
    layout = layout or describe(model)
    config: Any = model.config
    kinds = sorted(set(getattr(config, "layer_types", None) or []))
    problem, part = None, model.get_submodule
    if layout.policy is not None:
        problem = f"its blocks are run by {layout.policy} already; undo that conversion first"
    elif not layout.pre_norm:
        problem = f"the blocks of {layout.family} norm the sum, so that no pre-norm residual branch can be skipped"
    elif len(kinds) > 1:
        problem = f"its attention layers are of several kinds ({', '.join(kinds)}), which get different masks"
    elif config._attn_implementation not in IMPLEMENTATIONS:
        problem = f"it runs with the attention implementation {config._attn_implementation}; sdpa and eager work"
    elif getattr(config, "add_cross_attention", False):
        problem = "its blocks have cross-attention"
    elif any(isinstance(getattr(part(block.attention), "part", None), SequenceMixer) for block in layout.blocks):
        problem = "its attention has been replaced by another mixer; undo that conversion first"
    elif getattr(config, "scale_attn_by_inverse_layer_idx", False) or getattr(config, "reorder_and_upcast_attn", False) \
            or not getattr(config, "scale_attn_weights", True):
        problem = "its attention scales the scores in a way of its own; only 1 / sqrt(head width) is known"
    if problem:
        raise PartError(f"a depth policy cannot run the layers of this {layout.model}: {problem}")
    kind: Callable[..., PretrainedAttention] = FusedAttention if layout.family == "gpt2" else PretrainedAttention
    return [
        PretrainedBlock(
            part(block.mixer_norm), kind(part(block.attention), block.heads, block.kv_heads, block.head_width),
            part(block.feedforward_norm), part(block.feedforward[0]),
        )
        for block in layout.blocks
    ]
