"""Closed-loop success of a policy, by method, budget and task; `table.py` shows it.

Seeds are never those of training. All methods meet the same episodes. Rows for random
actions, a grey picture and the opposite instruction say what success needs.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...errors import InputError, nearest
from ...measure.results import fingerprint
from ...pipeline import DEFAULT_POSITIONS
from ...pruners import Pruner, get_method, list_pruners
from ...robot.policy import Policy
from .table import read_log
from .worlds import HORIZON, TASKS, World

TEST_SEEDS = 90_000_000  # first seed of the held-out episodes
BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.05)
CONTROLS = ("random actions", "grey picture", "opposite instruction")


@dataclass(frozen=True)
class Row:
    """A line of the table: a pruner and positions, or a control."""

    label: str
    pruner: Pruner
    positions: str = DEFAULT_POSITIONS


def rows(
    methods: Iterable[str] | None = None,
    budgets: Iterable[float] = BUDGETS,
    labels: Iterable[str] | None = None,
) -> list[Row]:
    """The unpruned policy, every method at every budget, and the controls.

    labels: of those that are wanted. Raises `InputError` for one that there is not.
    """
    found = {row.label: row for row in _all_rows(methods, list(budgets))}
    for label in labels or ():
        if label not in found:
            raise InputError(
                f"there is no row {label!r}; rows are called as in the table, such as "
                f"'none'.{nearest(label, found)}"
            )
    return [found[label] for label in labels or found]


def _all_rows(methods: Iterable[str] | None, budgets: list[float]) -> list[Row]:
    chosen = [m for m in methods or list_pruners() if m != "none"]
    found = [Row("none", Pruner())]
    for name in chosen:
        if get_method(name).counts != "budget":
            found.append(Row(f"{name} own count", Pruner(name)))
        if get_method(name).counts != "own":
            found += [Row(f"{name} {b:g}", Pruner(name, b)) for b in budgets]
    for budget in (0.5, 0.25):
        label = f"trimvla {budget:g} contiguous"
        found.append(Row(label, Pruner("trimvla", budget), "contiguous"))
    return found + [Row(control, Pruner()) for control in CONTROLS]


def measure(
    model, processor, episodes: int, tasks: Iterable[str], chosen: list[Row], log: Path
) -> None:
    """Run `episodes` of each task for each row, a line of JSON in `log` for each.

    Lines of the same weights and as many episodes are not measured again.
    """
    weights = fingerprint(model)
    done = {
        (line["row"], line["task"])
        for line in read_log(log)
        if line["weights"] == weights and len(line["success"]) == episodes
    }
    for task in tasks:
        todo = [row for row in chosen if (row.label, task) not in done]
        worlds = [World(task) for _ in range(episodes)] if todo else []
        for row in tqdm(todo, desc=task, unit="row", disable=None):
            result = _run(model, processor, worlds, row)
            line = {"row": row.label, "task": task, "weights": weights, **result}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _run(model, processor, worlds: list[World], row: Row) -> dict:
    """All episodes of a task side by side, those that are done left out."""
    name = worlds[0].task.name
    first = TEST_SEEDS + 10_000 * list(TASKS).index(name)
    for number, world in enumerate(worlds):
        world.reset(first + number)
    act, keep_robots = _actor(model, processor, row, name)
    live, steps, kept, counts = worlds, 0, [], []
    for _ in range(HORIZON):
        actions, some = act(np.stack([world.frame() for world in live]))
        kept.append(np.mean(some))
        counts += list(some)
        steps += len(live)
        ended = [w.step(a) for w, a in zip(live, actions, strict=True)]
        rows = [number for number, done in enumerate(ended) if not done]
        live = [live[number] for number in rows]
        if not live:
            break
        keep_robots(rows)
    return {
        "success": [bool(world.success) for world in worlds],
        "steps": steps,
        "kept": float(np.mean(kept)),
        "least": float(min(counts)),
        "most": float(max(counts)),
    }


def _actor(model, processor, row: Row, task: str) -> tuple[Callable, Callable]:
    """Frames (B, S, S, 3) -> actions (B, 4) and the visual tokens that each kept.

    And what is told which of the robots go on.
    """
    if row.label == "random actions":
        rng = np.random.default_rng(0)

        def draw(frames: np.ndarray):
            return rng.uniform(-1, 1, (len(frames), 4)), [0]

        return draw, lambda rows: None
    policy = Policy(
        model, processor, pruner=row.pruner, positions=row.positions, compile=False
    )
    instruction = TASKS[task].instruction
    if row.label == "opposite instruction":
        other = TASKS[task].opposite or _another(task)
        instruction = TASKS[other].instruction

    def act(frames: np.ndarray):
        if row.label == "grey picture":
            frames = np.full_like(frames, 128)
        actions = policy.act_on_batch([[frame] for frame in frames], instruction)
        return actions, policy.kept_each

    return act, policy.keep_robots


def _another(task: str) -> str:
    """The task that follows, for those without an opposite."""
    names = list(TASKS)
    return names[(names.index(task) + 1) % len(names)]
