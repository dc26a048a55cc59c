"""What the hooks of a model of mlx-vlm do: shorter ids, fewer rows, the same places."""

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import Features
from ..pruners import Pruner
from .attention import Watch
from .families import Family, media_of
from .look import PixelLook
from .original_positions import Positions
from .prompts import (
    SENT,
    Row,
    Sent,
    Shortened,
    find_rows,
    pad_rows,
    shorten,
    take_columns,
)

_REMEMBERED = 64  # prompts whose full ids are known
Group = tuple[int, tuple[int, int] | None]  # tokens, and their grid


@dataclass(frozen=True)
class Kept:
    """What stayed of one prompt's visual tokens.

    total, keep: N and K. indices: (K,) int32, ascending. runs: how many of the N stand
    together each time: a picture, or a tile or a line of one. encoded: how many of the
    N the tower made.
    """

    total: int
    keep: int
    indices: np.ndarray
    runs: tuple[int, ...]
    encoded: int

    @property
    def places(self) -> list[list[int]]:
        """Of each run, which of its tokens stayed."""
        ends = np.cumsum(self.runs)
        parts = np.split(self.indices, np.searchsorted(self.indices, ends[:-1]))
        starts = [0, *ends[:-1].tolist()]
        return [
            (part - start).tolist() for part, start in zip(parts, starts, strict=True)
        ]


class Hooks:
    """What the hooks of one model share."""

    def __init__(
        self,
        model,
        pruner: Pruner,
        family: Family,
        positions: str | None,
        look: PixelLook | None = None,
        watch: Watch | None = None,
    ):
        self.model, self.pruner, self.family = model, pruner, family
        self.config, self.look, self.watch = model.config, look, watch
        self.is_media = media_of(model.config, family)
        self.turns = callable(getattr(model.language_model, "get_rope_index", None))
        self.kind = positions or ("original" if self.turns else "contiguous")
        self.positions = Positions(self.kind == "original" and not self.turns)
        self.last: tuple[Kept, ...] = ()
        self._prompts: OrderedDict[bytes, Shortened] = OrderedDict()
        self._lock, self._inside = threading.Lock(), threading.local()

    @property
    def described(self) -> str:
        """What tells the caches of this pruner from others."""
        seen = self.look and self.look.pixels
        return f"mlx_tokprune {self.pruner.described()} {seen} {self.kind}"

    # Ids

    @property
    def vocabulary(self) -> int:
        text = getattr(self.config, "text_config", self.config)
        return int(getattr(text, "vocab_size", 0) or self.config.vocab_size)

    def groups(self, inputs, totals: Sequence[int]) -> list[list[Group]]:
        """Of each prompt, the visual tokens that are chosen from together."""
        if "grid" not in self.pruner.needs or self.family.grids is None:
            return [[(total, None)] if total else [] for total in totals]
        grids = self.family.grids(inputs, self.config)
        ends = np.cumsum([0, *(height * width for height, width in grids)]).tolist()
        prompts = np.cumsum([0, *totals]).tolist()
        if not {*prompts} <= {*ends} or prompts[-1] != ends[-1]:
            raise InputError(
                f"pictures of {ends[-1]} tokens do not explain the {prompts[-1]} "
                f"placeholders of {len(totals)} prompts; choose a method other than "
                f"{self.pruner.method!r}"
            )
        every = [(h * w, (h, w)) for h, w in grids]
        bounds = [ends.index(end) for end in prompts]
        return [every[first:last] for first, last in itertools.pairwise(bounds)]

    def count(self, total: int, grid: tuple[int, int] | None) -> int:
        """K of a group; a budget of more tokens than there are keeps all of them."""
        if self.pruner.keeps_all or total <= (self.pruner.keep_tokens or 0):
            return total
        return self.pruner.count(total) if grid is None else self.pruner.count_on(grid)

    def shortened(self, inputs):
        """What a processor gave, with fewer placeholders."""
        if inputs.get("input_ids") is None:
            return inputs
        kinds = ("pixel_values", "pixel_values_videos")
        if self.watch and all(inputs.get(name) is not None for name in kinds):
            raise InputError(
                "a prompt with pictures and videos is pruned by methods that need no "
                "attention of the tower, such as 'norm'"
            )
        each = self.family.each(inputs) if self.family.each else 1

        def counts(totals: Sequence[int]) -> list[int]:
            groups = self.groups(inputs, totals)
            return [sum(self.count(*group) for group in some) for some in groups]

        look = functools.partial(self.look, inputs) if self.look else None
        how = {"each": each, "look": look, "salt": self.described}
        found = shorten(inputs, self.is_media, counts, self.vocabulary, **how)
        if found is None:
            return inputs
        with self._lock:
            self._prompts[_key(found.ids)] = found
            while len(self._prompts) > _REMEMBERED:
                self._prompts.popitem(last=False)
        return found.inputs

    # Positions

    def rope_index(self, base, language, ids, *grids, **named):
        """`get_rope_index` of ids that were made shorter, or of others as ever."""
        known = None
        if not getattr(self._inside, "full", False):
            with self._lock:
                known = self._prompts.get(_key(np.array(ids)))
                if known is not None:
                    self._prompts.move_to_end(_key(known.ids))
            self._check_known(known, ids, grids)
        if known is None:
            return base(language, ids, *grids, **named)
        image, video, *_ = [*grids, None, None]
        full, mask = mx.array(known.sent.full), mx.array(known.sent.mask)
        found, deltas = base(language, full, image, video, mask)
        dropped = full.shape[1] - known.columns.shape[1]
        return mx.take(found, mx.array(known.columns[0]), -1), deltas + dropped

    def _check_known(self, known: Shortened | None, ids, grids) -> None:
        """Raise `InputError` where mlx-vlm had better read a prompt anew."""
        if known is not None:
            if 1 in known.sent.keeps:
                raise InputError("a single visual token does not tell pictures apart")
            return
        side = self.config.vision_config.spatial_merge_size
        given = [np.array(grid) for grid in grids[:2] if grid is not None]
        patches = sum(int(np.prod(grid, axis=-1).sum()) for grid in given)
        placeholders = int(self.is_media(np.array(ids)).sum())
        if placeholders < patches // side**2:
            raise InputError("the prompt was made shorter too long ago to be known")

    # Embeddings

    def embed(self, base, model, *args, **named):
        """`get_input_embeddings` of a prompt that was made shorter."""
        sent = named.pop(SENT, None)
        if sent is None:
            ids = args[0] if args else named.get("input_ids")
            if ids is None or np.shape(ids)[-1] > 1:  # some ask for each new token
                self.positions.reset()
            self._note_whole(ids, *args[1:2], **named)
            return base(model, *args, **named)
        sent = Sent.read(sent)
        rows = find_rows(sent.full, sent.mask, self.is_media, sent.each)
        pixels = args[1] if len(args) > 1 else named.pop("pixel_values", None)
        if pixels is None and named.get("pixel_values_videos") is None:
            # A chat goes on behind pictures that are in its cache.
            first = [np.arange(k) for k in sent.keeps]
            self.positions.set(_columns(rows, first, sent.mask))
            return base(model, *args, **named)
        named |= {"mask": mx.array(sent.mask)}
        named |= {name: mx.array(array) for name, array in sent.aligned.items()}
        if self.watch:  # features that are known say nothing of attention
            for name in ("cached_image_features", "vision_cache"):
                named.pop(name, None)
        self._inside.full = True
        self._inside.sources = list(sent.seen.sources) if sent.seen else []
        look = self.watch.looking() if self.watch else contextlib.nullcontext([])
        try:
            with look as calls:
                features = base(model, mx.array(sent.full), pixels, **named)
        finally:
            self._inside.full, self._inside.sources = False, []
        inputs = {"pixel_values": pixels, **named}
        extras = [{}] * len(rows)
        if self.watch:
            totals = [row.total for row in rows]
            extras = self.watch.extras(calls, inputs, totals)
        return self._pruned(features, rows, sent, inputs, extras)

    def _note_whole(self, ids, pixel_values=None, **named) -> None:
        """Nothing was left out of a prompt that has pictures."""
        if pixel_values is None and named.get("pixel_values_videos") is None:
            if ids is None or np.shape(ids)[-1] > 1:
                self.last = ()
            return
        full, mask = np.array(ids), named.get("mask")
        mask = np.ones_like(full) if mask is None else np.array(mask)
        inputs = {"pixel_values": pixel_values, **named}
        each = self.family.each(inputs) if self.family.each else 1
        self.last = tuple(
            Kept(row.total, row.total, np.arange(row.total), row.runs, row.total)
            for row in find_rows(full, mask, self.is_media, each)
            if row.total
        )

    def source(self, total: int) -> np.ndarray | None:
        """For the next picture of `total` groups that the tower is asked for."""
        waiting = getattr(self._inside, "sources", [])
        found = next((array for array in waiting if len(array) == total), None)
        if found is None:
            return None
        waiting.remove(found)
        source = np.array(found)
        return None if np.array_equal(source, np.arange(total)) else source

    def _pruned(self, features, rows: list[Row], sent: Sent, inputs, extras):
        """The rows that stay of everything that has one for each column."""
        given = features.inputs_embeds
        columns = sum(len(row.visual) + len(row.text) for row in rows[:1])
        if len(rows) == 1 and given.shape[1] != columns:
            raise ValueError(f"{given.shape[1]} embeddings for {columns} columns")
        if sent.each > 1 and len(rows) > 1:
            raise InputError(
                "prompts of this model are pruned one at a time in mlx-vlm, or in its "
                "server; expected a batch of 1"
            )
        stays = [np.arange(row.total) for row in rows]
        if sent.seen:
            stays = [np.array(some, int) for some in sent.seen.stays]
        groups = self.groups(inputs, [len(some) for some in stays])
        chosen, embeddings = [], []
        each = zip(rows, given, groups, extras, stays, strict=True)
        for row, array, *more in each:
            indices, tokens = self._choose(row, array, *more)
            chosen.append(indices)
            both = mx.concatenate([array[mx.array(row.text)], tokens])
            where = np.concatenate([row.text, row.visual[indices]])
            embeddings.append(both[mx.array(np.argsort(where, kind="stable"))])
        made = sent.seen.encoded if sent.seen else [row.total for row in rows]
        self.last = tuple(
            Kept(row.total, len(indices), indices, row.runs, encoded)
            for row, indices, encoded in zip(rows, chosen, made, strict=True)
            if row.total
        )
        kept = _columns(rows, chosen, sent.mask)
        self.positions.set(kept)
        return _taken(features, embeddings, kept, rows, chosen, sent)

    def _choose(
        self,
        row: Row,
        embeddings: mx.array,
        groups: Sequence[Group],
        extras: Mapping[str, mx.array],
        stays: np.ndarray,
    ):
        """(K,) visual tokens of a prompt that stay, and (K, D) what they are then.

        extras: (N, ...) by name, of the tower. stays: those that stay by their pixels.
        """
        tokens = embeddings[mx.array(row.visual[stays])][None]
        behind = row.text[row.text > row.visual[-1]] if row.total else row.text
        text = embeddings[mx.array(behind if len(behind) else row.text)][None]
        indices, kept, start = [np.zeros(0, int)], [tokens[0, :0]], 0
        for size, grid in groups:
            part = tokens[:, start : start + size]
            some = np.arange(size)
            if self.count(size, grid) < size:
                named = {"text": text} if "text" in self.pruner.needs else {}
                of_part = mx.array(stays[start : start + size])
                named |= {name: array[of_part][None] for name, array in extras.items()}
                selection = self.pruner(Features(part, grid, extras=named))
                part, some = selection.apply(part), np.array(selection.indices[0])
                self._check_chosen(some, self.count(size, grid))
            indices.append(start + some)
            kept.append(part[0])
            start += size
        return stays[np.concatenate(indices)], mx.concatenate(kept)

    def _check_chosen(self, some: np.ndarray, keep: int) -> None:
        if len(some) != keep or np.any(np.diff(some) <= 0):
            raise InputError(
                f"method {self.pruner.method!r} was asked for {keep} tokens and chose "
                f"{len(some)}; expected as many, each once and in ascending order"
            )


def _columns(rows: list[Row], chosen: list[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """(B, L) columns that stay, -1 for padding."""
    kept = [
        np.sort(np.concatenate([row.text, row.visual[indices]]))
        for row, indices in zip(rows, chosen, strict=True)
    ]
    return pad_rows(kept, mask)


def _taken(features, embeddings, kept: np.ndarray, rows, chosen, sent: Sent):
    """mlx-vlm's features with the columns `kept` of each field."""
    columns = mx.array(np.maximum(kept, 0))
    length = columns.shape[1]

    def take(array, axis: int):
        """Columns of (..., B, T, ...), where T is `axis`."""
        if array is None or array.shape[axis] != features.inputs_embeds.shape[1]:
            return array
        shape = [1] * array.ndim
        shape[axis - 1], shape[axis] = columns.shape
        return mx.take_along_axis(array, columns.reshape(shape), axis=axis)

    padded = []
    for row, array in zip(kept, embeddings, strict=True):
        before = int(np.argmax(row >= 0))
        more = (before, length - before - array.shape[0])
        padded.append(mx.pad(array, [more, (0, 0)]))
    dropped = [row.total - len(some) for row, some in zip(rows, chosen, strict=True)]
    starts = np.cumsum([0, *[row.total for row in rows]])
    compact = np.concatenate([s + c for s, c in zip(starts, chosen, strict=False)])
    positions, deltas = features.position_ids, features.rope_deltas
    found = dataclasses.replace(
        features,
        inputs_embeds=mx.stack(padded),
        attention_mask_4d=None,
        visual_pos_masks=take(features.visual_pos_masks, 1),
        per_layer_inputs=take(features.per_layer_inputs, 1),
        deepstack_visual_embeds=_compact(features.deepstack_visual_embeds, compact),
        position_ids=positions if positions is None else take(positions, -1),
        rope_deltas=deltas if deltas is None else deltas + mx.array(dropped)[:, None],
    )
    aligned = {
        name: mx.array(take_columns(array, kept, 0))
        for name, array in sent.aligned.items()
    }
    if aligned:  # of the columns that stayed, and no others of as many
        plain = found.to_dict
        found.to_dict = lambda: {**plain(), **aligned}
    return found


def _compact(layers, rows: np.ndarray):
    """Deep features (n, D) of visual tokens, of each layer, those of some."""
    if layers is None:
        return None
    if isinstance(layers, mx.array):
        return layers[:, mx.array(rows)]
    return [layer[mx.array(rows)] for layer in layers]


def _key(ids: np.ndarray) -> bytes:
    return repr(ids.shape).encode() + ids.astype(np.int64).tobytes()
