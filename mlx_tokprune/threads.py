"""Streams that end with their thread.

MLX makes streams for every thread that computes, and an interpreter that exits after
such a thread has ended may abort ("terminate called without an active exception"), with
plain MLX 0.32.4 as well, unless the thread gave its streams up before it ended.
"""

import threading

import mlx.core as mx

_LOCAL = threading.local()


class _Ending:
    """Lives as long as its thread."""

    def __del__(self):
        mx.clear_streams()


def end_streams_with_thread() -> None:
    """Have this thread's streams end with it; nothing for the main thread."""
    main = threading.current_thread() is threading.main_thread()
    if not main and not hasattr(_LOCAL, "ending"):
        _LOCAL.ending = _Ending()
