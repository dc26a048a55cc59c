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

    def reset(self) -> None:
        self._columns = None

    def set(self, columns: np.ndarray) -> None:
        """columns: (B, L) of the full prompt that stayed."""
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

    def attach(self, language, undos: list) -> None:
        """Have every rotary embedding of a language model ask."""
        if not self._original:
            return
        owners = [
            (module, name)
            for module in language.modules()
            for name in _NAMES
            if isinstance(module.get(name), nn.Module)
        ]
        if not owners:
            raise InputError(
                "the rotary embeddings of this model are not known here; expected "
                "contiguous positions"
            )
        for owner, name in owners:
            undos.append(functools.partial(setattr, owner, name, owner[name]))
            setattr(owner, name, _AskingRoPE(owner[name], self))


class _AskingRoPE(nn.Module):
    def __init__(self, rope: nn.Module, positions: Positions):
        super().__init__()
        self._rope, self._positions = PositionedRoPE(rope), positions

    def __call__(self, x: mx.array, offset=0) -> mx.array:
        return self._rope(x, self._positions.at(offset, x.shape[-2]))
