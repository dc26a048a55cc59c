"""Split of the questions over processes and hosts with `mx.distributed`.

`mlx.launch` starts the processes.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import InputError


def launch(arguments: Sequence[str], workers: int, output: str) -> None:
    """Run the evaluation again in `workers` processes, and wait for its result.

    Exits with 1 if no result was written: `mlx.launch` prints which process was lost,
    but exits with 0. Raises `InputError` without `mlx.launch`.
    """
    launcher = shutil.which("mlx.launch", path=os.path.dirname(sys.executable))
    if launcher is None:
        raise InputError(
            "several workers need mlx.launch; install mlx, which brings it"
        )
    before = _version(output)
    alone = [
        sys.executable,
        "-m",
        "mlx_tokprune.evaluate",
        *arguments,
        "--workers",
        "1",
    ]
    command = [launcher, "-n", str(workers), "--backend", "ring", "--", *alone]
    # More threads than cores would wait for each other.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    limits = {name: threads for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    subprocess.run(command, env=limits | dict(os.environ))
    if _version(output) == before:
        print(
            f"error: a worker failed, as printed above, or was lost, so {output} was "
            "not written; give the same command to resume from the answers so far",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _version(file: str) -> tuple | None:
    """Return a value that changes when the file is replaced; `None` without one."""
    path = Path(file)
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


class Workers:
    """Group of processes that share the questions; one unless `mlx.launch` started it.

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
