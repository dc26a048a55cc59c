"""Qwen's vision towers on part of the patches of a picture, at their original places.

mlx-vlm's tower code runs. It gets frames of fewer patches, and the rotary positions,
position embeddings and windows of the whole picture without the patches left out.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError

_GRIDDED = {"rot_pos_emb", "get_window_index", "fast_pos_embed_interpolate"}


@dataclass(frozen=True)
class Part:
    """Groups of a picture that a tower encodes.

    whole: (n, 3) grid of the picture. grid: (m, 3), a row for each frame with encoded
    patches, [1, number of those, 1]. groups: (K,) encoded groups. index: (N,) position
    in `groups` of the one that stands for each group. unit: patches of a group.
    """

    whole: mx.array
    grid: mx.array
    groups: np.ndarray
    index: np.ndarray
    unit: int

    @classmethod
    def of(cls, source: np.ndarray, whole: mx.array, unit: int) -> "Part":
        """Return the part of a picture whose groups stand for themselves.

        source: (N,) the group that stands for each. whole: (n, 3) grid of the picture.
        """
        encoded = source == np.arange(len(source))
        sizes = [[h * w // unit] * t for t, h, w in np.array(whole).tolist()]
        ends = np.cumsum(np.concatenate(sizes).astype(int))[:-1]
        counts = [int(frame.sum()) * unit for frame in np.split(encoded, ends)]
        grid = mx.array([[1, count, 1] for count in counts if count], whole.dtype)
        index = (np.cumsum(encoded) - 1)[source]
        return cls(whole, grid, np.flatnonzero(encoded), index, unit)

    def patches(self, rows: mx.array) -> mx.array:
        """Return the encoded patches of all patches (P, ...)."""
        own = self.groups[:, None] * self.unit + np.arange(self.unit)
        return rows[mx.array(own.ravel())]

    def windows(self, order: mx.array, ends: mx.array) -> tuple[mx.array, mx.array]:
        """Return windows of encoded groups, in the format of `get_window_index`.

        order: (N,) groups, window by window. ends: ends of windows, in patches, from 0.
        """
        groups = np.array(order)
        encoded = np.isin(groups, self.groups)
        before = np.concatenate([[0], np.cumsum(encoded)])
        fewer = before[np.array(ends) // self.unit] * self.unit
        return mx.array(self.index[groups[encoded]]), mx.array(np.unique(fewer))

    def filled(self, tokens: mx.array | list | tuple) -> Any:
        """Return (N, D) tokens of all groups from (K, D), or a list of such.

        A group that was left out gets the token of the group that it repeats.
        """
        if isinstance(tokens, (list, tuple)):
            return type(tokens)(self.filled(part) for part in tokens)
        return tokens[mx.array(self.index)]


def methods(
    tower: Any, source: Callable[[int], np.ndarray | None]
) -> dict[str, Callable]:
    """Return the methods that a subclass of the tower's class overrides, by name.

    source: for a picture of N groups, (N,) the group that stands for each, or `None`.
    Raises `InputError` for a tower with other methods that take grids.
    """
    # Each thread has its own part: mlx-vlm's server may run the tower in several.
    kind, unit, local = type(tower), tower.spatial_merge_size**2, threading.local()
    _check(kind)

    def part() -> Part | None:
        return getattr(local, "part", None)

    def call(
        self: nn.Module,
        hidden_states: mx.array,
        grid_thw: mx.array,
        *args: Any,
        **named: Any,
    ) -> Any:
        groups = source(hidden_states.shape[0] // unit)
        if groups is None or part() is not None:
            return kind.__call__(self, hidden_states, grid_thw, *args, **named)
        # The methods below run inside mlx-vlm's `__call__`, which cannot pass the part.
        local.part = Part.of(groups, grid_thw, unit)
        try:
            patches, grid = part().patches(hidden_states), part().grid
            tokens = kind.__call__(self, patches, grid, *args, **named)
            return part().filled(tokens)
        finally:
            local.part = None

    def positions(name: str) -> Callable[[nn.Module, mx.array], mx.array]:
        """Return a method that computes on the whole grid and takes the part."""

        def of_patches(self: nn.Module, grid_thw: mx.array) -> mx.array:
            if part() is None:
                return getattr(kind, name)(self, grid_thw)
            return part().patches(getattr(kind, name)(self, part().whole))

        return of_patches

    def get_window_index(
        self: nn.Module, grid_thw: mx.array
    ) -> tuple[mx.array, mx.array]:
        if part() is None:
            return kind.get_window_index(self, grid_thw)
        return part().windows(*kind.get_window_index(self, part().whole))

    own: dict[str, Callable] = {
        name: positions(name) for name in _GRIDDED if hasattr(kind, name)
    }
    if hasattr(kind, "get_window_index"):
        own["get_window_index"] = get_window_index
    return own | {"__call__": call}


def _check(kind: type) -> None:
    """Raise `InputError` unless all methods that take a grid are overridden here."""
    gridded = {
        name
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if "grid_thw" in inspect.signature(value).parameters
    }
    unsupported = sorted(gridded - _GRIDDED - {"__call__"})
    if unsupported or not {"__call__", "rot_pos_emb"} <= gridded:
        raise InputError(
            f"the tower {kind.__name__} of this mlx-vlm asks for grids in "
            f"{unsupported[0] if unsupported else 'an unsupported way'}, so patches "
            "cannot be left out; expected the tower of mlx-vlm 0.7.10"
        )
