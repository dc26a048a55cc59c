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

from mlx_tokprune.act.policy import Policy
from mlx_tokprune.checkpoints.fingerprint import fingerprint
from mlx_tokprune.errors import InputError, nearest
from mlx_tokprune.pipeline import DEFAULT_POSITIONS
from mlx_tokprune.processing.chunks import ChunkProcessor
from mlx_tokprune.pruners import Pruner, get_method, list_pruners

from .collecting import state_of
from .table import read_log
from .worlds import ACTION_DIM, HORIZON, TASKS, World

TEST_SEEDS = 90_000_000  # first seed of the held-out episodes
BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.05)
CONTROLS = ("random actions", "grey picture", "opposite instruction")


@dataclass(frozen=True)
class Row:
    """A line of the table: a pruner and positions, or a control."""

    label: str
    pruner: Pruner
    positions: str = DEFAULT_POSITIONS

    @property
    def scorer(self) -> str | None:
        """The fingerprint of its pruner's scorer, where it has one."""
        scorer = self.pruner.scorer
        return None if scorer is None else fingerprint(scorer)


def rows(
    methods: Iterable[str] | None = None,
    budgets: Iterable[float] = BUDGETS,
    labels: Iterable[str] | None = None,
) -> list[Row]:
    """Return the rows: unpruned, every method at every budget, the controls.

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
    model,
    processor,
    episodes: int,
    tasks: Iterable[str],
    chosen: list[Row],
    log: Path,
    first: int | None = None,
) -> None:
    """Run `episodes` of each task for each row, a line of JSON in `log` for each.

    Lines of the same weights, a scorer's included, and as many episodes are not
    measured again. first: how many actions of a chunk are done before the policy looks
    again.
    """
    weights, asked = fingerprint(model), (episodes, first)
    done = {
        (line["row"], line["task"], line.get("scorer"))
        for line in read_log(log)
        if line["weights"] == weights
        and (len(line["success"]), line.get("first")) == asked
    }
    for task in tasks:
        todo = [r for r in chosen if (r.label, task, r.scorer) not in done]
        worlds = [World(task) for _ in range(episodes)] if todo else []
        for row in tqdm(todo, desc=task, unit="row", disable=None):
            result = _run(model, processor, worlds, row, first)
            line = {"row": row.label, "task": task, "weights": weights, **result}
            line |= {} if first is None else {"first": first}
            line |= {} if row.scorer is None else {"scorer": row.scorer}
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _run(
    model, processor, worlds: list[World], row: Row, first: int | None = None
) -> dict:
    """All episodes of a task side by side, those that are done left out."""
    name = worlds[0].task.name
    start = TEST_SEEDS + 10_000 * list(TASKS).index(name)
    for number, world in enumerate(worlds):
        world.reset(start + number)
    act, keep_robots = _actor(model, processor, row, name, len(worlds), first)
    live, steps, kept, counts = worlds, 0, [], []
    planned = np.empty((len(live), 0, ACTION_DIM))
    for _ in range(HORIZON):
        if not planned.shape[1]:
            planned, some = act(live)
            kept.append(np.mean(some))
            counts += list(some)
        steps += len(live)
        ended = [w.step(a) for w, a in zip(live, planned[:, 0], strict=True)]
        rows = [number for number, done in enumerate(ended) if not done]
        live, planned = [live[number] for number in rows], planned[rows, 1:]
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


def _actor(
    model, processor, row: Row, task: str, robots: int, first: int | None
) -> tuple[Callable, Callable]:
    """Worlds -> actions (B, n, 4) to do next, and the visual tokens that each kept.

    And what is told which of the robots go on.
    """
    if row.label == "random actions":
        rng = np.random.default_rng(0)

        def draw(live: list[World]):
            return rng.uniform(-1, 1, (len(live), 1, ACTION_DIM)), [0]

        return draw, lambda rows: None
    instruction = TASKS[task].instruction
    if row.label == "opposite instruction":
        other = TASKS[task].opposite or _another(task)
        instruction = TASKS[other].instruction
    how = {"pruner": row.pruner, "positions": row.positions, "compile": False}
    how |= {} if first is None else {"first": first}

    def see(world: World) -> np.ndarray:
        frame = world.frame()
        return np.full_like(frame, 128) if row.label == "grey picture" else frame

    if isinstance(processor, ChunkProcessor):
        policies = [Policy(model, processor, **how) for _ in range(robots)]
        return _one_each(policies, see, instruction)
    policy = Policy(model, processor, **how)

    def act(live: list[World]):
        actions = policy.act_on_batch([[see(world)] for world in live], instruction)
        return actions.reshape(len(live), -1, ACTION_DIM), policy.kept_each

    return act, policy.keep_robots


def _one_each(policies: list[Policy], see: Callable, instruction: str):
    """Return `act` for policies that hold one robot each."""

    def act(live: list[World]):
        actions = [
            policy([see(world)], instruction, *state_of(policy, world))
            for policy, world in zip(policies, live, strict=True)
        ]
        return np.stack(actions), [policy.kept for policy in policies]

    def keep_robots(rows: list[int]) -> None:
        policies[:] = [policies[number] for number in rows]

    return act, keep_robots


def _another(task: str) -> str:
    """Return the task that follows, for those without an opposite."""
    names = list(TASKS)
    return names[(names.index(task) + 1) % len(names)]
