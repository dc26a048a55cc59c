"""How a policy acts on a scene: the path, and what its end is turned into.

`Bins` decodes action tokens one after the other (OpenVLA, arXiv 2406.09246), `Slots`
reads a chunk of actions from the states of empty slots in one forward (OpenVLA-OFT,
arXiv 2502.19645). Both are lazy, so that one `mx.eval` runs a whole action.
"""

import dataclasses
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..actions import Bounds
from ..errors import InputError
from ..models.family import VisionModel
from ..pipeline import Scene, VisualTokens, run
from ..processor import ActionProcessor
from ..pruners import Plan


@dataclass(frozen=True)
class Bins:
    """Greedy action tokens. size: numbers of an action."""

    processor: ActionProcessor
    size: int
    decodes = True
    rows = 1

    @property
    def calls(self) -> int:
        """How often the language model runs for an action."""
        return self.size

    def check(self, bounds: Bounds) -> None:
        """Any number of dimensions can be decoded."""

    def act(
        self,
        model: VisionModel,
        scene: Scene,
        plan: Plan,
        note: int | None = None,
        **how,
    ) -> tuple[list[mx.array], VisualTokens]:
        """Tokens (B,), each depending on the one before; `how` is that of `run`.

        note: the layer in which all of them note what they attend to.
        """
        cache, decoder = model.decoder.make_cache(), model.decoder
        read, visual = run(model, scene, plan, cache=cache, note=note, **how)
        hidden, said, attended = read.hidden, [], []
        start = len(scene.prompt.segments[0])

        def watch(number: int, hidden: mx.array) -> None:
            if number == note:
                seen = decoder.attention_to_cache(number, hidden, read.cache[number])
                attended.append(seen[..., start : start + visual.keep])

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


def greedy(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(..., V) -> the best token, and the same or -1 where logits are not finite."""
    token = mx.argmax(logits, axis=-1).astype(mx.int32)
    finite = mx.isfinite(mx.max(logits, axis=-1))  # NaN is the largest of all
    return token, mx.where(finite, token, -1)


@dataclass(frozen=True)
class Slots:
    """Chunks of actions from slots. slots: in the sequence. size: numbers of an action.

    Each is read from the state before its slot, as a language model would; counted from
    the end, the kept visual tokens count, not all of them.
    """

    slots: int
    size: int
    decodes = False
    calls = 1

    @property
    def rows(self) -> int:
        """The slots, the state before them, and the stop behind."""
        return self.slots + 2

    def check(self, bounds: Bounds) -> None:
        """Raise `InputError` unless `bounds` scale this head's actions."""
        if len(bounds.low) != self.size:
            raise InputError(
                f"norm_stats scale {len(bounds.low)} numbers of action, but the "
                f"policy's actions have {self.size}"
            )

    def act(
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


Head = Bins | Slots


def head_of(model: VisionModel, processor, size: int) -> Head:
    """How this policy acts, with actions of `size` numbers."""
    if model.answers == "slots":
        return Slots(model.args.oft.slots, model.args.oft.action_dim)
    return Bins(processor, size)
