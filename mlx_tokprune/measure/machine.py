"""The machine that figures come from: its name, its versions and its speed."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import mlx.core as mx

from ..runtime import device_name

_SIDE = 1024  # of the matrices whose product is timed
_COPIED = 1 << 26  # floats


def describe() -> dict:
    """Device, system, versions, commit and power mode; `None` for what is unknown."""
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


def measure_rates(runs: int = 20) -> dict[str, float]:
    """Floating point operations and bytes a second, the best of `runs`, in float32."""
    a, b = (mx.random.normal((_SIDE, _SIDE)) for _ in range(2))
    data = mx.zeros((_COPIED,))
    mx.eval(a, b, data)
    product = _seconds(lambda: a @ b, runs)
    copy = _seconds(lambda: data + 1, runs)
    return {
        "flops_per_second": 2 * _SIDE**3 / product,
        "bytes_per_second": 2 * data.nbytes / copy,
    }


def _seconds(function, runs: int) -> float:
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
    """Of the working tree this package runs from, with `+` when it was changed."""
    commit = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = commit and _output("git", "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if changed else commit


def _power() -> str | None:
    """macOS only: mains or battery, and whether low power mode is on."""
    if platform.system() != "Darwin":
        return None
    source, settings = _output("pmset", "-g", "batt"), _output("pmset", "-g")
    if source is None or settings is None:
        return None
    mains = "AC" if "AC Power" in source else "battery"
    low = any(line.split() == ["lowpowermode", "1"] for line in settings.splitlines())
    return f"{mains}, low power mode" if low else mains
