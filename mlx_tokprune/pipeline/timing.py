"""Clocks of the path: `NO_CLOCK` keeps it lazy, a `Clock` evaluates after each stage.

Both run the same lines, so the timed code is the code in use.
"""

import contextlib
import time
from collections.abc import Iterator

import mlx.core as mx

STAGES: tuple[str, ...] = ("preprocess", "vision", "prune", "project", "prefill")


class NoClock:
    """A clock that neither times nor evaluates its stages."""

    times: dict[str, float] | None = None

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list]:
        """Yield a list for the stage's results, which are not evaluated."""
        yield []


NO_CLOCK = NoClock()


class Clock(NoClock):
    """A clock that evaluates each stage: `times` has the milliseconds of each.

    The results that a stage's block appends to its list are evaluated. On a warm model
    the sum is slightly more than the time without a clock. Actions add the stage
    `decode`: their tokens after the first.
    """

    def __init__(self):
        self.times = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[list]:
        """Yield a list for the stage's results; evaluate them and add the time."""
        results: list = []
        start = time.perf_counter()
        yield results
        mx.eval(results)
        mx.synchronize()
        spent = (time.perf_counter() - start) * 1e3
        self.times[name] = self.times.get(name, 0.0) + spent
