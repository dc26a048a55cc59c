"""Original positions where mlx-vlm counts: rotary embeddings that are told where."""

import functools

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..models.positions import At, PositionedRoPE

_NAMES = ("rope", "rotary_emb")  # of rotary embeddings in mlx-vlm's attention


class Positions:
    """Where the tokens of the one prompt that is read are, and those that follow it."""

    def __init__(self, original: bool):
        self._original = original
        self._columns: np.ndarray | None = None
        self._read: tuple[int, int] | None = None  # from where, to where, at last

    def reset(self) -> None:
        self._columns = self._read = None

    def set(self, columns: np.ndarray) -> None:
        """columns: (B, L) of the full prompt that stayed."""
        self.reset()
        if self._original:
            if len(columns) > 1:
                raise InputError(
                    "original positions are those of one prompt at a time in mlx-vlm; "
                    "attach with contiguous ones for batches"
                )
            self._columns = columns[0]

    def at(self, offset, length: int):
        """For `length` tokens behind `offset` others: an offset, or `At` positions."""
        columns = self._columns
        if columns is None:
            return offset
        if isinstance(offset, mx.array):
            if offset.size > 1:
                raise InputError(
                    "original positions are those of one prompt at a time in mlx-vlm; "
                    "attach with contiguous ones for batches and the server"
                )
            offset = int(offset.item())
        dropped = int(columns[-1]) + 1 - len(columns)
        if offset >= len(columns):
            return offset + dropped
        numbers = np.arange(offset, offset + length)
        inside = columns[np.minimum(numbers, len(columns) - 1)]
        found = np.where(numbers < len(columns), inside, numbers + dropped)
        return At(mx.array(found.astype(np.int32)))

    def follow(self, offset, length: int) -> None:
        """Raise `InputError` for tokens that do not follow what was read last."""
        if isinstance(offset, mx.array):
            if self._columns is None or offset.size > 1:
                return
            offset = int(offset.item())
        if self._read is not None and offset not in self._read:
            raise InputError(
                "another prompt was begun before this answer ended, and original "
                "positions are those of one at a time in mlx-vlm; read answers one "
                "after the other, or attach with contiguous positions"
            )
        self._read = (offset, offset + length)

    def attach(self, language, undos: list) -> None:
        """Have every rotary embedding of a language model ask."""
        if not self._original:
            return
        owners = [
            (_layer_of(path), module, name)
            for path, module in language.named_modules()
            for name in _NAMES
            if isinstance(module.get(name), nn.Module)
        ]
        if not owners:
            raise InputError(
                "the rotary embeddings of this model are not known here; expected "
                "contiguous positions"
            )
        first = min(layer for layer, *_ in owners)  # others may share its keys
        for layer, owner, name in owners:
            undos.append(functools.partial(setattr, owner, name, owner[name]))
            setattr(owner, name, _AskingRoPE(owner[name], self, layer == first))


def _layer_of(path: str) -> int:
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


class _AskingRoPE(nn.Module):
    def __init__(self, rope: nn.Module, positions: Positions, first: bool):
        super().__init__()
        self._rope, self._positions = PositionedRoPE(rope), positions
        self._first = first  # one of them is enough to see what is read

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        if self._first:
            self._positions.follow(offset, x.shape[-2])
        return self._rope(x, self._positions.at(offset, x.shape[-2]))
