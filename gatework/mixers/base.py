"""What mixers share: the checks of what they are called with; for attention rotary positions and the key-value cache; for
recurrent mixers padding, kept tokens and the short convolution.

Rotary embedding: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv 2104.09864, eq. 34; the
pairs are channel i and channel i + K/2 (the layout of Llama), so weights of those models fit.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gatework.core.contracts import No, SequenceMixer, State, capability
from gatework.core.errors import PartError


def check_call(
    mixer: SequenceMixer, d_model: int, x: Tensor, state: State | None, state_type: type[State] | None, mask: Tensor | None,
    segments: Tensor | None, keep: Tensor | None,
) -> None:
    """Refuse what a mixer of width ``d_model`` cannot be called with.

    Raises:
        PartError: x of another shape than (B, T, d_model), a mask or ``keep`` that is not one bool per token, ``segments`` that
            are not one whole number per token, a state that is not the mixer's or of another batch, a state beside ``segments``;
            a state or ``segments`` where the mixer can do nothing with them.
    """
    name = type(mixer).__name__
    part = getattr(mixer, "part_name", name)
    if state is not None and not capability(mixer, "decodes"):
        raise PartError(f"{part} sees later tokens: it cannot decode with a state")
    if segments is not None and not (answer := capability(mixer, "packs")):
        raise PartError(f"{part} takes no segments ({answer})")
    if x.dim() != 3 or x.shape[-1] != d_model:
        raise PartError(f"{name} was built for inputs of shape (batch, time, {d_model}), not {tuple(x.shape)}")
    for what, given in (("mask", mask), ("keep", keep)):
        if given is not None and (given.shape != x.shape[:2] or given.dtype != torch.bool):
            wanted = tuple(x.shape[:2])
            raise PartError(f"{what} has one bool per token, shape {wanted}, not {tuple(given.shape)} of {given.dtype}")
    if segments is not None and (segments.shape != x.shape[:2] or segments.is_floating_point()):
        wanted = tuple(x.shape[:2])
        raise PartError(f"segments has one whole number per token, shape {wanted}, not {tuple(segments.shape)} of {segments.dtype}")
    if state is None:
        return
    if state_type is None or not isinstance(state, state_type):
        raise PartError(f"{name} continues from its own init_state, not from a {type(state).__name__}")
    if segments is not None:
        raise PartError("segments are for the parallel form: packed documents cannot be decoded with a state")
    if state.batch_size != len(x):
        raise PartError(f"the state holds {state.batch_size} sequences and the input {len(x)}: they are rows of one batch")


def check_heads(d_model: int, heads: int, kv_heads: int | None = None) -> None:
    """Refuse heads that do not share out the width, or the heads among the key-value heads.

    Raises:
        ValueError: saying what does not divide.
    """
    if heads < 1 or d_model % heads:
        raise ValueError(f"d_model {d_model} is not divisible by heads {heads}")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        raise ValueError(f"heads {heads} is not divisible by kv_heads {kv_heads}")


def check_chunk(chunk: int) -> None:
    """Refuse chunk lengths that the gated linear recurrence does not halve.

    Raises:
        ValueError: for what is no power of two of at least 4.
    """
    if chunk < 4 or chunk & (chunk - 1):
        raise ValueError(f"chunk must be a power of two of at least 4, got {chunk}")


class TwoSided(SequenceMixer):
    """A mixer that sees both sides of every token, whatever its settings: it has no decoding state."""

    capabilities = SequenceMixer.capabilities | {"causal": No("it sees later tokens"), "decodes": No("it sees later tokens")}

    def init_state(
        self, batch_size: int, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """Refused: there is no decoding."""
        raise self._stateless()

    def state_bytes(self, length: int) -> int:
        """Refused: there is no decoding."""
        raise self._stateless()

    def _stateless(self) -> PartError:
        return PartError(f"{getattr(self, 'part_name', type(self).__name__)} sees later tokens: it has no decoding state")


class RecurrentMixer(SequenceMixer):
    """A mixer made of recurrences, whose decoding state has one size, whatever the length.

    A method writes :meth:`mix`, and :meth:`output` for what happens to each token alone at its end. ``forward`` refuses wrong
    input, and moves the real tokens of each row to its front, so that padding is only ever behind them, and back.
    """

    state_type: ClassVar[type[State]]
    d_model: int

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
        keep: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Mix the sequence; see :class:`~gatework.core.contracts.SequenceMixer`."""
        check_call(self, self.d_model, x, state, self.state_type, mask, segments, keep)
        if mask is None:
            return self.mix(x, state, None, segments, _places(keep))
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        place = torch.arange(x.shape[1], device=x.device)
        count = mask.sum(1, keepdim=True)
        real = place < count
        x = x.gather(1, order[..., None].expand_as(x)).masked_fill(~real[..., None], 0)
        if segments is not None:
            # Padding belongs to its row's last document.
            segments = segments.gather(1, order.gather(1, place.minimum((count - 1).clamp(min=0))))
        if keep is not None:
            keep = keep.gather(1, order)
        y = self.mix(x, state, real, segments, _places(keep))
        return torch.empty_like(y).scatter(1, order[..., None].expand_as(y), y)

    @abstractmethod
    def mix(
        self,
        x: Float[Tensor, "B T D"],
        state: State | None,
        real: Bool[Tensor, "B T"] | None,
        segments: Int[Tensor, "B T"] | None,
        kept: Int[Tensor, "N"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Mix sequences whose padding, all zeros, is at their ends.

        Args:
            x: tokens.
            state: an instance of ``state_type`` to continue from and to update, of which padding changes nothing.
            real: True for the real tokens, the first of each row; None where all are.
            segments: ids of packed documents, where there is no state.
            kept: flat places (b T + t) of the tokens whose outputs are wanted, the others' being 0; None for all.
        """

    def output(self, o: Float[Tensor, "*B V"], x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the mixer returns for the tokens ``x``, from what it has read for them, ``o``."""
        raise NotImplementedError

    def outputs(
        self, o: Float[Tensor, "B T *V"], x: Float[Tensor, "B T D"], kept: Int[Tensor, "N"] | None
    ) -> Float[Tensor, "B T D"]:
        """:meth:`output` of the kept tokens, 0 elsewhere."""
        if kept is None:
            return self.output(o, x)
        return put(self.output(take(o, kept), take(x, kept)), kept, x.shape[:2])


def _places(keep: Tensor | None) -> Tensor | None:
    return None if keep is None else keep.flatten().nonzero()[:, 0]


def take(x: Float[Tensor, "B T *rest"], kept: Int[Tensor, "N"]) -> Float[Tensor, "N *rest"]:
    """The tokens at the flat places ``kept``."""
    return x.flatten(0, 1).index_select(0, kept)


def put(rows: Float[Tensor, "N *rest"], kept: Int[Tensor, "N"], shape: torch.Size) -> Float[Tensor, "B T *rest"]:
    """Zeros of ``shape`` (B, T) tokens with ``rows`` at the flat places ``kept``."""
    return rows.new_zeros(shape.numel(), *rows.shape[1:]).index_copy(0, kept, rows).unflatten(0, shape)


def of_kept(layer: nn.Module, x: Float[Tensor, "B T D"], kept: Int[Tensor, "N"] | None) -> Float[Tensor, "B T *rest"]:
    """``layer(x)`` for the kept tokens, 0 elsewhere."""
    y: Tensor = layer(x) if kept is None else put(layer(take(x, kept)), kept, x.shape[:2])
    return y


class ShortConvolution(nn.Module):
    """A causal convolution of each channel over ``width`` tokens, then SiLU: ``y_t = silu(sum_j w_j x_{t - width + 1 + j})``.

    Args:
        channels: C.
        width: tokens that an output sees, its own being the last (weight ``w[:, -1]``).

    Initialisation: uniform up to ``width**-0.5``, as PyTorch's convolutions start.
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"the width of a short convolution must be at least 1, got {width}")
        self.weight = nn.Parameter(torch.empty(channels, width).uniform_(-(width**-0.5), width**-0.5))

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.weight.shape[0]}, width={self.weight.shape[1]}"

    def init_tail(self, batch_size: int, dtype: torch.dtype, device: torch.device | str) -> Float[Tensor, "B W C"]:
        """What an empty sequence has behind it: zeros for ``width - 1`` tokens."""
        channels, width = self.weight.shape
        return torch.zeros(batch_size, width - 1, channels, dtype=dtype, device=device)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        tail: Float[Tensor, "B W C"] | None = None,
        real: Bool[Tensor, "B T"] | None = None,
        segments: Int[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B W C"]]:
        """The outputs, and the last ``width - 1`` real inputs, for the next call.

        Args:
            x: inputs.
            tail: the inputs before them; None is zeros.
            real: True for real tokens, the first of each row; None where all are.
            segments: ids of packed documents, which do not see each other.
        """
        before, length = self.weight.shape[1] - 1, x.shape[1]
        tail = x.new_zeros(len(x), before, x.shape[2]) if tail is None else tail.to(x.dtype)
        y: Tensor = _Convolution.apply(x, self.weight.to(x.dtype), tail, segments)
        if length == 0 or before == 0:
            return y, tail
        if real is not None:
            last = real.sum(1)[:, None] + torch.arange(-before, 0, device=x.device)  # Negative: still in the old tail.
            place = last[..., None].expand_as(tail)
            tail = torch.where(place < 0, tail.gather(1, (place + before).clamp(max=before - 1)), x.gather(1, place.clamp(min=0)))
        elif length < before:
            tail = torch.cat([tail[:, length:], x], 1)
        else:
            tail = x[:, length - before :].clone()  # A view would keep all inputs in memory.
        return y, tail


class _Convolution(torch.autograd.Function):
    """``silu(sum_j w_j x_{t - width + 1 + j})`` in one pass over the tokens per weight; keeps x and the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, tail: Tensor, segments: Tensor | None) -> Tensor:
        (before, length), weights = (tail.shape[1], x.shape[1]), weight.t().contiguous()
        total = x * weights[-1]
        for back in range(1, before + 1):
            w, near = weights[before - back], min(back, length)
            total[:, near:].addcmul_(_within(x[:, : length - near], segments, near), w)
            if segments is None:
                total[:, :near].addcmul_(tail[:, before - back : before - back + near], w)
        ctx.save_for_backward(x, weight, tail, segments, total)
        return F.silu(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, tail, segments, total = ctx.saved_tensors
        (before, length), weights = (tail.shape[1], x.shape[1]), weight.t().contiguous()
        d_total = torch.ops.aten.silu_backward(d_out, total)
        d_x, d_tail, d_weights = d_total * weights[-1], torch.zeros_like(tail), [(d_total * x).sum((0, 1))]
        for back in range(1, before + 1):
            w, near = weights[before - back], min(back, length)
            later = _within(d_total[:, near:], segments, near)
            d_x[:, : length - near].addcmul_(later, w)
            d_w = (later * x[:, : length - near]).sum((0, 1))
            if segments is None:
                first, span = d_total[:, :near], slice(before - back, before - back + near)
                d_tail[:, span].addcmul_(first, w)
                d_w += (first * tail[:, span]).sum((0, 1))
            d_weights.append(d_w)
        return d_x, torch.stack(d_weights[::-1], 1), d_tail, None


def _within(x: Tensor, segments: Tensor | None, distance: int) -> Tensor:
    """Rows for pairs of tokens at this distance, 0 where the two belong to different documents."""
    if segments is None:
        return x
    return x * (segments[:, distance:] == segments[:, : segments.shape[1] - distance])[..., None]


def rotary_angles(
    positions: Int[Tensor, "*B"], width: int, base: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "*B K2"], Float[Tensor, "*B K2"]]:
    """Cosine and sine of ``position * base^(-2i/width)`` for i = 0 .. width/2 - 1, in float32 or better.

    Args:
        positions: token positions, any shape.
        width: channels that are rotated, even.
        base: wavelength base (10000 in the paper).
        dtype: the model's dtype; float64 gives float64 angles, everything else float32.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(0, width, 2, device=positions.device, dtype=dtype)
    angles = positions.to(dtype)[..., None] * base ** (-pairs / width)
    return angles.cos(), angles.sin()


def rotate(x: Float[Tensor, "*B H K"], cos: Float[Tensor, "*#B K2"], sin: Float[Tensor, "*#B K2"]) -> Float[Tensor, "*B H K"]:
    """Rotate each channel pair (i, i + K/2) of every head by the token's angles; the dtype of ``x`` is kept."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)


@dataclass
class KVCache(State):
    """Keys and values of the tokens fed so far, H key-value heads of width K, with room to grow.

    Slots ``end - length .. end - 1`` of the buffers are in use, oldest first. A row's tokens are aligned right: where padding was
    fed, its slots are removed and the free slots of shorter rows are on the left, so the last slot always holds each row's last
    real token. Appending doubles the room when it is used up, so feeding T tokens one by one copies O(T) entries in all;
    while gradients are enabled every call copies what is there instead. With a ``window`` only the last ``window`` slots stay in
    use.
    """

    keys: Float[Tensor, "B H room K"]
    values: Float[Tensor, "B H room K"]
    window: int | None = None
    #: Slots in use.
    length: int = 0
    #: Index behind the last used slot.
    end: int = 0
    #: Tokens fed, padding included.
    fed: int = 0
    #: Real tokens fed, per row; None while no padding mask was given, when it is ``fed`` for all.
    real: Int[Tensor, "B"] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the sequence needs: the used slots, without the room to grow."""
        batch, heads, _, width = self.keys.shape
        counts = 0 if self.real is None else self.real.numel() * self.real.element_size()
        return 2 * batch * heads * self.length * width * self.keys.element_size() + counts

    def positions(self, length: int, mask: Bool[Tensor, "B T"] | None) -> Int[Tensor, "#B T"]:
        """Positions of the next ``length`` tokens: each counts the real tokens of its row before it."""
        device = self.keys.device
        if mask is not None:
            new = mask.cumsum(1) - 1
            return new + (self.fed if self.real is None else self.real[:, None])
        new = torch.arange(length, device=device)[None]
        return new + (self.fed if self.real is None else self.real[:, None])

    def slot_positions(self) -> Int[Tensor, "#B S"]:
        """Positions of the tokens in the used slots; negative where a slot is empty."""
        slots = torch.arange(-self.length, 0, device=self.keys.device)[None]
        return slots + (self.fed if self.real is None else self.real[:, None])

    def used(self) -> tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """Keys and values of the used slots."""
        span = slice(self.end - self.length, self.end)
        return self.keys[:, :, span], self.values[:, :, span]

    def append(
        self, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"]
    ) -> tuple[Float[Tensor, "B H S K"], Float[Tensor, "B H S K"]]:
        """Add T real tokens to every row; returns the S entries that they may attend to (all used slots before, then their own)."""
        new = keys.shape[2]
        need = self.length + new
        if torch.is_grad_enabled():
            # Writing in place would spoil what the backward pass saved, be it for the queries alone.
            past_keys, past_values = self.used()
            self.keys = torch.cat([past_keys, keys.to(self.keys.dtype)], dim=2)
            self.values = torch.cat([past_values, values.to(self.values.dtype)], dim=2)
            self.end = need
        else:
            if self.end + new > self.keys.shape[2]:
                self.make_room(max(16, need, 2 * (need if self.window is None else min(need, self.window))))
            self.keys[:, :, self.end : self.end + new] = keys
            self.values[:, :, self.end : self.end + new] = values
            self.end += new
        self.length = need
        entries = self.used()
        self.length = need if self.window is None else min(need, self.window)
        self.fed += new
        if self.real is not None:
            self.real = self.real + new
        return entries

    def append_masked(self, keys: Float[Tensor, "B H T K"], values: Float[Tensor, "B H T K"], mask: Bool[Tensor, "B T"]) -> None:
        """Add the real tokens of every row; what they may attend to is :meth:`used` before this call and their own entries."""
        past_keys, past_values = self.used()
        empty = self.slot_positions() < 0
        taken = torch.cat([~empty.expand(len(mask), -1), mask], dim=1)
        # A stable sort by "taken" moves the real entries to the right and keeps their order.
        order = taken.to(torch.int8).argsort(dim=1, stable=True)
        if self.window is not None:
            order = order[:, -self.window :]
        index = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        keys = torch.cat([past_keys, keys.to(self.keys.dtype)], dim=2).gather(2, index)
        values = torch.cat([past_values, values.to(self.values.dtype)], dim=2).gather(2, index)
        self.length = self.end = order.shape[1]
        if torch.is_grad_enabled() or self.length > self.keys.shape[2]:
            self.keys, self.values = keys, values
        else:
            self.keys[:, :, : self.length], self.values[:, :, : self.length] = keys, values
        real = mask.sum(1)
        self.real = real + (self.fed if self.real is None else self.real)
        self.fed += mask.shape[1]

    def remove(self, tokens: int) -> None:
        """Take back the last ``tokens`` tokens, all of them real; a window may have dropped what they replaced."""
        if self.window is not None or tokens > self.length:
            raise ValueError(f"{tokens} tokens cannot be taken back from {self.length} with window {self.window}")
        self.length, self.end, self.fed = self.length - tokens, self.end - tokens, self.fed - tokens
        if self.real is not None:
            self.real = self.real - tokens

    def make_room(self, slots: int) -> None:
        """Have room for ``slots`` entries (at least those in use), so that appending up to there copies nothing."""
        slots = max(slots, self.length)
        past_keys, past_values = self.used()
        batch, heads, _, width = self.keys.shape
        self.keys = self.keys.new_empty(batch, heads, slots, width)
        self.values = self.values.new_empty(batch, heads, slots, width)
        self.keys[:, :, : self.length] = past_keys
        self.values[:, :, : self.length] = past_values
        self.end = self.length
