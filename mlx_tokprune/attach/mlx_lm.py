"""Pruning in mlx-lm's own picture models: shorter prompts, fewer embedding rows.

mlx-lm's processor writes placeholders into text, and `embed_inputs` splices pictures
into the embeddings of ids. Each picture has a budget of its own here: mlx-lm's server
cuts prompts between pictures, where a prefix is in its cache.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import Features
from ..pruners import Pruner
from .hooks import KeptTokens


class Handle:
    """Attached pruner: `last` reports the kept tokens, `detach` removes the pruner."""

    positions = "contiguous"
    provides = ("text",)

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self.last: tuple[KeptTokens, ...] = ()

    def detach(self) -> None:
        """Restore the model and the processor."""
        while self.undo:
            self.undo.pop()()


def attach(model: Any, processor: Any, pruner: Pruner) -> Handle:
    """Prune each picture of mlx-lm's `processor(text, images=)` and `embed_inputs`.

    Raises `InputError` for a processor that is not mlx-lm's, or has a pruner.
    """
    handle, kind, plain = Handle(), type(model), type(processor)
    side = getattr(processor, "token_patch", None)
    if side is None or {"_tokprune"} & (vars(kind).keys() | vars(plain).keys()):
        raise InputError(
            "expected mlx-lm's `load_processor(model, config)` and a model without a "
            "pruner; detach the other one first"
        )

    def budgets(pixels: Sequence[mx.array]) -> list[tuple[int, int]]:
        """Return (N, K) of each picture (C, H, W); more tokens than N keep all."""
        totals = [p.shape[1] * p.shape[2] // side**2 for p in pixels]
        most = np.inf if pruner.keeps_all else pruner.keep_tokens or 0
        return [(n, n if n <= most else pruner.count(n)) for n in totals]

    def call(self: Any, text: str, *, images: Sequence) -> tuple[str, list[mx.array]]:
        text, pixels = plain.__call__(self, text, images=images)
        keeps = iter([keep for _, keep in budgets(pixels)])
        run = f"(?:{re.escape(self.image_token)})+"
        return re.sub(run, lambda _: self.image_token * next(keeps), text), pixels

    def embed_inputs(
        self: Any, inputs: mx.array, *, pixel_values: Any = None
    ) -> mx.array:
        if pixel_values is None:
            return kind.embed_inputs(self, inputs)
        one = isinstance(pixel_values, mx.array) and pixel_values.ndim == 3
        pixels: Any = [pixel_values] if one else pixel_values
        ids, media, pairs = np.array(inputs), self.args.image_token_id, budgets(pixels)
        ends = np.flatnonzero(ids == media)
        if len(ends) != sum(keep for _, keep in pairs):
            raise InputError(
                f"{len(ends)} placeholders for {sum(keep for _, keep in pairs)} visual "
                "tokens; make the prompt with the processor that has this pruner"
            )
        ends = ends[np.cumsum([keep for _, keep in pairs]) - 1]
        full = np.insert(ids, np.repeat(ends, [n - k for n, k in pairs]), media)
        rows = kind.embed_inputs(self, mx.array(full), pixel_values=pixels)
        columns, left, last = np.flatnonzero(full == media), full != media, []
        for total, keep in pairs:
            own, columns = columns[:total], columns[total:]
            indices = np.arange(total)
            if keep < total:
                text = {"text": rows[int(own[-1]) + 1 :][None]}
                named = text if "text" in pruner.needs else {}
                tokens = rows[mx.array(own)][None]
                selection = pruner(Features(tokens, None, extras=named))
                indices = np.array(selection.indices[0])
                rows[mx.array(own[indices])] = selection.apply(tokens)[0]
            left[own[indices]] = True
            last.append(KeptTokens(total, keep, indices, (total,), total))
        handle.last = tuple(last)
        return rows[mx.array(np.flatnonzero(left))]

    def swap(instance: Any, **named: Callable) -> None:
        before = type(instance)
        names = {"_tokprune": True, "__module__": before.__module__} | named
        # mlx-lm's processor is a frozen dataclass, which `object` may change.
        change = type(before.__name__, (before,), names)
        object.__setattr__(instance, "__class__", change)
        handle.undo.append(lambda: object.__setattr__(instance, "__class__", before))

    swap(processor, __call__=call)
    swap(model, embed_inputs=embed_inputs)
    return handle
