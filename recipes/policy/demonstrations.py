"""Frames with the scripted expert's actions, and corrections of a policy's mistakes.

Demonstrations execute the expert's action with noise and random pushes but keep
the clean action as the label, so that a policy learns to come back. Corrections
are DAgger (Ross et al., 2011, arXiv:1011.0686): the policy acts, the expert
labels. Both are arrays on disk, one folder a batch of episodes.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_tokprune.errors import InputError

from .worlds import ACTION_DIM, HORIZON, TASKS, World

DEMONSTRATION_SEEDS = 1_000_000  # first seed of the demonstrations
CORRECTION_SEEDS = 2_000_000  # first seed of the corrections
_ARRAYS = ("frames", "actions", "tasks", "states", "before")


@dataclass(frozen=True)
class Episodes:
    """`frames (T,112,112,3)` uint8, `actions (T,4)` float32, `tasks (T,)` int32.

    `tasks` indexes `list(TASKS)`. `states (T,4)` float32 are those of the hand.
    `before (T,4)` float32 is what the robot did before a frame, zeros at an episode's
    first. For policies that answer in chunks `actions` are the expert's next ones,
    `(T,H,4)`.
    """

    frames: np.ndarray
    actions: np.ndarray
    tasks: np.ndarray
    states: np.ndarray
    before: np.ndarray

    def __len__(self) -> int:
        return len(self.actions)

    def save(self, folder: Path) -> None:
        """Write the arrays beside `folder` and rename."""
        partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
        partial.mkdir(parents=True)
        for name in _ARRAYS:
            np.save(partial / f"{name}.npy", getattr(self, name))
        partial.rename(folder)

    @classmethod
    def open(cls, folder: Path) -> "Episodes":
        """Map the arrays of `folder` without reading them."""
        for name in _ARRAYS:
            if not (folder / f"{name}.npy").exists():
                raise InputError(
                    f"{folder} has no {name}.npy, so it was collected by an earlier "
                    "version; choose another folder"
                )
        return cls(
            *(np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        )


def demonstrate(world: World, seed: int, ahead: int = 1) -> Episodes:
    """One noisy episode of the expert, labelled with its clean actions."""
    rng = np.random.default_rng(seed)
    sigma = rng.uniform(0, world.task.noise)
    pushes = _Pushes(rng, at_start=rng.random() < 0.5)

    def act(frame, expert):
        noisy = expert.copy()
        noisy[:3] += rng.normal(0, sigma, 3)
        return pushes.over(noisy)

    return record(world, seed, act, ahead)


def record(
    world: World,
    seed: int,
    act: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ahead: int = 1,
) -> Episodes:
    """Run `act(frame, expert_action) -> action` until success or the horizon.

    ahead: how many of the expert's next actions are the label of a frame.
    """
    world.reset(seed)
    frames, actions, states = [], [], []
    done = [np.zeros(ACTION_DIM, np.float32)]
    for _ in range(HORIZON):
        frame, expert = world.frame(), world.expert()
        frames.append(frame)
        states.append(world.hand())
        actions.append(world.ahead(ahead) if ahead > 1 else expert)
        done.append(np.clip(np.asarray(act(frame, expert), np.float32), -1, 1))
        if world.step(done[-1]):
            break
    task = list(TASKS).index(world.task.name)
    return Episodes(
        np.stack(frames),
        np.stack(actions),
        np.full(len(frames), task, dtype=np.int32),
        np.stack(states),
        np.stack(done[: len(frames)]),
    )


def join(parts: list[Episodes]) -> Episodes:
    """One after the other."""
    return Episodes(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in _ARRAYS)
    )


class _Pushes:
    """Now and then a few steps in a random direction, for states off the path."""

    def __init__(self, rng: np.random.Generator, at_start: bool):
        self._rng = rng
        self._left = int(rng.integers(2, 9)) if at_start else 0
        self._push = self._draw()

    def _draw(self) -> np.ndarray:
        push = self._rng.uniform(-1, 1, ACTION_DIM)
        return push.astype(np.float32)

    def over(self, action: np.ndarray) -> np.ndarray:
        if self._left == 0 and self._rng.random() < 0.04:
            self._left, self._push = int(self._rng.integers(2, 6)), self._draw()
        if self._left == 0:
            return action
        self._left -= 1
        return self._push
