"""Worker processes with limits that run cases; a dead worker is replaced."""

import importlib
import json
import multiprocessing
import os
import resource
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random

from .case import Outcome, Place

ADDRESS_SPACE = 6 << 30
GROUPS = {
    **{name: f"{name}:run" for name in ("checkpoints", "pictures", "flags", "data")},
    **{name: f"{name}:run" for name in ("learned", "packed", "trainers")},
    **{name: f"{name}:run" for name in ("urls", "chats")},
    **{name: f"{name}:run" for name in ("outputs", "kills", "threads")},
    "together": "kills:together",
}
_PATIENCE = 400  # seconds; alarms end cases of one call long before


@dataclass(frozen=True)
class Task:
    group: str
    number: int
    seed: int

    def __str__(self) -> str:
        return f"--seed {self.seed} --only {self.group} {self.number}"


@dataclass
class _Worker:
    process: multiprocessing.Process
    pipe: Connection
    task: Task | None = None
    began: float = 0.0


class Crew:
    """Pool of workers that take one task after another."""

    def __init__(self, folder: Path, size: int):
        self._folder, self._size = folder, size
        self._base = folder / "base"
        self._spawn = multiprocessing.get_context("spawn")
        process = self._spawn.Process(target=_prepare, args=(self._base,))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit("the commands do not work on undamaged files")

    def work(
        self, tasks: Sequence[Task], seconds: float
    ) -> Iterator[tuple[Task, Outcome]]:
        """Yield outcomes as they are ready; no case begins after `seconds`."""
        todo, end = list(reversed(tasks)), time.monotonic() + seconds
        crew = [self._hire() for _ in range(min(self._size, len(tasks)))]
        while True:
            for i, worker in enumerate(crew):
                if worker.task is None and todo and time.monotonic() < end:
                    crew[i] = self._give(worker, todo.pop())
            busy = [worker for worker in crew if worker.task is not None]
            if not busy:
                break
            ready = wait([worker.pipe for worker in busy], 5)
            for worker in busy:
                outcome = self._heard(worker, worker.pipe in ready)
                if outcome:
                    yield worker.task, outcome
                    worker.task = None
        for worker in crew:
            self._dismiss(worker)

    def _hire(self) -> _Worker:
        ours, theirs = self._spawn.Pipe()
        arguments = (theirs, self._folder, self._base)
        process = self._spawn.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def _give(self, worker: _Worker, task: Task) -> _Worker:
        if not worker.process.is_alive():
            worker = self._hire()
        worker.pipe.send(task)
        worker.task, worker.began = task, time.monotonic()
        return worker

    def _heard(self, worker: _Worker, ready: bool) -> Outcome | None:
        if ready:
            try:
                return worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                return Outcome("traceback", f"died with {worker.process.exitcode}")
        if time.monotonic() - worker.began > _PATIENCE:
            worker.process.kill()
            worker.process.join()
            return Outcome("hang", "did not come back, not even by an alarm")
        return None

    def _dismiss(self, worker: _Worker) -> None:
        if worker.process.is_alive():
            worker.pipe.send(None)
        worker.process.join(20)
        if worker.process.is_alive():
            worker.process.kill()


# In the worker ----------------------------------------------------------------------


def _prepare(base: Path) -> None:
    from .prepare import prepare

    _set_up()
    prepare(base)


def _set_up() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"  # no case may ask the network
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import mlx_tokprune  # noqa: F401  (before the first case is timed)


def _know_rates(base: Path) -> None:
    """Replace the slow measurement of the machine's rates by the rates of `prepare`."""
    from mlx_tokprune.bench import benchmark

    rates = json.loads((base / "b.json").read_text())["rates"]
    benchmark.measure_rates = lambda: dict(rates)


def _serve(pipe: Connection, folder: Path, base: Path) -> None:
    _set_up()
    _know_rates(base)
    while (task := pipe.recv()) is not None:
        pipe.send(run_task(task, folder, base))


def run_task(task: Task, folder: Path, base: Path) -> Outcome:
    """Return the outcome of a task; an exception in the suite is an outcome, too."""
    module, _, name = GROUPS[task.group].partition(":")
    run = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    own = folder / f"{task.group}-{task.seed}-{task.number}-{os.getpid()}"
    try:
        rng = Random(f"{task.seed} {task.group} {task.number}")
        return run(rng, Place.make(own, base))
    except Exception:
        return Outcome("traceback", f"the suite: {traceback.format_exc()}")
    finally:
        shutil.rmtree(own, ignore_errors=True)
