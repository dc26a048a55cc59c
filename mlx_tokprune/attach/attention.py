"""Attention and keys of the towers of mlx-vlm, for methods that read them.

mlx-vlm's own code runs the tower. One block is recorded, and the attention that its
patches receive is computed again from its queries and keys: fused attention returns no
weights.
"""

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError

PROVIDES = ("attention", "attention_middle", "keys")
_WEIGHTS = 1 << 24  # attention weights in memory at once


@dataclass(frozen=True)
class Heads:
    """Queries and keys of one call of an attention block.

    queries, keys: (B, H, L, D). plain: (B, L, H * D), keys without rotary positions.
    ends: ends along L of the parts that attend to themselves alone.
    """

    queries: mx.array
    keys: mx.array
    plain: mx.array
    scale: float
    ends: Sequence[int]


@dataclass(frozen=True)
class Tower:
    """Attention of the tower of a family.

    blocks: from a model, the attention modules that attend to whole pictures, by
    number, up to the block that features come from. depth: number of all blocks. heads:
    from (module, arguments by name, inputs of the prompt, config). takes: names of
    those arguments. tokens: (model, (B, L, C) of patches, inputs) -> (N, C) of visual
    tokens, means of their patches. asks: whether the first token of a picture is a
    class token, which alone attends. apart: whether the block may be called for each
    picture, as (1, L, C).
    """

    blocks: Callable[[Any], dict[int, Any]]
    depth: Callable[[Any], int]
    heads: Callable[[Any, Mapping, Mapping, Any], Heads]
    takes: tuple[str, ...]
    tokens: Callable[[Any, mx.array, Mapping], mx.array]
    asks: Callable[[Any], bool] = lambda model: False
    apart: bool = False


class Watch:
    """Recorder of the last and, if required, a middle attention block of a tower.

    names: extras to compute, from `PROVIDES`. Raises `InputError` for a tower whose
    blocks differ from those of mlx-vlm 0.7.10.
    """

    def __init__(self, model: Any, tower: Tower, names: Sequence[str]):
        self._model, self._tower, self.names = model, tower, tuple(names)
        # Calls are recorded for each thread: mlx-vlm's server reads in its own.
        self._local = threading.local()
        try:
            blocks = tower.blocks(model)
            last = max(blocks)
            aim = tower.depth(model) * 3 // 8  # as in our own towers
            middle = min(blocks, key=lambda number: (abs(number - aim), number))
            takes = inspect.signature(type(blocks[last]).__call__).parameters
            if not {*tower.takes} <= {*takes}:
                raise TypeError(f"{tower.takes} are not among {[*takes]}")
        except (AttributeError, TypeError, ValueError):
            raise InputError(
                "the tower of this model attends in a way that is not supported; "
                "choose a method that needs no attention, such as 'norm'"
            ) from None
        self._places = {"attention": last, "keys": last, "attention_middle": middle}
        self._watched = {
            self._places[name]: blocks[self._places[name]] for name in names
        }

    def methods(self) -> Iterator[tuple[Any, dict[str, Callable]]]:
        """Yield recorded modules with the methods that a subclass of each overrides."""
        for number, module in self._watched.items():
            yield module, {"__call__": self._recorder(number, type(module))}

    def _recorder(self, number: int, kind: type) -> Callable:
        """Return a `__call__` that records its arguments and runs mlx-vlm's."""

        # Wrapped, so that `inspect.signature` still reports mlx-vlm's parameters.
        @functools.wraps(kind.__call__)
        def call(self_: nn.Module, *args: Any, **named: Any) -> Any:
            calls = getattr(self._local, "calls", None)
            if calls is not None:
                bound = inspect.signature(kind.__call__).bind(self_, *args, **named)
                calls.append((number, bound.arguments))
            return kind.__call__(self_, *args, **named)

        return call

    @contextlib.contextmanager
    def recording(self) -> Iterator[list]:
        """Record the calls of the blocks inside a `with` block, into the yielded list.

        An entry is the number of a block and its arguments by name.
        """
        self._local.calls = calls = []
        try:
            yield calls
        finally:
            self._local.calls = None

    def extras(
        self, calls: list, inputs: Mapping, rows: Sequence[int]
    ) -> list[dict[str, mx.array]]:
        """Return, for each prompt of `rows` visual tokens, extras (n, ...) by name.

        Attention sums to 1 over the tokens of a prompt if patches attend (no class
        token): the mean over all pictures, each attended to by its own patches alone.
        Raises `InputError` where the recorded calls do not match the prompts.
        """
        extras: dict[str, list[mx.array]] = {}
        for name in self.names:
            place = self._places[name]
            block_calls = [arguments for number, arguments in calls if number == place]
            if len(block_calls) != 1 and not (block_calls and self._tower.apart):
                raise InputError(
                    f"the tower ran {len(block_calls)} times for a prompt; expected "
                    "once, or a method that needs no attention, such as 'norm'"
                )
            extras[name] = self._split(name, block_calls, inputs, rows)
        return [
            {name: parts[number] for name, parts in extras.items()}
            for number in range(len(rows))
        ]

    def _split(
        self, name: str, calls: list, inputs: Mapping, rows: Sequence[int]
    ) -> list[mx.array]:
        """Return one extra, split into the `rows` tokens of each prompt."""
        module, config = self._watched[self._places[name]], self._model.config
        heads = _join(
            [
                self._tower.heads(module, arguments, inputs, config)
                for arguments in calls
            ]
        )
        if name == "keys":
            patches = heads.plain.astype(mx.float32)
        else:
            asks = self._tower.asks(self._model)
            patches = mx.stack([*received(heads, asks)], axis=-1)
        tokens = self._tower.tokens(self._model, patches, inputs)
        if len(tokens) != sum(rows):
            raise InputError(
                f"the tower attended to {len(tokens)} tokens, and a prompt has "
                f"{sum(rows)}; choose a method that needs no attention, such as 'norm'"
            )
        parts = mx.split(tokens, np.cumsum(rows)[:-1].tolist())
        if name == "keys":
            return [*parts]
        return [part[:, 0] / mx.maximum(mx.sum(part[:, 1]), 1e-6) for part in parts]


def _join(calls: Sequence[Heads]) -> Heads:
    """Return several calls, of B = 1, as one."""
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
    """Return (B, L) float32 attention that patches receive, and (B, L) query shares.

    Attention is the mean over heads, summed over the patches that attend. A share is
    the number of those patches divided by the patches of the picture. asks: the class
    token, which is first and no patch, attends alone, in place of every patch.
    """
    batch, count, length, _ = heads.queries.shape
    sums, shares = [], []
    for number in range(batch):
        for start, end in zip([0, *heads.ends[:-1]], heads.ends, strict=True):
            keys = heads.keys[number, :, start:end].astype(mx.float32).swapaxes(1, 2)
            queries = heads.queries[number, :, start : start + 1 if asks else end]
            step = max(1, _WEIGHTS // max(1, count * (end - start)))
            total = mx.zeros(end - start)
            for first in range(0, queries.shape[1], step):
                part = queries[:, first : first + step].astype(mx.float32)
                weights = mx.softmax(part * heads.scale @ keys, axis=-1)
                total = total + mx.sum(weights, axis=(0, 1)) / count
                mx.eval(total)  # a lazy graph would hold the weights of every step
            sums.append(total)
            share = queries.shape[1] / max(1, end - start - asks)
            shares.append(mx.full((end - start,), share))
    shape = (batch, length)
    return mx.concatenate(sums).reshape(shape), mx.concatenate(shares).reshape(shape)
