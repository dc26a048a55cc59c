"""Rotary positions of a pruned prompt, wrapped around mlx-lm's layers.

mlx-lm numbers tokens by the cache offset, so kept visual tokens get contiguous
positions. `Positions` gives each prompt token a number of its own, and the tokens
decoded after the prompt the numbers that follow it.
"""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn


class Positions:
    """The positions in force; contiguous outside `using`."""

    def __init__(self):
        self._values: mx.array | None = None
        self._shift = 0

    @contextlib.contextmanager
    def using(self, values: mx.array | None, shift: int = 0) -> Iterator[None]:
        """In the block, prompt token t is at `values[..., t]`, (T,) or (B, T) int32.

        Tokens after the prompt are at their cache offset plus `shift`. `None` means
        contiguous positions.
        """
        before = self._values, self._shift
        self._values, self._shift = values, shift
        try:
            yield
        finally:
            self._values, self._shift = before

    def of_prompt(self, offset: int, length: int) -> mx.array | None:
        """(..., L) positions of prompt tokens; `None` where a plain offset does."""
        if self._values is None or offset >= self._values.shape[-1]:
            return None
        if offset + length > self._values.shape[-1]:
            raise ValueError("one call may not cross the end of the prompt")
        return self._values[..., offset : offset + length]

    @property
    def shift(self) -> int:
        return self._shift


class PositionedRoPE(nn.Module):
    """A rotary embedding that takes its positions from `Positions`."""

    def __init__(self, rope: nn.Module, positions: Positions):
        super().__init__()
        self.rope = rope
        self._positions = positions

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        """(B, heads, L, D) -> the same, rotated."""
        where = self._positions.of_prompt(offset, x.shape[2])
        if where is None:
            return self.rope(x, offset=offset + self._positions.shift)
        # RoPE takes one offset per batch row: give every token a row of its own, also
        # where one would do, since a vector of offsets is what is tested.
        batch, heads, length, size = x.shape
        rows = x.swapaxes(1, 2).reshape(batch * length, heads, 1, size)
        offsets = mx.broadcast_to(where, (batch, length)).reshape(-1)
        rows = self.rope(rows, offset=offsets)
        return rows.reshape(batch, length, heads, size).swapaxes(1, 2)


def use_positions(layers: list, positions: Positions) -> None:
    """Wrap the rotary embedding of each mlx-lm layer."""
    for layer in layers:
        layer.self_attn.rope = PositionedRoPE(layer.self_attn.rope, positions)
