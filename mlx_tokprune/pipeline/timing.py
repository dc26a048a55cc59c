"""The clock of the path: `NO_CLOCK` lets it run as it is, a `Clock` fences its stages.

Both go through the same lines, so what is timed is what runs.
"""

import contextlib
import time
from collections.abc import Iterator

import mlx.core as mx

STAGES: tuple[str, ...] = ("preprocess", "vision", "prune", "project", "prefill")


class NoClock:
    """Stages that are not timed and stay lazy."""

    times: dict[str, float] | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list]:
        yield []


NO_CLOCK = NoClock()


class Clock(NoClock):
    """`times`: milliseconds of each stage, each measured between evaluated results.

    What a stage's block puts into its list is evaluated. On a warm model the sum is a
    little larger than the time without fences. Actions add the stage `decode`: their
    tokens after the first.
    """

    def __init__(self):
        self.times = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list]:
        results: list = []
        start = time.perf_counter()
        yield results
        mx.eval(results)
        mx.synchronize()
        spent = (time.perf_counter() - start) * 1e3
        self.times[name] = self.times.get(name, 0.0) + spent
