"""MLX's threads on this machine: what every call that computes begins with.

Streams end with their thread. MLX makes streams for every thread that computes, and an
interpreter that exits after such a thread has ended may abort ("terminate called
without an active exception"), with plain MLX 0.32.4 as well, unless the thread gave its
streams up before it ended.

OpenBLAS uses the cores that are free. Its threads wait for each other by spinning, so
that one which has to share its core holds up all others: two threads beside a busy
process were slower than one.
"""

import contextlib
import ctypes
import functools
import os
import threading
import time

import mlx.core as mx

_LOCAL = threading.local()
_LOOKS, _PAUSE = 3, 0.0005  # a busy core is busy each time it is looked at; seconds


class _Ending:
    """Lives as long as its thread."""

    def __del__(self):
        mx.clear_streams()


def begin_work() -> None:
    """Make this thread ready for MLX, and OpenBLAS for the load of the machine."""
    main = threading.current_thread() is threading.main_thread()
    if not main and not hasattr(_LOCAL, "ending"):
        _LOCAL.ending = _Ending()
    blas = _openblas()
    if blas is not None:
        set_threads, most = blas
        set_threads(max(1, min(most, most - _busy_elsewhere())))


@functools.lru_cache(maxsize=1)
def _openblas():
    """What sets OpenBLAS's threads, and how many it has; `None` without one."""
    try:
        library = ctypes.CDLL(None)
        most = library.openblas_get_num_threads()
        return (library.openblas_set_num_threads, most) if most > 1 else None
    except (AttributeError, OSError, TypeError):
        return None


def _busy_elsewhere() -> int:
    """Threads of other processes that are running or ready on this machine."""
    least = _runnable() - _own_runnable()
    for _ in range(_LOOKS - 1):
        if least <= 0:
            break
        time.sleep(_PAUSE)
        least = min(least, _runnable() - _own_runnable())
    return max(0, least)


def _runnable() -> int:
    try:
        with open("/proc/loadavg") as file:
            return int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


def _own_runnable() -> int:
    """Of this process: MLX may still be at the step after the last answer's end."""
    found = 0
    with contextlib.suppress(OSError):
        for task in os.listdir("/proc/self/task"):
            with (
                contextlib.suppress(OSError),
                open(f"/proc/self/task/{task}/stat") as f,
            ):
                found += f.read().rpartition(")")[2].split()[:1] == ["R"]
    return found
