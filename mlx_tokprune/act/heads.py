"""Action heads of robot policies: from a scene to actions in [-1, 1].

`Bins` decodes action tokens one after the other (OpenVLA, arXiv 2406.09246). `Slots`
reads a chunk of actions from the hidden states of empty slots in one forward pass
(OpenVLA-OFT, arXiv 2502.19645). Both are lazy, so that one `mx.eval` runs a whole
action. `Chunks` decodes a chunk in FAST's code (pi0-FAST, arXiv 2501.09747), which ends
with a stop token.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..models.language import ReadResult, greedy
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, run
from ..processing.actions import Scale
from ..processing.chunks import ChunkProcessor
from ..processing.processor import ActionProcessor
from ..processing.prompt import Prompt
from ..pruners import Plan


class Head(Protocol):
    """Action head of a policy: its prompt, decoding and conversion to actions.

    processor: the policy's processor. kind: name of the head. has_tokens: whether an
    answer is token ids. compiles: whether a whole call has static shapes. alone:
    whether each robot has a prompt of its own, so that the robots of a batch act one
    after the other.
    """

    kind: str
    has_tokens: bool
    compiles: bool
    alone: bool

    @property
    def processor(self) -> Any:
        """Processor of the policy's prompts and images."""
        ...

    @property
    def size(self) -> int:
        """Dimensions of an action."""
        ...

    @property
    def rows(self) -> int:
        """Last positions of the prompt that the head reads."""
        ...

    @property
    def calls(self) -> int:
        """Forward passes of the language model for an answer, at most."""
        ...

    @property
    def stops(self) -> frozenset[int]:
        """Token ids that end an answer."""
        ...

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        ...

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless an answer has `count` first actions."""
        ...

    def state(self, values: np.ndarray, bounds: Scale) -> Any:
        """Convert (robots, p) states from their own units to the input of `tell`."""
        ...

    def tell(
        self, instruction: str, state: Any, prompt: Callable[[str], Prompt] | None
    ) -> tuple[Prompt, mx.array | None]:
        """Return the prompt, and the states that the model reads beside it.

        prompt: replaces the processor's function; it may cache prompts.
        """
        ...

    def decode(
        self, model: VisionModel, scene: Scene, plan: Plan, **options: Any
    ) -> tuple[list, VisualTokens]:
        """Return the parts of an answer, for `joined`, and its visual tokens. Lazy."""
        ...

    def joined(self, parts: list) -> mx.array:
        """Join the parts of `decode` into the robots' answers, batch first."""
        ...

    def ids(self, answer: np.ndarray) -> tuple[int, ...] | None:
        """Return the token ids of one answer; `None` for a head without tokens."""
        ...

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Convert answers to actions in [-1, 1]; invalid ones become NaN."""
        ...

    def wrong(self, answer: np.ndarray) -> str | None:
        """Describe the fault of one answer; `None` for a valid one."""
        ...


def _attention_recorder(
    model: VisionModel,
    read: ReadResult,
    layer: int | None,
    visual: slice,
    attention: list,
) -> Callable[[int, mx.array], None]:
    """Return a callback that records attention to the visual tokens in one layer.

    It appends the attention of new tokens to `attention`. visual: the columns of the
    visual tokens.
    """

    def watch(number: int, hidden: mx.array) -> None:
        if number == layer:
            cache = read.cache[number]
            weights = model.decoder.attention_to_cache(number, hidden, cache)
            attention.append(weights[..., visual])

    return watch


class _FixedLength:
    """Base of heads with answers of a fixed length, whose robots share one prompt."""

    processor: ActionProcessor
    compiles = True
    alone = False
    stops: frozenset[int] = frozenset()

    def state(self, values: np.ndarray, bounds: Scale) -> mx.array:
        """Normalise and clip (robots, p) states."""
        check_scale(bounds, values.shape[1], "proprio", "the policy reads")
        return mx.array(bounds.from_units(values).astype(np.float32))

    def tell(
        self,
        instruction: str,
        state: mx.array | None,
        prompt: Callable[[str], Prompt] | None = None,
    ) -> tuple[Prompt, mx.array | None]:
        """Return the prompt, and the states that the model reads beside it."""
        return (prompt or self.processor.prompt)(instruction), state

    def wrong(self, answer: np.ndarray) -> None:
        """Return `None`: every answer is a valid action."""


@dataclass(frozen=True)
class Bins(_FixedLength):
    """Head of greedy action tokens, one for each of the `size` action dimensions."""

    processor: ActionProcessor
    size: int
    kind = "bins"
    has_tokens = True
    rows = 1

    @property
    def calls(self) -> int:
        """Forward passes of the language model for an action."""
        return self.size

    def check(self, bounds: Scale) -> None:
        """Accept any bounds: the head decodes any number of dimensions."""

    def first(self, count: int | None) -> None:
        """Raise `InputError` for a count, because an answer is one action."""
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
        **options: Any,
    ) -> tuple[list[mx.array], VisualTokens]:
        """Return A lazy tokens (B,), each depending on the previous one.

        attention_of: layer whose attention from every action token to the visual
        tokens is recorded. options: keyword arguments of `pipeline.run`.
        """
        cache, decoder = model.decoder.make_cache(), model.decoder
        read, visual = run(
            model, scene, plan, cache=cache, attention_of=attention_of, **options
        )
        hidden, tokens, attended = read.hidden, [], []
        start = len(scene.prompt.segments[0])

        columns = slice(start, start + visual.keep)
        watch = _attention_recorder(model, read, attention_of, columns, attended)
        while True:
            # `checked` has -1 where logits are not finite; `token` can be embedded.
            token, checked = greedy(decoder.logits(hidden)[:, -1])
            tokens.append(checked)
            if len(tokens) == self.size:
                break
            hidden = decoder.follow(token[:, None], read.cache, watch)
        if visual.attended is not None:
            joined = mx.concatenate([visual.attended, *attended], axis=1)
            visual = dataclasses.replace(visual, attended=joined)
        return tokens, visual

    def joined(self, parts: list[mx.array]) -> mx.array:
        """Join the tokens into (B, A) token ids."""
        return mx.stack(parts, axis=1)

    def ids(self, answer: np.ndarray) -> tuple[int, ...] | None:
        """Return the token ids of one action."""
        return tuple(map(int, answer))

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Convert (..., A) token ids to values in [-1, 1]; invalid ids become NaN."""
        return np.where(answer >= 0, self.processor.values(answer), np.nan)


@dataclass(frozen=True)
class Slots(_FixedLength):
    """Head that reads a chunk of actions from slots, in one forward pass.

    slots: slots in the sequence. size: dimensions of an action. Each slot is read from
    the hidden state before it, as in next-token prediction. Rows are counted from the
    end of the sequence, so pruning does not move them.
    """

    processor: ActionProcessor
    slots: int
    size: int
    kind = "slots"
    has_tokens = False
    calls = 1

    @property
    def rows(self) -> int:
        """Positions to read: the state before the slots, the slots, the stop token."""
        return self.slots + 2

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        check_scale(bounds, self.size)

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless a chunk has `count` first actions."""
        _check_first(count, self.slots // self.size)

    def decode(
        self, model: VisionModel, scene: Scene, plan: Plan, **options: Any
    ) -> tuple[list[mx.array], VisualTokens]:
        """Return one lazy array (B, chunk, A), and the visual tokens.

        options: keyword arguments of `pipeline.run`.
        """
        read, visual = run(model, scene, plan, rows=self.rows, **options)
        chunk = model.action_head(read.hidden[:, : self.slots])
        return [chunk.astype(mx.float32)], visual

    def joined(self, parts: list[mx.array]) -> mx.array:
        """Return the (B, chunk, A) actions."""
        return parts[0]

    def ids(self, answer: np.ndarray) -> None:
        """Return `None`: slots have no token ids."""
        return None

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Return the (..., chunk, A) actions unchanged."""
        return answer


def check_scale(
    bounds: Scale,
    size: int,
    name: str = "action",
    owner: str = "the policy's actions have",
) -> None:
    """Raise `InputError` unless the statistics scale `size` numbers."""
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
    """Head of greedy tokens of an action chunk, up to its stop token.

    size: dimensions of an action. most: tokens of an answer, at most. The host reads
    each token before the next is computed, so a whole call is not compiled.
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
        """Forward passes of the language model for a chunk, at most."""
        return self.most

    @property
    def stops(self) -> frozenset[int]:
        """Token ids that end an answer."""
        return frozenset({self.processor.stop})

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        check_scale(bounds, self.size)

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless a chunk has `count` first actions."""
        _check_first(count, self.processor.horizon)

    def state(self, values: np.ndarray, bounds: Scale) -> np.ndarray:
        """Normalise one robot's state to (p,) without clipping.

        Without bounds the state is returned unchanged.
        """
        if not len(bounds.low):
            return values[0]
        check_scale(bounds, values.shape[1], "proprio", "the policy reads")
        return bounds.from_units_unclipped(values[0])

    def tell(
        self,
        instruction: str,
        state: np.ndarray | None,
        prompt: Callable[[str], Prompt] | None = None,
    ) -> tuple[Prompt, None]:
        """Return the prompt, which contains the state (p,) as text.

        prompt: unused, because the prompt changes with the state.
        """
        state = np.zeros(0) if state is None else state
        return self.processor.prompt(instruction, state), None

    def decode(
        self,
        model: VisionModel,
        scene: Scene,
        plan: Plan,
        attention_of: int | None = None,
        **options: Any,
    ) -> tuple[list, VisualTokens]:
        """Return the first lazy tokens (B,) and an iterator of the rest, for `joined`.

        attention_of: layer whose attention from every answer token to the visual
        tokens is recorded; then the whole answer is decoded at once. options: keyword
        arguments of `pipeline.run`.
        """
        cache = model.decoder.make_cache()
        read, visual = run(
            model, scene, plan, cache=cache, attention_of=attention_of, **options
        )
        attended: list[mx.array] = []
        token, checked = greedy(model.decoder.logits(read.hidden)[:, -1])

        columns = slice(visual.keep)  # the prompt begins with its visual tokens
        watch = _attention_recorder(model, read, attention_of, columns, attended)
        rest = self._follow(model, token, checked, read.cache, watch)
        if attention_of is None or visual.attended is None:
            return [checked, rest], visual
        rest = list(rest)
        joined = mx.concatenate([visual.attended, *attended], axis=1)
        return [checked, rest], dataclasses.replace(visual, attended=joined)

    def _follow(
        self,
        model: VisionModel,
        token: mx.array,
        checked: mx.array,
        cache: list,
        watch: Callable[[int, mx.array], None],
    ) -> Iterator[mx.array]:
        """Yield the tokens after the first, until every robot's answer has ended.

        After its end an answer continues with zeros, as in the reference.
        """
        ended = mx.zeros(token.shape, mx.bool_)
        for _ in range(self.most - 1):
            ended = ended | (checked == self.processor.stop) | (checked < 0)
            if mx.all(ended).item():
                return
            hidden = model.decoder.follow(token[:, None], cache, watch)
            token, checked = greedy(model.decoder.logits(hidden)[:, -1])
            checked = mx.where(ended, 0, checked)
            yield checked

    def joined(self, parts: list) -> mx.array:
        """Decode the rest of the answers and join them into (B, T) token ids."""
        first, rest = parts
        return mx.stack([first, *rest], axis=1)

    def ends(self, ids: Sequence[int]) -> bool:
        """Return whether these tokens are a complete answer."""
        return len(ids) >= self.most or self.processor.stop in ids or min(ids) < 0

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Cut an answer after its stop token, or at `most` tokens."""
        stop = self.processor.stop
        return list(ids[: ids.index(stop) + 1] if stop in ids else ids)[: self.most]

    def shifted(self, ids: Sequence[int], done: int) -> list[int]:
        """Encode an answer (T,) without its first `done` actions.

        The last action is repeated, so that the chunk keeps its length.
        """
        chunk, _ = self.processor.actions(ids)
        held = np.repeat(chunk[-1:], min(done, len(chunk)), axis=0)
        return self.processor.answer(np.concatenate([chunk[done:], held]))

    def ids(self, answer: np.ndarray) -> tuple[int, ...]:
        """Return the token ids of one answer, up to its end."""
        return tuple(self.cut([int(number) for number in answer]))

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Convert (..., T) token ids to (..., chunk, A) actions.

        Chunks of answers with invalid ids are NaN.
        """
        flat = answer.reshape(-1, answer.shape[-1])
        chunks = [self._actions(ids)[0] for ids in flat]
        return np.stack(chunks).reshape(*answer.shape[:-1], *chunks[0].shape)

    def wrong(self, answer: np.ndarray) -> str | None:
        """Describe the fault of an answer (T,); `None` for a valid one."""
        return self._actions(answer)[1]

    def _actions(self, answer: np.ndarray) -> tuple[np.ndarray, str | None]:
        if (answer < 0).any():
            shape = (self.processor.horizon, self.processor.size)
            return np.full(shape, np.nan), None
        return self.processor.actions(self.ids(answer))


def head_of(
    model: VisionModel, processor: ActionProcessor | ChunkProcessor, size: int
) -> Head:
    """Return the action head of a policy, for actions of `size` numbers."""
    if isinstance(processor, ChunkProcessor):
        return Chunks(processor, model.args.action_dim, model.args.steps)
    oft = getattr(model.args, "oft", None)
    if oft is not None:
        return Slots(processor, oft.slots, oft.action_dim)
    return Bins(processor, size)
