"""Run-time inputs of scorers, carried from one step of an episode to the next."""

import mlx.core as mx
import numpy as np

from ..errors import InputError
from ..features import EPISODE_EXTRAS
from ..pruners import Plan


def first_inputs(robots: int, size: int) -> dict[str, mx.array]:
    """Return every run-time input of an episode's first step: no action, so zeros."""
    return {name: mx.zeros((robots, size)) for name in EPISODE_EXTRAS}


class EpisodeInputs:
    """Previous actions (robots, size), kept between the steps of an episode.

    names: run-time inputs that the plan reads, in `Features.extras`. previous: the
    executed normalised actions; `None` in an episode's first step.
    """

    def __init__(self, plan: Plan, size: int):
        reads = {name for pruner in plan for name in pruner.reads}
        self.names = tuple(name for name in EPISODE_EXTRAS if name in reads)
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Begin an episode: forget the previous step."""
        self.previous: mx.array | None = None

    def keep(self, rows: mx.array) -> None:
        """Keep only these rows (robots) of the previous batch."""
        if self.previous is not None:
            self.previous = self.previous[rows]

    def of(self, robots: int) -> dict[str, mx.array]:
        """Return the inputs of the next step for a number of robots.

        Raises `InputError` unless the previous step had as many robots.
        """
        if self.previous is None:
            first = first_inputs(robots, self._size)
            return {name: first[name] for name in self.names}
        check_robots(self.previous, robots)
        return dict.fromkeys(self.names, self.previous)

    def note(self, normalized: np.ndarray, executed: int | None) -> None:
        """Record a step's normalised actions, (B, A) or (B, chunk, A).

        executed: number of a chunk's actions that the robot executes; `None` for all.
        """
        if self.names:
            chunks = normalized.reshape(len(normalized), -1, self._size)[:, :executed]
            self.previous = mx.array(chunks[:, -1].astype(np.float32))


def check_robots(previous: mx.array, robots: int) -> None:
    """Raise `InputError` unless the previous step had as many robots."""
    if len(previous) != robots:
        raise InputError(
            f"the episode has {len(previous)} robots, not {robots}; select the robots "
            "that continue with keep_robots, or begin another episode with reset"
        )
