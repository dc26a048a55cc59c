"""Split of the questions over processes and hosts with `mx.distributed`.

`launch` starts the processes of one machine, `mlx.launch` those of several.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

_PROGRAM = (sys.executable, "-m", "mlx_tokprune.evaluate")
_WORKER = "MLX_TOKPRUNE_WORKER"  # set in the processes of `launch`
_PATIENCE = 5.0  # seconds from SIGTERM to SIGKILL


def launch(arguments: Sequence[str], workers: int, output: str) -> None:
    """Run the evaluation again in `workers` processes, and wait for its result.

    The processes end with this one, whatever ends it. Exits with 1 if no result was
    written.
    """
    before = _version(output)
    command = [*_PROGRAM, *arguments, "--workers", "1"]
    # More threads than cores would wait for each other.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    limits = {name: threads for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    ends, held = os.pipe()  # a worker reads the end of its stdin when this process ends
    processes: list[subprocess.Popen] = []
    with tempfile.TemporaryDirectory() as scratch:
        hosts = Path(scratch) / "hosts.json"
        hosts.write_text(json.dumps(_addresses(workers)))
        ring = {"MLX_HOSTFILE": str(hosts), _WORKER: "1"}
        try:
            for rank in range(workers):
                own = limits | dict(os.environ) | ring | {"MLX_RANK": str(rank)}
                processes.append(subprocess.Popen(command, stdin=ends, env=own))
            while any(p.poll() is None for p in processes):
                if any(p.returncode for p in processes):  # the others would wait for it
                    break
                time.sleep(0.1)
        finally:
            os.close(ends)
            os.close(held)
            _end(processes)
    if _version(output) == before:
        print(
            f"error: a worker failed, as printed above, or was lost, so {output} was "
            "not written; give the same command to resume from the answers so far",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _addresses(workers: int) -> list[list[str]]:
    """Return a free address of this machine for each process, as MLX's ring reads."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(workers)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]


def _end(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    last = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with_launcher() -> None:
    """End a process that `launch` started when that one ends, also by SIGKILL."""
    if _WORKER in os.environ:
        threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    with contextlib.suppress(OSError):
        os.read(0, 1)  # nothing is written: this returns when the launcher has ended
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_PATIENCE)
    os._exit(128 + signal.SIGTERM)  # a call of MLX that waits for a lost worker


@contextlib.contextmanager
def notes_once(workers: int) -> Iterator[None]:
    """Print the notes of the block in one of the evaluation's processes only."""
    log = logging.getLogger("mlx_tokprune")
    level = log.level
    if workers > 1 or os.environ.get("MLX_RANK", "0") != "0":
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _version(file: str) -> tuple | None:
    """Return a value that changes when the file is replaced; `None` without one."""
    path = Path(file)
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


class Workers:
    """Group of processes that share the questions; one unless it was launched.

    rank: number of this process. size: number of processes.
    """

    def __init__(self):
        self._group = mx.distributed.init()
        self.rank, self.size = self._group.rank(), self._group.size()

    @property
    def is_first(self) -> bool:
        """True in the process that prints and writes the result."""
        return self.rank == 0

    def share(self, total: int) -> list[int]:
        """Return the item numbers below `total` of this process."""
        return list(range(self.rank, total, self.size))

    def gather(self, records: dict[int, dict]) -> dict[int, dict]:
        """Return the records of all processes, by item number, in every process."""
        if self.size == 1:
            return records
        # Arrays only can be gathered: JSON as bytes, padded to the longest.
        sent = np.frombuffer(json.dumps(sorted(records.items())).encode(), np.uint8)
        lengths = self._all_gather(np.array([len(sent)], np.int32))
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(sent)] = sent
        parts = self._all_gather(padded).reshape(self.size, -1)
        merged = {}
        for part, length in zip(parts, lengths.tolist(), strict=True):
            merged |= dict(json.loads(bytes(part[:length])))
        return dict(sorted(merged.items()))

    def _all_gather(self, values: np.ndarray) -> np.ndarray:
        sent = mx.array(values)
        return np.array(
            mx.distributed.all_gather(sent, group=self._group, stream=mx.cpu)
        )
