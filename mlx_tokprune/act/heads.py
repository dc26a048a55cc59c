"""Action heads of robot policies: from a scene to actions in [-1, 1].

`Bins` decodes action tokens one after the other (OpenVLA, arXiv 2406.09246). `Slots`
reads a chunk of actions from the hidden states of empty slots in one forward pass
(OpenVLA-OFT, arXiv 2502.19645). Both are lazy, so that one `mx.eval` runs a whole
action. `Chunks` decodes a chunk in FAST's code (pi0-FAST, arXiv 2501.09747), which ends
with a stop token.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..models.language import Decoder, ReadResult, greedy
from ..models.protocol import VisionModel
from ..pipeline import Scene, VisualTokens, run
from ..processing.actions import Scale
from ..processing.chunks import ChunkProcessor
from ..processing.processor import ActionProcessor
from ..processing.prompt import Prompt
from ..pruners import Plan


class Head:
    """Action head of a policy: its prompt, decoding and conversion to actions.

    This base decodes tokens, in answers of a fixed length, and gives all robots of a
    batch one prompt.

    processor: the policy's processor. size: dimensions of an action. kind: name of the
    head. has_tokens: whether an answer is token ids. compiles: whether a whole call has
    static shapes. alone: whether each robot has a prompt of its own, so that the robots
    of a batch act one after the other. rows: last positions of the prompt that the head
    reads. calls: forward passes of the language model for an answer, at most. chunk:
    actions of an answer. stops: token ids that end an answer.
    """

    processor: Any
    size: int
    kind: str
    has_tokens = True
    compiles = True
    alone = False
    rows = 1
    calls: int
    chunk: int
    stops: frozenset[int] = frozenset()

    def check(self, bounds: Scale) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        check_scale(bounds, self.size)

    def first(self, count: int | None) -> None:
        """Raise `InputError` unless an answer has `count` first actions."""
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and not (whole and 0 < count <= self.chunk):
            raise InputError(
                f"cannot do the first {count!r} actions of a chunk; expected 1 to "
                f"{self.chunk}"
            )

    def state(self, values: np.ndarray, bounds: Scale) -> Any:
        """Convert (robots, p) states from their own units to the input of `tell`."""
        check_scale(bounds, values.shape[1], "proprio", "the policy reads")
        return mx.array(bounds.from_units(values).astype(np.float32))

    def tell(
        self,
        instruction: str,
        state: Any,
        prompt: Callable[[str], Prompt] | None = None,
    ) -> tuple[Prompt, mx.array | None]:
        """Return the prompt, and the states that the model reads beside it.

        prompt: replaces the processor's function; it may cache prompts.
        """
        return (prompt or self.processor.prompt)(instruction), state

    def decode(
        self,
        model: VisionModel,
        scene: Scene,
        plan: Plan,
        *,
        attention_of: int | None = None,
        **options: Any,
    ) -> tuple[list, VisualTokens]:
        """Return the parts of an answer, for `joined`, and its visual tokens. Lazy.

        The parts are the first tokens (B,) and an iterator of the rest.

        attention_of: layer whose attention from every token of the answer to the visual
        tokens is recorded; then the whole answer is decoded at once. options: keyword
        arguments of `pipeline.run`.
        """
        cache, decoder = model.decoder.make_cache(), model.decoder
        read, visual = run(
            model, scene, plan, cache=cache, attention_of=attention_of, **options
        )
        start = len(scene.prompt.segments[0])
        columns = slice(start, start + visual.keep)
        attended = [] if visual.attended is None else [visual.attended]

        def watch(number: int, hidden: mx.array) -> None:
            if number == attention_of:
                cached = read.cache[number]
                weights = decoder.attention_to_cache(number, hidden, cached)
                attended.append(weights[..., columns])

        rest = self._tokens(decoder, read, watch)
        first = next(rest)
        if visual.attended is None:
            return [first, rest], visual
        rest = list(rest)
        joined = mx.concatenate(attended, axis=1)
        return [first, rest], dataclasses.replace(visual, attended=joined)

    def _tokens(
        self,
        decoder: Decoder,
        read: ReadResult,
        watch: Callable[[int, mx.array], None],
    ) -> Iterator[mx.array]:
        """Yield tokens (B,), each depending on the previous one, until all answers end.

        After its stop token an answer continues with zeros, as in the reference.
        """
        # `checked` has -1 where logits are not finite; `token` can be embedded.
        token, checked = greedy(decoder.logits(read.hidden)[:, -1])
        yield checked
        ended = mx.zeros(token.shape, mx.bool_)
        for _ in range(self.calls - 1):
            if self.stops:
                ended = ended | (checked < 0)
                for stop in self.stops:
                    ended = ended | (checked == stop)
                if mx.all(ended).item():
                    return
            hidden = decoder.follow(token[:, None], read.cache, watch)
            token, checked = greedy(decoder.logits(hidden)[:, -1])
            checked = mx.where(ended, 0, checked) if self.stops else checked
            yield checked

    def joined(self, parts: list) -> mx.array:
        """Join the parts of `decode` into the robots' answers, batch first."""
        first, rest = parts
        return mx.stack([first, *rest], axis=1)

    def ids(self, answer: np.ndarray) -> tuple[int, ...] | None:
        """Return the token ids of one answer; `None` for a head without tokens."""
        return tuple(map(int, answer))

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Convert answers to actions in [-1, 1]; invalid ones become NaN."""
        raise NotImplementedError

    def wrong(self, answer: np.ndarray) -> str | None:
        """Describe the fault of one answer; `None` for a valid one."""
        return None


class Bins(Head):
    """Head of greedy action tokens, one for each of the `size` action dimensions."""

    kind = "bins"

    def __init__(self, processor: ActionProcessor, size: int):
        self.processor, self.size, self.calls = processor, size, size

    def check(self, bounds: Scale) -> None:
        """Accept any bounds: the head decodes any number of dimensions."""

    def first(self, count: int | None) -> None:
        """Raise `InputError` for a count, because an answer is one action."""
        if count is not None:
            raise InputError(
                "this policy answers one action at a time; leave out first"
            )

    def normalized(self, answer: np.ndarray) -> np.ndarray:
        """Convert (..., A) token ids to values in [-1, 1]; invalid ids become NaN."""
        return np.where(answer >= 0, self.processor.values(answer), np.nan)


class Slots(Head):
    """Head that reads a chunk of actions from slots, in one forward pass.

    slots: slots in the sequence. size: dimensions of an action. Each slot is read from
    the hidden state before it, as in next-token prediction. Rows are counted from the
    end of the sequence, so pruning does not move them.
    """

    kind = "slots"
    has_tokens = False
    calls = 1

    def __init__(self, processor: ActionProcessor, slots: int, size: int):
        self.processor, self.slots, self.size = processor, slots, size
        self.chunk = slots // size
        self.rows = slots + 2  # the state before the slots, the slots, the stop token

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


class Chunks(Head):
    """Head of greedy tokens of an action chunk, up to its stop token.

    size: dimensions of an action. calls: tokens of an answer, at most. The host reads
    each token before the next is computed, so a whole call is not compiled.
    """

    kind = "chunks"
    compiles = False
    alone = True

    def __init__(self, processor: ChunkProcessor, size: int, calls: int):
        self.processor, self.size, self.calls = processor, size, calls
        self.chunk, self.stops = processor.horizon, frozenset({processor.stop})

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

    def ends(self, ids: Sequence[int]) -> bool:
        """Return whether these tokens are a complete answer."""
        return len(ids) >= self.calls or self.processor.stop in ids or min(ids) < 0

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Cut an answer after its stop token, or at `calls` tokens."""
        stop = self.processor.stop
        return list(ids[: ids.index(stop) + 1] if stop in ids else ids)[: self.calls]

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
