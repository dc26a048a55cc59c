"""How a policy acts on a scene: the path, and what its end is turned into.

`Bins` decodes action tokens one after the other (OpenVLA, arXiv 2406.09246), `Slots`
reads a chunk of actions from the states of empty slots in one forward (OpenVLA-OFT,
arXiv 2502.19645). Both are lazy, so that one `mx.eval` runs a whole action. `Chunks`
decodes a chunk in FAST's code (pi0-FAST, arXiv 2501.09747), whose length shows itself.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..models.language import Read, greedy
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, run
from ..processing.actions import Scale
from ..processing.chunks import ChunkProcessor
from ..processing.processor import ActionProcessor
from ..processing.prompt import Prompt
from ..pruners import Plan


class Head(Protocol):
    """How a policy answers: what it is prompted with, and what becomes of its output.

    kind: its name. size: numbers of an action. rows: positions of the prompt that it
    reads. calls: forward passes of the language model for an answer, at most. stops:
    token ids that end an answer. has_tokens: whether an answer is token ids. compiles:
    whether a whole call has static shapes. alone: whether each robot has a prompt of
    its own, so that robots of a batch act one after the other.
    """

    processor: Any
    kind: str
    has_tokens: bool
    compiles: bool
    alone: bool

    @property
    def size(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def calls(self) -> int: ...

    @property
    def stops(self) -> frozenset[int]: ...

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        ...

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless an answer has `count` first actions."""
        ...

    def state(self, values: np.ndarray, bounds: Scale) -> Any:
        """(robots, p) states in their own units -> as `tell` takes them."""
        ...

    def tell(
        self, instruction: str, state: Any, prompt: Callable[[str], Prompt] | None
    ) -> tuple[Prompt, mx.array | None]:
        """The prompt, and the states that the model reads beside it.

        prompt: makes the prompt in the place of the processor, which has no cache.
        """
        ...

    def decode(
        self, model: VisionModel, scene: Scene, plan: Plan, **how
    ) -> tuple[list, VisualTokens]:
        """Parts of an answer, for `joined`, and its visual tokens. Lazy."""
        ...

    def joined(self, parts: list) -> mx.array:
        """The answers of all robots, batch first."""
        ...

    def ids(self, answer: np.ndarray) -> tuple[int, ...] | None:
        """The token ids of one answer, where it has such."""
        ...

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Answers -> actions in [-1, 1], NaN for what is none."""
        ...

    def wrong(self, answer: np.ndarray) -> str | None:
        """The fault of one answer, in words; `None` for a sound one."""
        ...


def _attention_recorder(
    model: VisionModel, read: Read, layer: int | None, visual: slice, attention: list
):
    """Return a callback that appends to `attention` that of new tokens in one layer.

    visual: the columns of the visual tokens, which alone are kept.
    """

    def watch(number: int, hidden: mx.array) -> None:
        if number == layer:
            cache = read.cache[number]
            weights = model.decoder.attention_to_cache(number, hidden, cache)
            attention.append(weights[..., visual])

    return watch


class _FixedLength:
    """What heads share whose answers have one length: robots share a prompt."""

    processor: ActionProcessor
    compiles = True
    alone = False
    stops: frozenset[int] = frozenset()

    def state(self, values: np.ndarray, bounds: Scale) -> mx.array:
        """(robots, p) states -> normalised and clipped."""
        check_scale(bounds, values.shape[1], "proprio", "the policy reads")
        return mx.array(bounds.from_units(values).astype(np.float32))

    def tell(self, instruction: str, state, prompt=None):
        """The prompt, and the states beside it."""
        return (prompt or self.processor.prompt)(instruction), state

    def wrong(self, answer: np.ndarray) -> None:
        """Every answer is an action."""


@dataclass(frozen=True)
class Bins(_FixedLength):
    """Greedy action tokens, one for each of the `size` numbers of an action."""

    processor: ActionProcessor
    size: int
    kind = "bins"
    has_tokens = True
    rows = 1

    @property
    def calls(self) -> int:
        """How often the language model runs for an action."""
        return self.size

    def check(self, bounds: Scale) -> None:
        """Any number of dimensions can be decoded."""

    def first(self, count: int | None) -> None:
        """Refuse a count: an answer is one action."""
        if count is not None:
            raise InputError(
                "this policy answers one action at a time; leave out first"
            )

    def decode(
        self,
        model: VisionModel,
        scene: Scene,
        plan: Plan,
        attention_of: int | None = None,
        **how,
    ) -> tuple[list[mx.array], VisualTokens]:
        """Tokens (B,), each depending on the one before; `how` is that of `run`.

        attention_of: the layer in which it is kept what all of them attend to.
        """
        cache, decoder = model.decoder.make_cache(), model.decoder
        read, visual = run(
            model, scene, plan, cache=cache, attention_of=attention_of, **how
        )
        hidden, said, attended = read.hidden, [], []
        start = len(scene.prompt.segments[0])

        where = slice(start, start + visual.keep)
        watch = _attention_recorder(model, read, attention_of, where, attended)
        while True:
            token, known = greedy(decoder.logits(hidden)[:, -1])
            said.append(known)
            if len(said) == self.size:
                break
            hidden = decoder.follow(token[:, None], read.cache, watch)
        if visual.attended is not None:
            joined = mx.concatenate([visual.attended, *attended], axis=1)
            visual = dataclasses.replace(visual, attended=joined)
        return said, visual

    def joined(self, parts: list[mx.array]) -> mx.array:
        """(B, A) token ids."""
        return mx.stack(parts, axis=1)

    def ids(self, said: np.ndarray) -> tuple[int, ...] | None:
        """Token ids of one action."""
        return tuple(map(int, said))

    def normalized(self, said: np.ndarray) -> np.ndarray:
        """(..., A) token ids -> values in [-1, 1], NaN for what is none."""
        return np.where(said >= 0, self.processor.values(said), np.nan)


@dataclass(frozen=True)
class Slots(_FixedLength):
    """Chunks of actions from slots. slots: in the sequence. size: numbers of an action.

    Each is read from the state before its slot, as a language model would; counted from
    the end, the kept visual tokens count, not all of them.
    """

    processor: ActionProcessor
    slots: int
    size: int
    kind = "slots"
    has_tokens = False
    calls = 1

    @property
    def rows(self) -> int:
        """The slots, the state before them, and the stop behind."""
        return self.slots + 2

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        check_scale(bounds, self.size)

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless a chunk has `count` first actions."""
        _check_first(count, self.slots // self.size)

    def decode(
        self, model: VisionModel, scene: Scene, plan: Plan, **how
    ) -> tuple[list[mx.array], VisualTokens]:
        """One array (B, chunk, A); `how` is that of `run`."""
        read, visual = run(model, scene, plan, rows=self.rows, **how)
        chunk = model.action_head(read.hidden[:, : self.slots])
        return [chunk.astype(mx.float32)], visual

    def joined(self, parts: list[mx.array]) -> mx.array:
        return parts[0]

    def ids(self, said: np.ndarray) -> None:
        return None

    def normalized(self, said: np.ndarray) -> np.ndarray:
        """(..., chunk, A) as they are."""
        return said


def check_scale(
    bounds: Scale,
    size: int,
    name: str = "action",
    owner: str = "the policy's actions have",
) -> None:
    """Raise `InputError` unless the statistics are those of `size` numbers."""
    if len(bounds.low) != size:
        raise InputError(
            f"norm_stats scale {len(bounds.low)} numbers of {name}, but {owner} {size}"
        )


def _check_first(count: int | None, chunk: int) -> None:
    if count is None:
        return
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count <= chunk:
        raise InputError(
            f"cannot do the first {count!r} actions of a chunk; expected 1 to {chunk}"
        )


@dataclass(frozen=True)
class Chunks:
    """Greedy tokens of a chunk of actions, until the one that ends it.

    size: numbers of an action. most: tokens of an answer. Each token is looked at
    before the next is computed, so calls are not compiled whole.
    """

    processor: ChunkProcessor
    size: int
    most: int
    kind = "chunks"
    has_tokens = True
    compiles = False
    alone = True
    rows = 1

    @property
    def calls(self) -> int:
        """How often the language model runs for a chunk, at most."""
        return self.most

    @property
    def stops(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset({self.processor.stop})

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        check_scale(bounds, self.size)

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless a chunk has `count` first actions."""
        _check_first(count, self.processor.horizon)

    def state(self, values: np.ndarray, bounds: Scale) -> np.ndarray:
        """The one robot's state (p,), which is not clipped; as it is without bounds."""
        if not len(bounds.low):
            return values[0]
        check_scale(bounds, values.shape[1], "proprio", "the policy reads")
        return bounds.from_units_unclipped(values[0])

    def tell(self, instruction: str, state, prompt=None):
        """The prompt, which has the state as text."""
        state = np.zeros(0) if state is None else state
        return self.processor.prompt(instruction, state), None

    def decode(
        self,
        model: VisionModel,
        scene: Scene,
        plan: Plan,
        attention_of: int | None = None,
        **how,
    ) -> tuple[list, VisualTokens]:
        """The first tokens (B,), lazily, and what gives the others, for `joined`.

        attention_of: the layer in which it is kept what all of them attend to, which
        decodes the whole answer at once. `how` is that of `run`.
        """
        cache = model.decoder.make_cache()
        read, visual = run(
            model, scene, plan, cache=cache, attention_of=attention_of, **how
        )
        attended: list[mx.array] = []
        token, known = greedy(model.decoder.logits(read.hidden)[:, -1])

        columns = slice(visual.keep)
        watch = _attention_recorder(model, read, attention_of, columns, attended)
        rest = self._follow(model, token, known, read.cache, watch)
        if attention_of is None or visual.attended is None:
            return [known, rest], visual
        rest = list(rest)
        joined = mx.concatenate([visual.attended, *attended], axis=1)
        return [known, rest], dataclasses.replace(visual, attended=joined)

    def _follow(self, model, token, known, cache, watch) -> Iterator[mx.array]:
        """Tokens after the first, until every robot's answer has ended.

        Behind its end an answer goes on with zeros, as the reference's does.
        """
        ended = mx.zeros(token.shape, mx.bool_)
        for _ in range(self.most - 1):
            ended = ended | (known == self.processor.stop) | (known < 0)
            if mx.all(ended).item():
                return
            hidden = model.decoder.follow(token[:, None], cache, watch)
            token, known = greedy(model.decoder.logits(hidden)[:, -1])
            known = mx.where(ended, 0, known)
            yield known

    def joined(self, parts: list) -> mx.array:
        """(B, T) token ids."""
        first, rest = parts
        return mx.stack([first, *rest], axis=1)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether nothing follows these tokens of an answer."""
        return len(ids) >= self.most or self.processor.stop in ids or min(ids) < 0

    def cut(self, ids: Sequence[int]) -> list[int]:
        """An answer up to its end."""
        stop = self.processor.stop
        return list(ids[: ids.index(stop) + 1] if stop in ids else ids)[: self.most]

    def shifted(self, ids: Sequence[int], done: int) -> list[int]:
        """An answer (T,) without its first `done` actions, the last one held."""
        chunk, _ = self.processor.actions(ids)
        held = np.repeat(chunk[-1:], min(done, len(chunk)), axis=0)
        return self.processor.answer(np.concatenate([chunk[done:], held]))

    def ids(self, said: np.ndarray) -> tuple[int, ...]:
        """Token ids of one answer, up to its end."""
        return tuple(self.cut([int(number) for number in said]))

    def normalized(self, said: np.ndarray) -> np.ndarray:
        """(..., T) token ids -> (..., chunk, A), NaN for what is none."""
        flat = said.reshape(-1, said.shape[-1])
        chunks = [self._answer(ids)[0] for ids in flat]
        return np.stack(chunks).reshape(*said.shape[:-1], *chunks[0].shape)

    def wrong(self, said: np.ndarray) -> str | None:
        """What was wrong with the tokens (T,) of an answer."""
        return self._answer(said)[1]

    def _answer(self, said: np.ndarray) -> tuple[np.ndarray, str | None]:
        if (said < 0).any():
            shape = (self.processor.horizon, self.processor.size)
            return np.full(shape, np.nan), None
        return self.processor.actions(self.ids(said))


def head_of(model: VisionModel, processor, size: int) -> Head:
    """Return how this policy acts, with actions of `size` numbers."""
    if isinstance(processor, ChunkProcessor):
        return Chunks(processor, model.args.action_dim, model.args.steps)
    oft = getattr(model.args, "oft", None)
    if oft is not None:
        return Slots(processor, oft.slots, oft.action_dim)
    return Bins(processor, size)
