"""Run-time inputs of scorers, carried from one step of an episode to the next."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..pruners import Plan


@dataclass(frozen=True)
class RuntimeInput:
    """A run-time input of scorers, batch first.

    first: (robots, action dimensions) -> its value in an episode's first step.
    after: executed normalised actions (B, chunk, A) -> its value in the next step.
    """

    first: Callable[[int, int], mx.array]
    after: Callable[[np.ndarray], np.ndarray]


# By name in `Features.extras`; `Features` documents each.
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
    """Run-time inputs that a plan reads, kept between the steps of an episode."""

    def __init__(self, plan: Plan, size: int):
        reads = {name for pruner in plan for name in pruner.reads}
        self.names = tuple(name for name in RUNTIME_INPUTS if name in reads)
        self._size = size
        self.values: dict[str, mx.array] = {}

    def reset(self) -> None:
        """Begin an episode: forget the previous step."""
        self.values = {}

    def keep(self, rows: mx.array) -> None:
        """Keep only these rows (robots) of the previous batch."""
        self.values = {name: value[rows] for name, value in self.values.items()}

    def of(self, robots: int) -> dict[str, mx.array]:
        """Return the inputs of the next step for a number of robots.

        Raises `InputError` unless the previous step had as many robots.
        """
        for value in self.values.values():
            check_robots(value, robots)
        first = first_inputs(robots, self._size)
        return {name: self.values.get(name, first[name]) for name in self.names}

    def note(self, normalized: np.ndarray, executed: int | None) -> None:
        """Record a step's normalised actions, (B, A) or (B, chunk, A).

        executed: number of a chunk's actions that the robot executes; `None` for all.
        """
        if not self.names:
            return
        chunks = normalized.reshape(len(normalized), -1, self._size)[:, :executed]
        for name in self.names:
            value = RUNTIME_INPUTS[name].after(chunks)
            self.values[name] = mx.array(value.astype(np.float32))


def check_robots(previous: mx.array, robots: int) -> None:
    """Raise `InputError` unless the previous step had as many robots."""
    if len(previous) != robots:
        raise InputError(
            f"the episode has {len(previous)} robots, not {robots}; select the robots "
            "that continue with keep_robots, or begin another episode with reset"
        )
