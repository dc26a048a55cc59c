"""Measure a tower beside busy processes: OpenBLAS with one thread and one per core.

    python benchmarks/under_load.py --runs 15
    OPENBLAS_THREAD_TIMEOUT=26 python benchmarks/under_load.py    # its own default

Starts its own load: processes that run an empty loop. Rows are interleaved. The package
makes OpenBLAS's threads sleep when they have no work (`mlx_tokprune/runtime.py`). Linux
only.
"""

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import time

import mlx_tokprune  # isort: skip  (loads the BLAS before MLX)
import mlx.core as mx

from mlx_tokprune.checkpoints.embedded import PICTURES
from mlx_tokprune.processing.image import load_image

# Ends with its parent, also when that is killed.
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--load", type=int, nargs="+", default=[0, 1, 2])
    return parser


def main() -> None:
    args = build_parser().parse_args()
    model, processor = mlx_tokprune.load(args.model)
    pixels = mx.array(processor.pixels([load_image(PICTURES[0].path)]))
    set_threads = ctypes.CDLL(None).openblas_set_num_threads
    cores = len(os.sched_getaffinity(0))
    ways = {
        "one": lambda: set_threads(1),
        f"all {cores}": lambda: set_threads(cores),
    }
    print(f"tower, ms: median (middle half) of {args.runs} interleaved runs")
    for busy in args.load:
        loop = [sys.executable, "-c", BUSY]
        others = [subprocess.Popen(loop) for _ in range(busy)]
        try:
            time.sleep(0.5)
            print(f"{busy} busy: {_row(model, pixels, ways, args.runs)}")
        finally:
            for other in others:
                other.kill()
                other.wait()


def _row(model, pixels: mx.array, ways: dict, runs: int) -> str:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(runs + 1):
        for name, choose in ways.items():
            start = time.perf_counter()
            choose()
            mx.eval(model.encode(pixels).tokens)
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return ", ".join(f"{name} {_spread(found)}" for name, found in times.items())


def _spread(values: list[float]) -> str:
    values = sorted(values)
    quarter = len(values) // 4
    low, high = values[quarter], values[-1 - quarter]
    return f"{statistics.median(values):.0f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    main()
