"""Token positions and cache lengths of one call, in place of mlx-lm's cache offset."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class TokenPositions:
    """Positions (L,) or (B, L), passed where mlx-lm passes a cache offset."""

    positions: mx.array


class PositionedRoPE(nn.Module):
    """mlx-lm's rotary embedding, which also takes one position per token."""

    def __init__(self, rope: nn.Module):
        super().__init__()
        self.rope = rope

    def __call__(
        self, x: mx.array, offset: int | mx.array | TokenPositions = 0
    ) -> mx.array:
        """Rotate (B, heads, L, D); the shape is kept."""
        if not isinstance(offset, TokenPositions):
            return self.rope(x, offset=offset)
        # MLX's RoPE takes one offset per batch row: give every token a batch row.
        batch, heads, length, size = x.shape
        rows = x.swapaxes(1, 2).reshape(batch * length, heads, 1, size)
        offsets = mx.broadcast_to(offset.positions, (batch, length)).reshape(-1)
        rows = self.rope(rows, offset=offsets)
        return rows.reshape(batch, length, heads, size).swapaxes(1, 2)


class LayerCache:
    """Keys and values of one layer, as mlx-lm's layers and `generate_step` take them.

    inner: mlx-lm's cache; `None` keeps nothing. shift: position of the next token less
    the length of the cache. at: positions (L,) or (B, L) of the next tokens to read;
    they replace length and shift. visible: (B, S) bool, true for those of the first S
    tokens that later tokens attend to; `None` for all.
    """

    def __init__(
        self,
        inner: Any = None,
        shift: int | mx.array = 0,
        at: mx.array | None = None,
        visible: mx.array | None = None,
    ):
        self.inner, self.shift, self.at, self.visible = inner, shift, at, visible

    @property
    def offset(self) -> int | mx.array | TokenPositions:
        """Position of the next token, or positions of the next tokens."""
        if self.at is not None:
            return TokenPositions(self.at)
        return (self.inner.offset if self.inner is not None else 0) + self.shift

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Append keys and values (B, H, L, d); return all (B, H, S, d)."""
        if self.inner is None:
            return keys, values
        return self.inner.update_and_fetch(keys, values)

    def make_mask(self, length: int, **options: Any) -> mx.array | str | None:
        """Return the mask of the next `length` tokens, which mlx-lm calls for.

        options: those of mlx-lm's `make_mask`. Padding is masked.
        """
        if self.visible is not None:
            return follow_mask(self, length)
        return self.inner.make_mask(length, **options)

    # A property: mlx-lm tests `hasattr` to learn whether a cache can be quantized.
    @property
    def to_quantized(self) -> Callable[..., "LayerCache"]:
        """mlx-lm's `to_quantized` of the inner cache, which keeps shift and mask."""
        quantize = self.inner.to_quantized  # missing once the cache is quantized
        return lambda **options: LayerCache(
            quantize(**options), self.shift, None, self.visible
        )

    def __getattr__(self, name: str) -> Any:
        # `__dict__`: copying makes an object without `inner`, which would recurse.
        return getattr(self.__dict__.get("inner"), name)


def follow_mask(cache: LayerCache, length: int) -> mx.array | str | None:
    """Return the mask of the `length` tokens after those in the cache.

    "causal", `None` (all tokens are visible), or bool that broadcasts to (B, 1, L, S).
    """
    if cache.visible is None:
        return "causal" if length > 1 else None
    batch, masked = cache.visible.shape
    ones = mx.ones((batch, cache.inner.offset + length - masked), mx.bool_)
    visible = mx.concatenate([cache.visible, ones], axis=1)[:, None, None]
    if length == 1:
        return visible
    total = visible.shape[-1]
    return visible & mx.tri(length, total, total - length, mx.bool_)
