"""Qwen's vision towers on some of the patches of a picture, at their own places.

The tower's own code runs. It is told of frames of fewer patches, and of rotary
positions, position embeddings and windows of the whole picture without those left out.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError

_GRIDDED = {"rot_pos_emb", "get_window_index", "fast_pos_embed_interpolate"}


@dataclass(frozen=True)
class Part:
    """The groups of a picture that a tower sees.

    whole: (n, 3) its grid. grid: one of a frame a row, with as many patches as are
    seen. groups: (K,) those that are. index: (N,) which of them stands for each.
    unit: patches of a group.
    """

    whole: mx.array
    grid: mx.array
    groups: np.ndarray
    index: np.ndarray
    unit: int

    @classmethod
    def of(cls, source: np.ndarray, whole: mx.array, unit: int) -> "Part":
        seen = source == np.arange(len(source))
        sizes = [[h * w // unit] * t for t, h, w in np.array(whole).tolist()]
        ends = np.cumsum(np.concatenate(sizes).astype(int))[:-1]
        counts = [int(frame.sum()) * unit for frame in np.split(seen, ends)]
        grid = mx.array([[1, count, 1] for count in counts if count], whole.dtype)
        index = (np.cumsum(seen) - 1)[source]
        return cls(whole, grid, np.flatnonzero(seen), index, unit)

    def patches(self, rows: mx.array) -> mx.array:
        """Those of the patches (P, ...) that are seen."""
        own = self.groups[:, None] * self.unit + np.arange(self.unit)
        return rows[mx.array(own.ravel())]

    def windows(self, order: mx.array, ends: mx.array) -> tuple[mx.array, mx.array]:
        """Windows of groups without those left out, as `get_window_index` gives them.

        order: (N,) groups, window by window. ends: of the windows, in patches, from 0.
        """
        groups = np.array(order)
        seen = np.isin(groups, self.groups)
        before = np.concatenate([[0], np.cumsum(seen)])
        fewer = before[np.array(ends) // self.unit] * self.unit
        return mx.array(self.index[groups[seen]]), mx.array(np.unique(fewer))

    def filled(self, found):
        """(N, D) tokens of all groups: what is left out has the one that it repeats."""
        if isinstance(found, (list, tuple)):
            return type(found)(self.filled(part) for part in found)
        return found[mx.array(self.index)]


def methods(tower, source: Callable[[int], np.ndarray | None]) -> dict:
    """What a subclass of the tower's has instead, by name.

    source: for a picture of so many groups which group stands for each, or `None`.
    Raises `InputError` for a tower that asks for grids elsewhere than is known.
    """
    kind, unit, local = type(tower), tower.spatial_merge_size**2, threading.local()
    _check(kind)

    def part() -> Part | None:
        return getattr(local, "part", None)

    def call(self, hidden_states, grid_thw, *args, **named):
        found = source(hidden_states.shape[0] // unit)
        if found is None or part() is not None:
            return kind.__call__(self, hidden_states, grid_thw, *args, **named)
        local.part = Part.of(found, grid_thw, unit)
        try:
            seen, grid = part().patches(hidden_states), part().grid
            tokens = kind.__call__(self, seen, grid, *args, **named)
            return part().filled(tokens)
        finally:
            local.part = None

    def positions(name: str):
        def of_patches(self, grid_thw):
            if part() is None:
                return getattr(kind, name)(self, grid_thw)
            return part().patches(getattr(kind, name)(self, part().whole))

        return of_patches

    def get_window_index(self, grid_thw):
        if part() is None:
            return kind.get_window_index(self, grid_thw)
        return part().windows(*kind.get_window_index(self, part().whole))

    own = {name: positions(name) for name in _GRIDDED if hasattr(kind, name)}
    if hasattr(kind, "get_window_index"):
        own["get_window_index"] = get_window_index
    return own | {"__call__": call}


def _check(kind: type) -> None:
    """Raise `InputError` unless everything that takes a grid is known."""
    asking = {
        name
        for name, value in inspect.getmembers(kind, inspect.isfunction)
        if "grid_thw" in inspect.signature(value).parameters
    }
    wrong = sorted(asking - _GRIDDED - {"__call__"})
    if wrong or not {"__call__", "rot_pos_emb"} <= asking:
        raise InputError(
            f"the tower {kind.__name__} of this mlx-vlm asks for grids in "
            f"{wrong[0] if wrong else 'an unknown way'}, so that patches cannot be "
            "left out; expected that of 0.7.10"
        )
