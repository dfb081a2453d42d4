"""What softmax-attention mixers share: rotary positions and the key-value cache.

Rotary embedding: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv 2104.09864, eq. 34; the
pairs are channel i and channel i + K/2 (the layout of Llama), so weights of those models fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatework.core.contracts import State


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
