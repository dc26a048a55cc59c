"""Run-time inputs of scorers that an episode carries from one step to the next."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..pruners import Plan


@dataclass(frozen=True)
class RuntimeInput:
    """One input, batch first.

    first: (robots, numbers of an action) -> its value in the first step of an episode.
    after: normalised actions (B, chunk, A) that were executed -> its next value.
    """

    first: Callable[[int, int], mx.array]
    after: Callable[[np.ndarray], np.ndarray]


# By its name among the extras of `Features`, which documents it.
RUNTIME_INPUTS = {
    "action_previous": RuntimeInput(
        first=lambda robots, size: mx.zeros((robots, size)),
        after=lambda executed: executed[:, -1],
    ),
}


def first_inputs(robots: int, size: int) -> dict[str, mx.array]:
    """Return every run-time input of an episode's first step."""
    return {name: one.first(robots, size) for name, one in RUNTIME_INPUTS.items()}


class EpisodeInputs:
    """The run-time inputs that a plan reads, from step to step of an episode."""

    def __init__(self, plan: Plan, size: int):
        reads = {name for pruner in plan for name in pruner.reads}
        self.names = tuple(name for name in RUNTIME_INPUTS if name in reads)
        self._size = size
        self.values: dict[str, mx.array] = {}

    def reset(self) -> None:
        """Begin an episode."""
        self.values = {}

    def keep(self, rows: mx.array) -> None:
        """Go on with these robots of the last batch."""
        self.values = {name: value[rows] for name, value in self.values.items()}

    def of(self, robots: int) -> dict[str, mx.array]:
        """Return the inputs of the next step, for this many robots."""
        for value in self.values.values():
            check_robots(value, robots)
        first = first_inputs(robots, self._size)
        return {name: self.values.get(name, first[name]) for name in self.names}

    def note(self, normalized: np.ndarray, executed: int | None) -> None:
        """Take what a step did: (B, A) or (B, chunk, A), of a chunk the first actions.

        executed: how many of a chunk; `None` for all.
        """
        if not self.names:
            return
        chunks = normalized.reshape(len(normalized), -1, self._size)[:, :executed]
        for name in self.names:
            value = RUNTIME_INPUTS[name].after(chunks)
            self.values[name] = mx.array(value.astype(np.float32))


def check_robots(previous: mx.array, robots: int) -> None:
    """Raise `InputError` unless the last step had as many robots."""
    if len(previous) != robots:
        raise InputError(
            f"the episode has {len(previous)} robots, not {robots}; say which go on "
            "with keep_robots, or begin another with reset"
        )
