"""Prompts whose picture takes fewer ids: what mlx-vlm's processors give, made shorter.

mlx-vlm counts rows by ids: caches of chats, batches and servers are trimmed, padded and
compared by them. So where embeddings are pruned ids must be, too, by as many, before
anything is known but the sizes of pictures. Which ids go does not matter. The full ones
travel along under `SENT`, and embeddings are made from those.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .pixels import Seen

SENT = "tokprune_sent"  # a list, since mlx-vlm would convert anything else
_MARKS = 2  # ids that tell a picture from others


@dataclass(frozen=True)
class Row:
    """Where one prompt of a batch has what, as columns of its embeddings.

    visual: (N,) of visual tokens. text: of everything else but padding. runs: lengths
    of what stands together in `visual`: a picture, or a tile or a line of one.
    """

    visual: np.ndarray
    text: np.ndarray
    runs: tuple[int, ...]

    @property
    def total(self) -> int:
        return len(self.visual)


def find_rows(
    ids: np.ndarray, mask: np.ndarray, is_media: Callable, each: int = 1
) -> list[Row]:
    """Of ids (B, T) that are read where `mask` (B, T) is 1; prompts without padding.

    each: embeddings of a placeholder, all in its place.
    """
    rows = []
    for given, seen in zip(ids, mask.astype(bool), strict=True):
        media = is_media(given) & seen
        sizes = np.where(media, each, 1)
        ends = np.cumsum(sizes)
        columns = np.arange(ends[-1] if len(ends) else 0)
        owner = np.repeat(np.arange(len(given)), sizes)
        visual = columns[media[owner]]
        text = columns[(seen & ~media)[owner]]
        breaks = np.flatnonzero(np.diff(visual) > 1) + 1
        lengths = tuple(np.diff([0, *breaks, len(visual)]).tolist())
        rows.append(Row(visual, text, lengths if len(visual) else ()))
    return rows


@dataclass(frozen=True)
class Sent:
    """The prompts as they were, which travel along with those that are shorter.

    full, mask: (B, T) ids, and 1 where they are read. aligned: what else has a number
    for each id. each: embeddings of a placeholder. keeps: K of each prompt. seen: what
    the pixels say, if they were asked.
    """

    full: np.ndarray
    mask: np.ndarray
    aligned: dict[str, np.ndarray]
    each: int
    keeps: list[int]
    seen: Seen | None = None

    def written(self) -> list:
        aligned = {name: array.tolist() for name, array in self.aligned.items()}
        arrays = self.full.tolist(), self.mask.tolist()
        seen = self.seen and dataclasses.asdict(self.seen)
        return [*arrays, aligned, self.each, self.keeps, seen]

    @classmethod
    def read(cls, written: list) -> "Sent":
        full, mask, aligned, each, keeps, seen = written
        arrays = {name: np.array(array) for name, array in aligned.items()}
        seen = seen and Seen(**seen)
        return cls(np.array(full), np.array(mask), arrays, each, keeps, seen)


@dataclass(frozen=True)
class Shortened:
    """A batch of prompts with fewer placeholders.

    inputs: what the processor gave, shorter, with `sent` under `SENT`. ids: (B, L).
    columns: (B, L) which of the full ids each is; -1 for padding.
    """

    inputs: dict
    ids: np.ndarray
    columns: np.ndarray
    sent: Sent


def shorten(
    inputs: Mapping,
    is_media: Callable,
    counts: Callable[[Sequence[int]], list[int]],
    vocabulary: int,
    each: int = 1,
    look: Callable[[np.ndarray, list[Row]], Seen] | None = None,
    salt: str = "",
) -> Shortened | None:
    """A processor's inputs with fewer placeholders: `counts` of the visual tokens.

    `None` where nothing would be left out. vocabulary: how many ids there are. look:
    says which tokens stay by their pixels; those are counted. salt: tells
    prompts apart besides their pixels.
    """
    full = _array(inputs["input_ids"])
    seen = inputs.get("attention_mask")
    mask = np.ones_like(full) if seen is None else _array(seen)
    rows = find_rows(full, mask, is_media)
    seen = look(full, rows) if look else None
    open_ = [row.visual for row in rows]
    if seen is not None:
        open_ = [row.visual[some] for row, some in zip(rows, seen.stays, strict=True)]
    keeps = counts([len(some) * each for some in open_])
    if all(keep == row.total * each for keep, row in zip(keeps, rows, strict=True)):
        return None
    picked = [_picked(*given) for given in zip(rows, open_, keeps, strict=True)]
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
    sent = Sent(full, mask, aligned, each, keeps, seen)
    shorter = dict(inputs)
    shorter["input_ids"] = mx.array(ids)
    shorter["attention_mask"] = mx.array(take_columns(mask, columns, 0))
    for name, array in aligned.items():
        shorter[name] = mx.array(take_columns(array, columns, 0))
    shorter[SENT] = sent.written()
    return Shortened(shorter, ids, columns, sent)


def pad_rows(rows: Sequence[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """(B, L): rows of other lengths, with -1 where `mask` (B, T) has its padding."""
    length = max(map(len, rows))
    padded = np.full((len(rows), length), -1)
    behind = bool(np.any(mask[:, -1] == 0))
    for target, row in zip(padded, rows, strict=True):
        if behind:
            target[: len(row)] = row
        else:
            target[length - len(row) :] = row
    return padded


def _picked(row: Row, visual: np.ndarray, keep: int) -> np.ndarray:
    """Columns of ids that stay: of the placeholders `visual` the first, and the last.

    More than there are, where one stands for many, repeat the first.
    """
    if not len(visual):
        return row.text
    some = visual[: max(0, min(keep, len(visual)) - 1)]
    more = np.repeat(visual[:1], max(0, keep - len(visual)))
    return np.sort(np.concatenate([row.text, more, some, visual[-1:]]))


def take_columns(array: np.ndarray, columns: np.ndarray, padding: int) -> np.ndarray:
    """(B, L) of (B, T); `padding` where a column is -1."""
    found = np.take_along_axis(array, np.maximum(columns, 0), axis=1)
    return np.where(columns < 0, padding, found)


def _mark(ids: np.ndarray, visual: np.ndarray, keep: int, marks: np.ndarray) -> None:
    """Ids that tell pictures apart, in the place of the first placeholders.

    A chat takes the cache of another picture where ids are equal, and a budget makes
    those of all pictures equal. Nothing is embedded from these ids. The last stays what
    it is: it says where the pictures end.
    """
    count = min(len(marks), keep - 1)
    if count > 0:
        ids[np.flatnonzero(visual)[:count]] = marks[:count]


def _marks(inputs: Mapping, salt: str) -> np.ndarray:
    """Two ids from the pixels; none where there are no pixels."""
    digest = hashlib.blake2b(salt.encode(), digest_size=8)
    pixels = [inputs.get(name) for name in ("pixel_values", "pixel_values_videos")]
    for array in (p for p in pixels if p is not None):
        digest.update(np.ascontiguousarray(floats(array)).tobytes())
    if all(p is None for p in pixels):
        return np.zeros(0, int)
    return np.frombuffer(digest.digest(), np.uint32)[:_MARKS].astype(np.int64)


def _array(value) -> np.ndarray:
    return np.array(value).astype(np.int64)


def _shape(value) -> tuple:
    if isinstance(value, (mx.array, np.ndarray)):
        return tuple(value.shape)
    if isinstance(value, list):
        try:
            return np.array(value).shape
        except ValueError:  # of unequal lengths
            return ()
    return ()


def floats(array) -> np.ndarray:
    """Any array of numbers as NumPy's, bfloat16 included."""
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    if isinstance(array, (list, tuple)):
        return np.concatenate([floats(part).reshape(-1) for part in array])
    return np.array(array)
