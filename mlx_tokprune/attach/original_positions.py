"""Original positions in mlx-vlm, by rotary embeddings that take a position per token.

mlx-vlm's layers count positions by their caches, which hold the kept tokens alone.
"""

import functools
import sys
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..models.positions import PositionedRoPE, TokenPositions

_NAMES = ("rope", "rotary_emb")  # of rotary embeddings in mlx-vlm's attention


class Positions:
    """Original positions of the prompt that is read, and of the tokens behind it.

    mlx-vlm's layers count by their caches, so the positions of the prompt are kept here
    between calls, for one prompt at a time.
    """

    def __init__(self, original: bool):
        self._original = original
        self._columns: np.ndarray | None = None
        # Start and end of the last read tokens: the next ones must follow these.
        self._read: tuple[int, int] | None = None

    def reset(self) -> None:
        """Forget the prompt: positions are those of the cache again."""
        self._columns = self._read = None

    def set(self, columns: np.ndarray) -> None:
        """Set the kept columns (B, L) of a full prompt.

        Raises `InputError` for original positions of more than one prompt.
        """
        self.reset()
        if self._original:
            if len(columns) > 1:
                raise InputError(
                    "original positions are those of one prompt at a time in mlx-vlm; "
                    "attach with contiguous ones for batches"
                )
            self._columns = columns[0]

    def at(
        self, offset: int | mx.array, length: int
    ) -> int | mx.array | TokenPositions:
        """Return the positions of `length` tokens behind `offset` tokens of the cache.

        An offset where positions are contiguous, else `TokenPositions` (length,).
        Raises `InputError` for offsets of more than one prompt.
        """
        columns = self._columns
        if columns is None:
            return offset
        if isinstance(offset, mx.array):
            if offset.size > 1:
                raise InputError(
                    "original positions are those of one prompt at a time in mlx-vlm; "
                    "attach with contiguous ones for batches and the server"
                )
            offset = cast(int, offset.item())
        dropped = int(columns[-1]) + 1 - len(columns)
        if offset >= len(columns):
            return offset + dropped
        numbers = np.arange(offset, offset + length)
        inside = columns[np.minimum(numbers, len(columns) - 1)]
        positions = np.where(numbers < len(columns), inside, numbers + dropped)
        return TokenPositions(mx.array(positions.astype(np.int32)))

    def follow(self, offset: int | mx.array, length: int) -> None:
        """Raise `InputError` for tokens that do not follow the last read ones."""
        if isinstance(offset, mx.array):
            if self._columns is None or offset.size > 1:
                return
            offset = cast(int, offset.item())
        if self._read is not None and offset not in self._read:
            raise InputError(
                "another prompt was begun before this answer ended, and original "
                "positions are those of one at a time in mlx-vlm; read answers one "
                "after the other, or attach with contiguous positions"
            )
        self._read = (offset, offset + length)

    def attach(self, language: nn.Module, undos: list) -> None:
        """Replace every rotary embedding of a language model by an `_OriginalRoPE`.

        undos: gets a function for each that puts mlx-vlm's back. Raises `InputError`
        for a model without rotary embeddings under a name of `_NAMES`.
        """
        if not self._original:
            return
        owners = [
            (_layer_of(path), module, name)
            for path, module in language.named_modules()
            for name in _NAMES
            if isinstance(module.get(name), nn.Module)
            # Muse Spark's kernel takes the base of a rotary embedding and rotates.
            and not hasattr(sys.modules[type(module).__module__], "qk_norm_rope")
        ]
        if not owners:
            raise InputError(
                "the rotary embeddings of this model are not supported; expected "
                "contiguous positions"
            )
        first = min(layer for layer, *_ in owners)  # later layers may share its keys
        for layer, owner, name in owners:
            undos.append(functools.partial(setattr, owner, name, owner[name]))
            setattr(owner, name, _OriginalRoPE(owner[name], self, layer == first))


def _layer_of(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


class _OriginalRoPE(nn.Module):
    """Rotary embedding that gets its positions from `Positions`, not from the cache."""

    def __init__(self, rope: nn.Module, positions: Positions, first: bool):
        super().__init__()
        self._rope, self._positions = PositionedRoPE(rope), positions
        self._first = first  # one layer is enough to follow what is read

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        if self._first:
            self._positions.follow(offset, x.shape[-2])
        return self._rope(x, self._positions.at(offset, x.shape[-2]))
