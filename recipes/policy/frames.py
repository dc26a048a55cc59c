"""Frames of Meta-World's experts on held-out seeds, with their actions."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from . import worlds
from .worlds import HORIZON, TASKS

FRAME_SEEDS = 80_000_000  # first seed of the frames


def draw_frames(count: int) -> Iterator[tuple[Image.Image, list[dict]]]:
    """Yield one frame of each episode, the tasks in turn, with its instruction."""
    simulators: dict[str, worlds.World] = {}
    for number in range(count):
        task = list(TASKS.values())[number % len(TASKS)]
        if task.name not in simulators:
            simulators[task.name] = worlds.World(task.name)
        world = simulators[task.name]
        world.reset(FRAME_SEEDS + number)
        steps = int(np.random.default_rng(number).integers(HORIZON // 3))
        for _ in range(steps):
            if world.step(world.expert()):
                world.reset(FRAME_SEEDS + number)
        answer = " ".join(f"{value:.4f}" for value in world.expert())
        question = {"question": task.instruction, "answer": answer, "kind": task.name}
        yield Image.fromarray(world.frame()), [question]
