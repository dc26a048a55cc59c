"""Episodes in a folder: demonstrations, corrections of a policy, and batches of both.

Every episode and every batch has its own seed, and a folder of episodes is there whole
or not at all, so a training that is stopped goes on where it was.
"""

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_tokprune.act.policy import Policy

from .demonstrations import (
    CORRECTION_SEEDS,
    DEMONSTRATION_SEEDS,
    Episodes,
    demonstrate,
    join,
    record,
)
from .student import PAD, Labelled, action_classes, prompt_ids
from .worlds import SIZE, TASKS, World

_SHIFT = 3  # pixels by which a frame is moved at most

# (random numbers of an episode, its seed) -> the policy that acts in it
Actor = Callable[[np.random.Generator, int], Policy]


class Collector:
    """The episodes that a training in `folder` learns from.

    ahead: how many of the expert's next actions are the label of a frame.
    """

    def __init__(self, folder: Path, ahead: int = 1):
        self.data, self.ahead = folder / "episodes", ahead
        self.data.mkdir(parents=True, exist_ok=True)
        self._worlds: dict[str, World] = {}
        prompts = [prompt_ids(task.instruction) for task in TASKS.values()]
        longest = max(map(len, prompts))
        self._lengths = np.array([len(p) for p in prompts], dtype=np.int32)
        self._prompts = np.array([p + [PAD] * (longest - len(p)) for p in prompts])

    def demonstrate(self, count: int, skip: int = 0) -> None:
        """`count` episodes of the expert in each task, unless they are there.

        skip: of the seeds, which others then have.
        """
        for number, name in enumerate(TASKS):
            folder = self.data / f"demonstrations-{name}"
            if folder.exists():
                continue
            first = DEMONSTRATION_SEEDS + 10_000 * number
            seeds = range(first + skip, first + skip + count)
            shown = tqdm(seeds, desc=name, unit="episode", disable=None)
            world = self._world(name)
            join([demonstrate(world, s, self.ahead) for s in shown]).save(folder)

    def correct(self, step: int, count: int, mixed: float, actor: Actor) -> None:
        """Run a round of DAgger: `count` episodes a task, unless they are there.

        The expert acts in `mixed` of the steps.
        """
        if (self.data / _corrections(step)).exists():
            return
        parts = []
        for number, name in enumerate(TASKS):
            first = CORRECTION_SEEDS + 1_000_000 * number + step * 16
            for seed in range(first, first + count):
                parts.append(self._corrected(name, seed, mixed, actor))
        join(parts).save(self.data / _corrections(step))

    def _corrected(self, name: str, seed: int, mixed: float, actor: Actor) -> Episodes:
        rng, world = np.random.default_rng(seed), self._world(name)
        policy, planned = actor(rng, seed), []

        def act(frame: np.ndarray, expert: np.ndarray) -> np.ndarray:
            if not planned:  # of a chunk, what is done before looking again
                asked = ([frame], TASKS[name].instruction, *state_of(policy, world))
                planned.extend(np.atleast_2d(policy(*asked)))
            action = planned.pop(0)
            return expert if rng.random() < mixed else action

        return record(world, seed, act, self.ahead)

    def _world(self, name: str) -> World:
        if name not in self._worlds:
            self._worlds[name] = World(name)
        return self._worlds[name]

    def load(self, step: int) -> list[tuple[Episodes, list]]:
        """Return the folders of episodes up to a step, with the rows of each task.

        Later ones are there when a run goes on from before it was stopped.
        """
        found, last = [], _corrections(step)
        for folder in sorted(self.data.iterdir()):
            late = folder.name.startswith("corrections") and folder.name > last
            if ".partial" not in folder.name and not late:
                some = Episodes.open(folder)
                tasks = np.array(some.tasks)
                rows = [np.flatnonzero(tasks == n) for n in range(len(TASKS))]
                found.append((some, rows))
        return found

    def shares(self, step: int) -> np.ndarray:
        """Return the tasks' shares: half even, half by the last round's lengths.

        By their square. Who fails goes on to the end: what needs it is learned more.
        """
        done = (f.name for f in self.data.glob("corrections-" + 6 * "[0-9]"))
        last = max(name for name in done if name <= _corrections(step))
        frames = np.bincount(np.load(self.data / last / "tasks.npy"))
        return (frames**2 / np.sum(frames**2) + 1 / len(TASKS)) / 2

    def draw(
        self,
        rng: np.random.Generator,
        size: int,
        episodes: list[tuple[Episodes, list]],
        shares: np.ndarray | None = None,
    ) -> Labelled:
        """Frames of `pick` with their actions."""
        frames, tasks, places = self.pick(rng, size, episodes, shares)
        actions = np.stack([episodes[i][0].actions[n] for i, n in places])
        return Labelled(
            mx.array(frames).astype(mx.float32) / 255,
            mx.array(self._prompts[tasks]),
            mx.array(self._lengths[tasks]),
            mx.array(action_classes(actions)),
            before=mx.array(np.stack([episodes[i][0].before[n] for i, n in places])),
        )

    def pick(
        self,
        rng: np.random.Generator,
        size: int,
        episodes: list[tuple[Episodes, list]],
        shares: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
        """For each row a task, and one of its frames at random.

        Returns frames (B, S, S, 3) uint8, tasks (B,), and of each its folder and place
        there. shares: of the tasks; as many of each when `None`.
        """
        frames, places = np.empty((size, SIZE, SIZE, 3), np.uint8), []
        if shares is None:
            tasks = rng.integers(len(TASKS), size=size)
        else:
            tasks = rng.choice(len(TASKS), size=size, p=shares)
        for row, task in enumerate(tasks):
            ends = np.cumsum([len(rows[task]) for _, rows in episodes])
            place = rng.integers(ends[-1])
            number = int(np.searchsorted(ends, place, side="right"))
            some, rows = episodes[number]
            frame = int(rows[task][place - ends[number]])  # from the end of its rows
            frames[row] = _shifted(np.asarray(some.frames[frame]), rng)
            places.append((number, frame))
        return frames, tasks, places


def state_of(policy: Policy, world: World) -> tuple:
    """Return the robot's state, for policies that read it."""
    return (world.hand(),) if policy.model.args.state_size else ()


def rounds_of(rounds: int, steps: int) -> tuple[int, ...]:
    """Return the steps before which there is a round, the first before any."""
    return tuple(steps * number // rounds for number in range(rounds))


def _corrections(step: int) -> str:
    return f"corrections-{step:06d}"


def _shifted(frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the frame moved by a few pixels; its edge is repeated."""
    down, right = rng.integers(2 * _SHIFT + 1, size=2)
    side, inner = SIZE + 2 * _SHIFT, slice(_SHIFT, _SHIFT + SIZE)
    padded = np.empty((side, side, 3), frame.dtype)  # np.pad takes far longer
    padded[inner, inner] = frame
    padded[inner, :_SHIFT], padded[inner, -_SHIFT:] = frame[:, :1], frame[:, -1:]
    padded[:_SHIFT], padded[-_SHIFT:] = padded[_SHIFT], padded[_SHIFT + SIZE - 1]
    return padded[down : down + SIZE, right : right + SIZE]
