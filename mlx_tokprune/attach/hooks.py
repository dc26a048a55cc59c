"""Hooks of one mlx-vlm model: shorter ids, fewer embedding rows, original places."""

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from ..features import Features
from ..pruners import Pruner
from .attention import Watch
from .budgets import REQUEST, Budget, Group, share_out, with_budget
from .families import Family, media_of
from .look import PixelScan
from .original_positions import Positions
from .prompts import (
    SENT,
    OriginalPrompts,
    Row,
    ShortPrompts,
    find_rows,
    pad_rows,
    shorten,
    take_columns,
)

_REMEMBERED = 64  # prompts whose full ids are kept for `rope_index`


@dataclass(frozen=True)
class KeptTokens:
    """Visual tokens of one prompt that were kept.

    total, keep: N and K. indices: (K,) int32, ascending. runs: lengths of adjacent
    tokens among the N: a picture, or a tile or a line of one. encoded: number of the N
    that the tower encoded.
    """

    total: int
    keep: int
    indices: np.ndarray
    runs: tuple[int, ...]
    encoded: int

    @property
    def places(self) -> list[list[int]]:
        """Kept tokens of each run, counted from its start."""
        ends = np.cumsum(self.runs)
        parts = np.split(self.indices, np.searchsorted(self.indices, ends[:-1]))
        starts = [0, *ends[:-1].tolist()]
        return [
            (part - start).tolist() for part, start in zip(parts, starts, strict=True)
        ]


class Hooks:
    """State and functions that the hooks of one model share."""

    def __init__(
        self,
        model: nn.Module,
        pruner: Pruner,
        family: Family,
        positions: str | None,
        scan: PixelScan | None = None,
        watch: Watch | None = None,
    ):
        self.model, self.pruner, self.family = model, pruner, family
        self.config, self.scan, self.watch = model.config, scan, watch
        self.is_media = media_of(model.config, family)
        self.turns = callable(getattr(model.language_model, "get_rope_index", None))
        self.kind = positions or ("original" if self.turns else "contiguous")
        self.positions = Positions(self.kind == "original" and not self.turns)
        self.last: tuple[KeptTokens, ...] = ()
        # mlx-vlm's server prepares and reads prompts in different threads: the full
        # prompts are shared under the lock, the state of one call is its thread's.
        self._prompts: OrderedDict[bytes, ShortPrompts] = OrderedDict()
        self._lock, self._inside = threading.Lock(), threading.local()

    @property
    def described(self) -> str:
        """Text that tells the caches of this pruner from those of other pruners."""
        pixels, request = self.scan and self.scan.pixels, REQUEST.get()
        budgets = request.budgets if request else ""
        return f"mlx_tokprune {self.pruner.described()} {budgets}{pixels} {self.kind}"

    # Ids

    @property
    def vocabulary(self) -> int:
        """Number of ids of the language model."""
        text = getattr(self.config, "text_config", self.config)
        return int(getattr(text, "vocab_size", 0) or self.config.vocab_size)

    def groups(
        self,
        inputs: Mapping,
        totals: Sequence[int],
        runs: Sequence[Sequence[int]],
        budgets: Sequence[Budget],
    ) -> list[list[Group]]:
        """Return, for each prompt, the groups of visual tokens that share a budget.

        A method that needs grids prunes each picture apart; others prune all tokens of
        a prompt together. runs: of each prompt. budgets: those of a request, one for
        each picture if there are several. Raises `InputError` where grids and `totals`
        do not match.
        """
        pruners = [with_budget(self.pruner, b) for b in budgets] or [self.pruner]
        if "grid" not in self.pruner.needs or self.family.grids is None:
            wholes = [[total] if total else [] for total in totals]
            sizes = runs if len(pruners) > 1 else wholes
            return [share_out([(n, None) for n in row], pruners) for row in sizes]
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
        pairs = itertools.pairwise(bounds)
        return [share_out(every[first:last], pruners) for first, last in pairs]

    def count(self, total: int, grid: tuple[int, int] | None, pruner: Pruner) -> int:
        """Return K of a group; a budget above `total` keeps all tokens."""
        if pruner.keeps_all or total <= (pruner.keep_tokens or 0):
            return total
        return pruner.count(total) if grid is None else pruner.count_on(grid)

    def shortened(self, inputs: Mapping) -> Mapping:
        """Return a processor's output with fewer placeholders.

        Raises `InputError` for pictures beside a video if the method reads the tower's
        attention.
        """
        if inputs.get("input_ids") is None:
            return inputs
        kinds = ("pixel_values", "pixel_values_videos")
        if self.watch and all(inputs.get(name) is not None for name in kinds):
            raise InputError(
                "a prompt with pictures and videos is pruned by methods that need no "
                "attention of the tower, such as 'norm'"
            )
        each = self.family.each(inputs) if self.family.each else 1

        request = REQUEST.get()
        budgets = request.budgets if request else ()

        def counts(totals: Sequence[int], rows: Sequence[Row]) -> list[int]:
            runs = [[run * each for run in row.runs] for row in rows]
            prompts = self.groups(inputs, totals, runs, budgets)
            keeps = [sum(self.count(*group) for group in groups) for groups in prompts]
            if request:
                request.total = sum(row.total * each for row in rows)
                request.keep = sum(keeps)
            return keeps

        scan = functools.partial(self.scan, inputs) if self.scan else None
        salt = None if self.family.reads_ids else self.described
        options = {"each": each, "scan": scan, "salt": salt, "budgets": budgets}
        prompts = shorten(inputs, self.is_media, counts, self.vocabulary, **options)
        if prompts is None:
            return inputs
        # mlx-vlm passes `get_rope_index` the short ids alone: keep the full ones.
        with self._lock:
            self._prompts[_key(prompts.ids)] = prompts
            while len(self._prompts) > _REMEMBERED:
                self._prompts.popitem(last=False)
        return prompts.inputs

    # Positions

    def rope_index(
        self,
        base: Callable,
        language: nn.Module,
        ids: mx.array,
        *grids: mx.array | None,
        **named: Any,
    ) -> tuple[mx.array, mx.array]:
        """Return positions and deltas in place of mlx-vlm's `get_rope_index` (`base`).

        Short ids get the positions of their columns in the full prompt; other ids go
        to `base` unchanged. Raises `InputError` where mlx-vlm must read a prompt anew.
        """
        prompts = None
        # Inside `embed`, mlx-vlm passes the full ids, which need no mapping.
        if not getattr(self._inside, "full", False):
            with self._lock:
                prompts = self._prompts.get(_key(np.array(ids)))
                if prompts is not None:
                    self._prompts.move_to_end(_key(prompts.ids))
            self._check_prompts(prompts, ids, grids)
        if prompts is None:
            return base(language, ids, *grids, **named)
        image, video, *_ = [*grids, None, None]
        full, mask = mx.array(prompts.original.full), mx.array(prompts.original.mask)
        positions, deltas = base(language, full, image, video, mask)
        dropped = full.shape[1] - prompts.columns.shape[1]
        kept_positions = mx.take(positions, mx.array(prompts.columns[0]), -1)
        return kept_positions, deltas + dropped

    def _check_prompts(
        self,
        prompts: ShortPrompts | None,
        ids: mx.array,
        grids: Sequence[mx.array | None],
    ) -> None:
        """Raise `InputError` where mlx-vlm must read a prompt anew."""
        if prompts is not None:
            if self.family.cold:
                raise InputError(f"{self.family.cold}, so the whole chat is read again")
            if 1 in prompts.original.keeps:
                raise InputError("a single visual token does not tell pictures apart")
            return
        side = self.config.vision_config.spatial_merge_size
        sizes = [np.array(grid) for grid in grids[:2] if grid is not None]
        patches = sum(int(np.prod(grid, axis=-1).sum()) for grid in sizes)
        placeholders = int(self.is_media(np.array(ids)).sum())
        if placeholders < patches // side**2:
            raise InputError(
                "the full ids of this prompt are no longer kept; expected one of the "
                f"last {_REMEMBERED} prompts"
            )

    # Embeddings

    def embed(self, base: Callable, model: nn.Module, *args: Any, **named: Any) -> Any:
        """Return pruned features in place of `get_input_embeddings` (`base`).

        mlx-vlm embeds the full ids; then the kept columns are taken from its
        `InputEmbeddingsFeatures`. Prompts that were not made shorter go to `base`.
        """
        fields = named.pop(SENT, None)
        if fields is None:
            ids = args[0] if args else named.get("input_ids")
            # Some models call this for each new token: that is no new prompt.
            if ids is None or np.shape(ids)[-1] > 1:
                self.positions.reset()
            self._note_whole(ids, *args[1:2], **named)
            return base(model, *args, **named)
        sent = OriginalPrompts.read(fields)
        rows = find_rows(sent.full, sent.mask, self.is_media, sent.each)
        pixels = args[1] if len(args) > 1 else named.pop("pixel_values", None)
        if pixels is None and named.get("pixel_values_videos") is None:
            # A chat goes on behind pictures that are in its cache.
            first = [np.arange(k) for k in sent.keeps]
            self.positions.set(_columns(rows, first, sent.mask))
            return base(model, *args, **named)
        named |= {"mask": mx.array(sent.mask)}
        named |= {name: mx.array(array) for name, array in sent.aligned.items()}
        if self.watch:  # cached features skip the tower, and so its attention
            for name in ("cached_image_features", "vision_cache"):
                named.pop(name, None)
        # `rope_index` and `source` run inside `base`, without access to the prompt.
        self._inside.full = True
        self._inside.sources = list(sent.selection.sources) if sent.selection else []
        recording = self.watch.recording() if self.watch else contextlib.nullcontext([])
        try:
            with recording as calls:
                features = base(model, mx.array(sent.full), pixels, **named)
        finally:
            self._inside.full, self._inside.sources = False, []
        inputs = {"pixel_values": pixels, **named}
        extras = [{}] * len(rows)
        if self.watch:
            totals = [row.total for row in rows]
            extras = self.watch.extras(calls, inputs, totals)
        return self._prune(features, rows, sent, inputs, extras)

    def _note_whole(
        self, ids: mx.array | None, pixel_values: Any = None, **named: Any
    ) -> None:
        """Set `last` for a prompt whose tokens are all kept."""
        if pixel_values is None and named.get("pixel_values_videos") is None:
            if ids is None or np.shape(ids)[-1] > 1:
                self.last = ()
            return
        full, mask = np.array(ids), named.get("mask")
        mask = np.ones_like(full) if mask is None else np.array(mask)
        inputs = {"pixel_values": pixel_values, **named}
        each = self.family.each(inputs) if self.family.each else 1
        self.last = tuple(
            KeptTokens(row.total, row.total, np.arange(row.total), row.runs, row.total)
            for row in find_rows(full, mask, self.is_media, each)
            if row.total
        )

    def source(self, total: int) -> np.ndarray | None:
        """Return (total,) the group that stands for each group of the tower's input.

        `None` if the tower encodes all `total` groups. Each array is used once: the
        tower is called for one picture, or one kind of media, after the other.
        """
        waiting = getattr(self._inside, "sources", [])
        groups = next((array for array in waiting if len(array) == total), None)
        if groups is None:
            return None
        waiting.remove(groups)
        source = np.array(groups)
        return None if np.array_equal(source, np.arange(total)) else source

    def _prune(
        self,
        features: Any,
        rows: list[Row],
        sent: OriginalPrompts,
        inputs: Mapping,
        extras: Sequence[Mapping[str, mx.array]],
    ) -> Any:
        """Return mlx-vlm's features with the kept columns of each field."""
        full_embeddings = features.inputs_embeds
        columns = sum(len(row.visual) + len(row.text) for row in rows[:1])
        if len(rows) == 1 and full_embeddings.shape[1] != columns:
            raise ValueError(
                f"{full_embeddings.shape[1]} embeddings for {columns} columns"
            )
        if sent.each > 1 and len(rows) > 1:
            raise InputError(
                "prompts of this model are pruned one at a time in mlx-vlm, or in its "
                "server; expected a batch of 1"
            )
        by_pixels = [np.arange(row.total) for row in rows]
        if sent.selection:
            by_pixels = [np.array(kept, int) for kept in sent.selection.kept]
        runs, counts = [row.runs for row in rows], [len(kept) for kept in by_pixels]
        groups = self.groups(inputs, counts, runs, sent.budgets)
        chosen, embeddings = [], []
        each = zip(rows, full_embeddings, groups, extras, by_pixels, strict=True)
        for row, array, shares, extra, left in each:
            indices, tokens = self._choose(row, array, shares, extra, left)
            chosen.append(indices)
            both = mx.concatenate([array[mx.array(row.text)], tokens])
            where = np.concatenate([row.text, row.visual[indices]])
            embeddings.append(both[mx.array(np.argsort(where, kind="stable"))])
        totals = [row.total for row in rows]
        encoded = sent.selection.encoded if sent.selection else totals
        self.last = tuple(
            KeptTokens(row.total, len(indices), indices, row.runs, count)
            for row, indices, count in zip(rows, chosen, encoded, strict=True)
            if row.total
        )
        kept = _columns(rows, chosen, sent.mask)
        self.positions.set(kept)
        language, state = self.model.language_model, None
        if self.turns and features.position_ids is None:
            # Some families keep positions in the language model, and slice them wrong.
            state = getattr(language, "_position_ids", None)
        if state is not None and state.shape[-1] == full_embeddings.shape[1]:
            deltas = language._rope_deltas
            features = dataclasses.replace(
                features, position_ids=state, rope_deltas=deltas
            )
        features = _take_features(features, embeddings, kept, rows, chosen, sent)
        if state is not None:
            language._position_ids = features.position_ids
            language._rope_deltas = features.rope_deltas
        return features

    def _choose(
        self,
        row: Row,
        embeddings: mx.array,
        groups: Sequence[Group],
        extras: Mapping[str, mx.array],
        by_pixels: np.ndarray,
    ) -> tuple[np.ndarray, mx.array]:
        """Return (K,) the kept visual tokens of a prompt, and (K, D) their embeddings.

        extras: (N, ...) by name, from the tower. by_pixels: tokens that the pixel
        pruners keep, from which the pruner chooses.
        """
        tokens = embeddings[mx.array(row.visual[by_pixels])][None]
        behind = row.text[row.text > row.visual[-1]] if row.total else row.text
        text = embeddings[mx.array(behind if len(behind) else row.text)][None]
        indices, kept, start = [np.zeros(0, int)], [tokens[0, :0]], 0
        for size, grid, pruner in groups:
            part = tokens[:, start : start + size]
            kept_indices, keep = np.arange(size), self.count(size, grid, pruner)
            if keep < size:
                named = {"text": text} if "text" in self.pruner.needs else {}
                of_part = mx.array(by_pixels[start : start + size])
                named |= {name: array[of_part][None] for name, array in extras.items()}
                selection = pruner(Features(part, grid, extras=named))
                part = selection.apply(part)
                kept_indices = np.array(selection.indices[0])
                self._check_chosen(kept_indices, keep)
            indices.append(start + kept_indices)
            kept.append(part[0])
            start += size
        return by_pixels[np.concatenate(indices)], mx.concatenate(kept)

    def _check_chosen(self, kept_indices: np.ndarray, keep: int) -> None:
        """Raise `InputError` unless the ids, already short, match the selection."""
        if len(kept_indices) != keep or np.any(np.diff(kept_indices) <= 0):
            raise InputError(
                f"method {self.pruner.method!r} chose {len(kept_indices)} tokens; "
                f"expected {keep}, each once and in ascending order"
            )


def _columns(rows: list[Row], chosen: list[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Return (B, L) the kept columns, -1 for padding."""
    kept = [
        np.sort(np.concatenate([row.text, row.visual[indices]]))
        for row, indices in zip(rows, chosen, strict=True)
    ]
    return pad_rows(kept, mask)


def _take_features(
    features: Any,
    embeddings: Sequence[mx.array],
    kept: np.ndarray,
    rows: Sequence[Row],
    chosen: Sequence[np.ndarray],
    sent: OriginalPrompts,
) -> Any:
    """Return mlx-vlm's features with the columns `kept` of each field."""
    columns = mx.array(np.maximum(kept, 0))
    length = columns.shape[1]

    def take(array: mx.array | None, axis: int) -> mx.array | None:
        """Return columns of (..., B, T, ...), where T is `axis`."""
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
    pairs = zip(rows, chosen, strict=True)
    dropped = [row.total - len(indices) for row, indices in pairs]
    starts = np.cumsum([0, *[row.total for row in rows]])
    compact = np.concatenate([s + c for s, c in zip(starts, chosen, strict=False)])
    positions, deltas = features.position_ids, features.rope_deltas
    pruned = dataclasses.replace(
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
    if aligned:
        # mlx-vlm passes on what `to_dict` returns: without this, it would pass the
        # processor's short arrays, whose columns are other ones.
        plain = pruned.to_dict
        pruned.to_dict = lambda: {**plain(), **aligned}
    return pruned


def _compact(
    layers: mx.array | Sequence[mx.array] | None, rows: np.ndarray
) -> mx.array | list[mx.array] | None:
    """Return the kept rows of each layer's deepstack features (n, D)."""
    if layers is None:
        return None
    if isinstance(layers, mx.array):
        return layers[:, mx.array(rows)]
    return [layer[mx.array(rows)] for layer in layers]


def _key(ids: np.ndarray) -> bytes:
    """Return a key of ids, of their shape and values."""
    return repr(ids.shape).encode() + ids.astype(np.int64).tobytes()
