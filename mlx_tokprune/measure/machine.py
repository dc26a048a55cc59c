"""Description of the measuring machine: device, versions and speed."""

import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..runtime import device_name

_SIDE = 1024  # of the matrices whose product is timed
_COPIED = 1 << 26  # floats of the copy that is timed


def describe() -> dict:
    """Return device, system, versions, commit and power mode.

    Entries that cannot be read are `None`.
    """
    return {
        "device": device_name(),
        "cores": _cores(),
        "memory_gb": _memory(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("mlx", "mlx-lm", "mlx-tokprune")
        },
        "commit": _commit(),
        "power": _power(),
    }


def format_versions(machine: Mapping[str, Any]) -> str:
    """Return a machine's package versions in one line: `mlx 0.31.0, mlx-lm 0.30.7`.

    machine: the result of `describe`. Packages that are not installed are left out.
    """
    versions = machine["versions"].items()
    return ", ".join(f"{name} {version}" for name, version in versions if version)


def measure_rates(runs: int = 20) -> dict[str, float]:
    """Return FLOPs and copied bytes per second in float32, the best of `runs`."""
    a, b = (mx.random.normal((_SIDE, _SIDE)) for _ in range(2))
    data = mx.zeros((_COPIED,))
    mx.eval(a, b, data)
    product = _seconds(lambda: a @ b, runs)
    copy = _seconds(lambda: data + 1, runs)
    return {
        "flops_per_second": 2 * _SIDE**3 / product,
        "bytes_per_second": 2 * data.nbytes / copy,
    }


def _seconds(function: Callable[[], mx.array], runs: int) -> float:
    """Return the shortest of `runs` times, after one run to warm up."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        mx.eval(function())
        mx.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _cores() -> int:
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def _memory() -> float | None:
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        folder = Path(__file__).parent
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """Return the commit of this package's working tree, with `+` if it is modified."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _power() -> str | None:
    """Return the power source and low power mode; macOS only."""
    if platform.system() != "Darwin":
        return None
    source, settings = _output("pmset", "-g", "batt"), _output("pmset", "-g")
    if source is None or settings is None:
        return None
    mains = "AC" if "AC Power" in source else "battery"
    low = any(line.split() == ["lowpowermode", "1"] for line in settings.splitlines())
    return f"{mains}, low power mode" if low else mains
