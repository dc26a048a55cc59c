"""Prompts with fewer placeholders, from the output of mlx-vlm's processors.

mlx-vlm counts rows by ids: it trims, pads and compares the caches of chats, batches and
servers by them. So ids must be pruned by as many as embeddings, before anything but the
sizes of pictures is available. It does not matter which ids are left out: the full ids
travel along under `SENT`, and embeddings are made from those.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .budgets import Budget
from .pixels import PixelSelection

SENT = "tokprune_sent"  # holds a list: mlx-vlm converts every other type
_MARKS = 2  # ids that tell one picture from another


@dataclass(frozen=True)
class Row:
    """Layout of one prompt of a batch, as columns of its embeddings.

    visual: (N,) columns of visual tokens. text: columns of everything else but padding.
    runs: lengths of adjacent tokens in `visual`: a picture, or a tile or a line of one.
    """

    visual: np.ndarray
    text: np.ndarray
    runs: tuple[int, ...]

    @property
    def total(self) -> int:
        """Visual tokens N of the prompt."""
        return len(self.visual)


def find_rows(
    ids: np.ndarray, mask: np.ndarray, is_media: Callable, each: int = 1
) -> list[Row]:
    """Return the layout of each prompt of ids (B, T), without padding.

    mask: (B, T), 1 where ids are read. each: embeddings of a placeholder, all in its
    place.
    """
    rows = []
    for row_ids, is_read in zip(ids, mask.astype(bool), strict=True):
        media = is_media(row_ids) & is_read
        sizes = np.where(media, each, 1)
        ends = np.cumsum(sizes)
        columns = np.arange(ends[-1] if len(ends) else 0)
        owner = np.repeat(np.arange(len(row_ids)), sizes)
        visual = columns[media[owner]]
        text = columns[(is_read & ~media)[owner]]
        breaks = (np.flatnonzero(np.diff(visual) > 1) + 1).tolist()
        lengths = tuple(np.diff([0, *breaks, len(visual)]).tolist())
        rows.append(Row(visual, text, lengths if len(visual) else ()))
    return rows


@dataclass(frozen=True)
class OriginalPrompts:
    """Full prompts of a batch, which travel along with the short ones.

    full, mask: (B, T) ids, and 1 where they are read. aligned: other inputs with a
    value for each id, by name. each: embeddings of a placeholder. keeps: K of each
    prompt. selection: tokens that pixel pruners keep, if there are such pruners.
    budgets: those of a request, in place of the attached pruner's.
    """

    full: np.ndarray
    mask: np.ndarray
    aligned: dict[str, np.ndarray]
    each: int
    keeps: list[int]
    selection: PixelSelection | None = None
    budgets: Sequence[Budget] = ()

    def write(self) -> list:
        """Return the fields as nested lists, which mlx-vlm passes on unconverted."""
        aligned = {name: array.tolist() for name, array in self.aligned.items()}
        arrays = self.full.tolist(), self.mask.tolist()
        selection = self.selection and dataclasses.asdict(self.selection)
        return [*arrays, aligned, self.each, self.keeps, selection, [*self.budgets]]

    @classmethod
    def read(cls, fields: list) -> "OriginalPrompts":
        """Return the prompts that `write` turned into nested lists."""
        full, mask, aligned, each, keeps, selection, budgets = fields
        arrays = {name: np.array(array) for name, array in aligned.items()}
        selection = selection and PixelSelection(**selection)
        ids, read = np.array(full), np.array(mask)
        return cls(ids, read, arrays, each, keeps, selection, budgets)


@dataclass(frozen=True)
class ShortPrompts:
    """Batch of prompts with fewer placeholders.

    inputs: the processor's output, shorter, with `original` under `SENT`. ids: (B, L).
    columns: (B, L) column of each id in the full ids; -1 for padding.
    """

    inputs: dict
    ids: np.ndarray
    columns: np.ndarray
    original: OriginalPrompts


def shorten(
    inputs: Mapping,
    is_media: Callable,
    counts: Callable[[Sequence[int], Sequence[Row]], list[int]],
    vocabulary: int,
    each: int = 1,
    scan: Callable[[np.ndarray, list[Row]], PixelSelection] | None = None,
    salt: str | None = "",
    budgets: Sequence[Budget] = (),
) -> ShortPrompts | None:
    """Shorten a processor's inputs to `counts` of the visual tokens of each prompt.

    Returns `None` if no token would be left out. vocabulary: number of ids. scan:
    selects tokens by their pixels; `counts` gets the number of those. salt: tells
    prompts with equal pixels apart; with `None`, no id tells any pictures apart.
    budgets: those of a request, for `embed`.
    """
    full = _array(inputs["input_ids"])
    attention_mask = inputs.get("attention_mask")
    mask = np.ones_like(full) if attention_mask is None else _array(attention_mask)
    rows = find_rows(full, mask, is_media)
    selection = scan(full, rows) if scan else None
    open_ = [row.visual for row in rows]
    if selection is not None:
        pairs = zip(rows, selection.kept, strict=True)
        open_ = [row.visual[kept] for row, kept in pairs]
    keeps = counts([len(visual) * each for visual in open_], rows)
    if all(keep == row.total * each for keep, row in zip(keeps, rows, strict=True)):
        return None
    picked = [_pick_columns(*row) for row in zip(rows, open_, keeps, strict=True)]
    columns = pad_rows(picked, mask)
    taken = ("input_ids", "attention_mask")
    aligned = {
        name: _array(value)
        for name, value in inputs.items()
        if name not in taken and _shape(value) == full.shape
    }
    ids = take_columns(full, columns, 0)
    marks = _marks(inputs, salt) % vocabulary
    for number, (row, keep) in enumerate(zip(rows, keeps, strict=True)):
        _mark(ids[number], np.isin(columns[number], row.visual), keep, marks)
    original = OriginalPrompts(full, mask, aligned, each, keeps, selection, budgets)
    shorter = dict(inputs)
    shorter["input_ids"] = mx.array(ids)
    shorter["attention_mask"] = mx.array(take_columns(mask, columns, 0))
    for name, array in aligned.items():
        shorter[name] = mx.array(take_columns(array, columns, 0))
    shorter[SENT] = original.write()
    return ShortPrompts(shorter, ids, columns, original)


def pad_rows(rows: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Return (B, L): rows of unequal lengths, padded with -1 on the side of `mask`.

    mask: (B, T), 0 for padding, which is to the left or to the right.
    """
    length = max(map(len, rows))
    padded = np.full((len(rows), length), -1)
    behind = bool(np.any(mask[:, -1] == 0))
    for target, row in zip(padded, rows, strict=True):
        if behind:
            target[: len(row)] = row
        else:
            target[length - len(row) :] = row
    return padded


def _pick_columns(row: Row, visual: np.ndarray, keep: int) -> np.ndarray:
    """Return the kept columns of ids: the first `keep` - 1 placeholders, and the last.

    Where a placeholder stands for several embeddings, `keep` can be larger than the
    number of placeholders; the first one is then repeated.
    """
    if not len(visual):
        return row.text
    first = visual[: max(0, min(keep, len(visual)) - 1)]
    more = np.repeat(visual[:1], max(0, keep - len(visual)))
    return np.sort(np.concatenate([row.text, more, first, visual[-1:]]))


def take_columns(array: np.ndarray, columns: np.ndarray, padding: int) -> np.ndarray:
    """Return (B, L) columns of (B, T), with `padding` where a column is -1."""
    values = np.take_along_axis(array, np.maximum(columns, 0), axis=1)
    return np.where(columns < 0, padding, values)


def _mark(ids: np.ndarray, visual: np.ndarray, keep: int, marks: np.ndarray) -> None:
    """Write ids that tell pictures apart in the place of the first placeholders.

    A chat takes the cache of another picture where ids are equal, and a budget makes
    the ids of all pictures equal. Nothing is embedded from these ids. The last
    placeholder is kept: it marks the end of the pictures.
    """
    count = min(len(marks), keep - 1)
    if count > 0:
        ids[np.flatnonzero(visual)[:count]] = marks[:count]


def _marks(inputs: Mapping, salt: str | None) -> np.ndarray:
    """Return two ids from a hash of the pixels, or none if there are no pixels."""
    digest = hashlib.blake2b((salt or "").encode(), digest_size=8)
    pixels = [inputs.get(name) for name in ("pixel_values", "pixel_values_videos")]
    for array in (p for p in pixels if p is not None):
        digest.update(np.ascontiguousarray(floats(array)).tobytes())
    if salt is None or all(p is None for p in pixels):
        return np.zeros(0, int)
    return np.frombuffer(digest.digest(), np.uint32)[:_MARKS].astype(np.int64)


def _array(value: Any) -> np.ndarray:
    return np.array(value).astype(np.int64)


def _shape(value: Any) -> tuple[int, ...]:
    if isinstance(value, (mx.array, np.ndarray)):
        return tuple(value.shape)
    if isinstance(value, list):
        try:
            return np.array(value).shape
        except ValueError:  # lists of unequal lengths
            return ()
    return ()


def floats(array: mx.array | np.ndarray | list | tuple) -> np.ndarray:
    """Return an array of numbers, or a list of arrays, as one NumPy array."""
    # NumPy has no bfloat16.
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    if isinstance(array, (list, tuple)):
        return np.concatenate([floats(part).reshape(-1) for part in array])
    return np.array(array)
