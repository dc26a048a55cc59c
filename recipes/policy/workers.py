"""Processes that act in Meta-World, one for each task, and do what they are told."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Generator

import numpy as np

HORIZON, FIRST = 8, 4  # actions of a chunk, done of it
SEEDS = 1_001_000, 3_000_000, 80_000_000  # demonstrations, corrections, the check


def work(connection, task: str, horizon: int, first: int) -> None:
    """Run the worlds of one task in a process that does what it is told.

    horizon: actions of a label. first: of a chunk, how many are done.
    """
    os.environ |= {"MUJOCO_GL": "egl", "OMP_NUM_THREADS": "1"}
    try:
        _work(connection, task, horizon, first)
    except Exception:
        connection.send(traceback.format_exc())


def _work(connection, task: str, horizon: int, first: int) -> None:
    from recipes.policy.demonstrations import demonstrate, join

    from .worlds import HORIZON as STEPS
    from .worlds import TASKS, World

    worlds, index = [World(task)], list(TASKS).index(task)
    worlds[0].reset(0)
    worlds[0].frame()
    connection.send(task)
    while (asked := connection.recv()) is not None:
        what, *about = asked
        if what == "demonstrate":
            (until, most), parts = about, []
            while time.time() < until and len(parts) < most:
                seed = SEEDS[0] + 10_000 * index + len(parts)
                parts.append(demonstrate(worlds[0], seed, horizon))
            joined = join(parts)
            names = ("frames", "actions", "states")
            connection.send((len(parts), *(getattr(joined, n) for n in names)))
        elif what == "begin":
            seeds, labels = about
            worlds += [World(task) for _ in range(len(seeds) - len(worlds))]
            live, won, steps, found = worlds[: len(seeds)], 0, 0, []
            for world, seed in zip(live, seeds, strict=True):
                world.reset(seed)
            connection.send(len(live))
        elif what == "look":
            seen = [(world.frame(), world.hand()) for world in live]
            connection.send(tuple(map(np.stack, zip(*seen, strict=True))))
        elif what == "act":
            chunks, mixed, seed = about
            rng, going, steps = np.random.default_rng(seed), [], steps + first
            for world, begin, chunk in zip(live, seen, chunks, strict=True):
                for number in range(first):
                    expert = world.expert()
                    if labels:
                        frame, hand = (
                            begin if not number else (world.frame(), world.hand())
                        )
                        label = expert if horizon == 1 else world.ahead(horizon)
                        found.append((frame, label, hand))
                    if world.step(expert if rng.random() < mixed else chunk[number]):
                        break
                won += world.success
                going += [] if world.success else [world]
            live = going if steps < STEPS else []
            connection.send(len(live))
        elif what == "end":
            arrays = map(np.stack, zip(*found, strict=True)) if found else ()
            connection.send((won, *arrays))


class Workers:
    """A process for each task."""

    def __init__(self, tasks: list[str], horizon: int = HORIZON, first: int = FIRST):
        context, self.tasks, self.ends = multiprocessing.get_context("spawn"), tasks, []
        for task in tasks:
            mine, theirs = context.Pipe()
            about = theirs, task, horizon, first
            process = context.Process(target=work, args=about, daemon=True)
            process.start()
            self.ends.append(mine)
        for number, task in enumerate(tasks):
            if self.hear(number) != task:
                raise RuntimeError(f"{task} did not begin")

    def hear(self, number: int):
        said = self.ends[number].recv()
        if isinstance(said, str) and said not in self.tasks:
            raise RuntimeError(said)
        return said

    def ask(self, messages: dict[int, tuple]) -> Generator[None, None, dict]:
        """Yield until all have answered; return their answers."""
        for number, message in messages.items():
            self.ends[number].send(message)
        while not all(self.ends[number].poll() for number in messages):
            yield
        return {number: self.hear(number) for number in messages}
