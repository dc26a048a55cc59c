"""What the towers of mlx-vlm attend to, for methods that read it.

mlx-vlm's own code runs the tower. One block is watched, and what its patches receive is
computed again from its queries and keys: fused attention gives no weights.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError

PROVIDES = ("attention", "attention_middle", "keys")
_WEIGHTS = 1 << 24  # of attention that are there at once


@dataclass(frozen=True)
class Heads:
    """Of one call of an attention block.

    queries, keys: (B, H, L, D). plain: (B, L, H * D), keys without rotary positions.
    ends: of what attends to itself alone, along L.
    """

    queries: mx.array
    keys: mx.array
    plain: mx.array
    scale: float
    ends: Sequence[int]


@dataclass(frozen=True)
class Tower:
    """How the tower of a family attends.

    blocks: of a model the attention modules that see whole pictures, by number, up to
    the one that features come from. depth: blocks in all. heads: from (module,
    arguments by name, inputs of the prompt, config). takes: names of such arguments.
    tokens: (model, (B, L, C) of patches, inputs) -> (N, C) of visual tokens, means of
    their patches. asks: whether the first token of a picture is one that asks for all.
    apart: whether it may be called for each picture, as (1, L, C).
    """

    blocks: Callable[[Any], dict[int, Any]]
    depth: Callable[[Any], int]
    heads: Callable[[Any, Mapping, Mapping, Any], Heads]
    takes: tuple[str, ...]
    tokens: Callable[[Any, mx.array, Mapping], mx.array]
    asks: Callable[[Any], bool] = lambda model: False
    apart: bool = False


class Watch:
    """Looks at the last attention block of a tower, and at a middle one if asked to.

    Raises `InputError` for a tower that is not as it was when this was written.
    """

    def __init__(self, model, tower: Tower, names: Sequence[str]):
        self._model, self._tower, self.names = model, tower, tuple(names)
        self._local = threading.local()
        try:
            blocks = tower.blocks(model)
            last = max(blocks)
            aim = tower.depth(model) * 3 // 8  # as our own towers have it
            middle = min(blocks, key=lambda number: (abs(number - aim), number))
            takes = inspect.signature(type(blocks[last]).__call__).parameters
            right = {*tower.takes} <= {*takes}
        except (AttributeError, TypeError, ValueError):
            right = False
        if not right:
            raise InputError(
                "the tower of this model attends in a way that is not known here; "
                "choose a method that needs no attention, such as 'norm'"
            )
        self._places = {"attention": last, "keys": last, "attention_middle": middle}
        self._watched = {
            self._places[name]: blocks[self._places[name]] for name in names
        }

    def methods(self) -> Iterator[tuple[Any, dict]]:
        """Modules, and what a subclass of each one's has instead, by name."""
        for number, module in self._watched.items():
            yield module, {"__call__": self._noting(number, type(module))}

    def _noting(self, number: int, kind: type):
        @functools.wraps(kind.__call__)
        def call(self_, *args, **named):
            calls = getattr(self._local, "calls", None)
            if calls is not None:
                given = inspect.signature(kind.__call__).bind(self_, *args, **named)
                calls.append((number, given.arguments))
            return kind.__call__(self_, *args, **named)

        return call

    @contextlib.contextmanager
    def looking(self) -> Iterator[list]:
        """The calls of the blocks inside a `with` block."""
        self._local.calls = calls = []
        try:
            yield calls
        finally:
            self._local.calls = None

    def extras(
        self, calls: list, inputs: Mapping, rows: Sequence[int]
    ) -> list[dict[str, mx.array]]:
        """By name (n, ...), for each prompt of `rows` visual tokens, of what was seen.

        Attention sums to 1 over the tokens of a prompt, if it is the patches that ask:
        their mean over all pictures, each of which is seen by its own patches alone.
        """
        found: dict[str, list[mx.array]] = {}
        for name in self.names:
            given = [given for number, given in calls if number == self._places[name]]
            if len(given) != 1 and not (given and self._tower.apart):
                raise InputError(
                    f"the tower was asked {len(given)} times for a prompt; expected "
                    "once, or a method that needs no attention, such as 'norm'"
                )
            found[name] = self._split(name, given, inputs, rows)
        return [
            {name: parts[number] for name, parts in found.items()}
            for number in range(len(rows))
        ]

    def _split(self, name: str, calls: list, inputs: Mapping, rows: Sequence[int]):
        module, config = self._watched[self._places[name]], self._model.config
        heads = _behind(
            [self._tower.heads(module, given, inputs, config) for given in calls]
        )
        if name == "keys":
            patches = heads.plain.astype(mx.float32)
        else:
            asks = self._tower.asks(self._model)
            patches = mx.stack(received(heads, asks), axis=-1)
        tokens = self._tower.tokens(self._model, patches, inputs)
        if len(tokens) != sum(rows):
            raise InputError(
                f"the tower attended to {len(tokens)} tokens, and a prompt has "
                f"{sum(rows)}; choose a method that needs none, such as 'norm'"
            )
        parts = mx.split(tokens, np.cumsum(rows)[:-1].tolist())
        if name == "keys":
            return parts
        return [part[:, 0] / mx.maximum(mx.sum(part[:, 1]), 1e-6) for part in parts]


def _behind(calls: Sequence[Heads]) -> Heads:
    """Several calls, of B = 1, as one."""
    if len(calls) == 1:
        return calls[0]
    lengths = np.cumsum([0, *(call.ends[-1] for call in calls)]).tolist()
    pairs = zip(calls, lengths, strict=False)
    return Heads(
        mx.concatenate([call.queries for call in calls], axis=2),
        mx.concatenate([call.keys for call in calls], axis=2),
        mx.concatenate([call.plain for call in calls], axis=1),
        calls[0].scale,
        [start + end for call, start in pairs for end in call.ends],
    )


def received(heads: Heads, asks: bool = False) -> tuple[mx.array, mx.array]:
    """(B, L) float32: what each patch receives, mean over heads, summed over those that
    ask; and how many ask it, spread over its picture.

    Every patch asks, or the first alone, which is none.
    """
    batch, count, length, _ = heads.queries.shape
    sums, askers = [], []
    for number in range(batch):
        for start, end in zip([0, *heads.ends[:-1]], heads.ends, strict=True):
            keys = heads.keys[number, :, start:end].astype(mx.float32).swapaxes(1, 2)
            queries = heads.queries[number, :, start : start + 1 if asks else end]
            step = max(1, _WEIGHTS // max(1, count * (end - start)))
            found = mx.zeros(end - start)
            for first in range(0, queries.shape[1], step):
                some = queries[:, first : first + step].astype(mx.float32)
                weights = mx.softmax(some * heads.scale @ keys, axis=-1)
                found = found + mx.sum(weights, axis=(0, 1)) / count
                mx.eval(found)  # else all of them would be there at once
            sums.append(found)
            share = queries.shape[1] / max(1, end - start - asks)
            askers.append(mx.full((end - start,), share))
    shape = (batch, length)
    return mx.concatenate(sums).reshape(shape), mx.concatenate(askers).reshape(shape)
