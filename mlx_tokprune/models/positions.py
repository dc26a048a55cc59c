"""Positions and lengths that belong to a call, in place of mlx-lm's cache offset."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class At:
    """Positions (L,) or (B, L) in the place of mlx-lm's cache offset."""

    positions: mx.array


class PositionedRoPE(nn.Module):
    """mlx-lm's rotary embedding, which also takes a position for each token."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        """(B, heads, L, D) -> the same, rotated."""
        if not isinstance(offset, At):
            return self.rope(x, offset=offset)
        # RoPE takes one offset per batch row: give every token a row of its own.
        batch, heads, length, size = x.shape
        rows = x.swapaxes(1, 2).reshape(batch * length, heads, 1, size)
        offsets = mx.broadcast_to(offset.positions, (batch, length)).reshape(-1)
        rows = self.rope(rows, offset=offsets)
        return rows.reshape(batch, length, heads, size).swapaxes(1, 2)


class LayerCache:
    """One layer's keys and values, as mlx-lm's layers and `generate_step` take them.

    inner: mlx-lm's cache, or `None` to keep nothing. at: positions of the tokens that
    are read next. shift: what tokens without such add to the length of the cache.
    seen: (B, S) bool, which of the first S tokens later ones see; `None` for all.
    """

    def __init__(
        self, inner: Any = None, shift: int | mx.array = 0, at=None, seen=None
    ):
        self.inner, self.shift, self.at, self.seen = inner, shift, at, seen

    @property
    def offset(self):
        if self.at is not None:
            return At(self.at)
        return (self.inner.offset if self.inner is not None else 0) + self.shift

    def update_and_fetch(self, keys: mx.array, values: mx.array):
        if self.inner is None:
            return keys, values
        return self.inner.update_and_fetch(keys, values)

    def make_mask(self, length: int, **how):
        """As mlx-lm asks for it; padding is not seen."""
        if self.seen is not None:
            return follow_mask(self, length)
        return self.inner.make_mask(length, **how)

    @property
    def to_quantized(self):
        quantized = self.inner.to_quantized  # not there once it is quantized
        return lambda **how: LayerCache(quantized(**how), self.shift, None, self.seen)

    def __getattr__(self, name: str):
        return getattr(self.__dict__.get("inner"), name)


def follow_mask(cache: LayerCache, length: int) -> mx.array | str | None:
    """What `length` tokens after those in the cache see."""
    if cache.seen is None:
        return "causal" if length > 1 else None
    batch, known = cache.seen.shape
    ones = mx.ones((batch, cache.inner.offset + length - known), mx.bool_)
    seen = mx.concatenate([cache.seen, ones], axis=1)[:, None, None]
    if length == 1:
        return seen
    return seen & mx.tri(length, seen.shape[-1], seen.shape[-1] - length, mx.bool_)
