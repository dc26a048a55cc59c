"""Questions split over processes and hosts with `mx.distributed` (`mlx.launch`)."""

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
    """Runs the evaluation again in `workers` processes, and waits for its result.

    Exits with 1 when they end without one: `mlx.launch` says which of them was lost,
    but ends well.
    """
    launcher = shutil.which("mlx.launch", path=os.path.dirname(sys.executable))
    if launcher is None:
        raise InputError("several workers need mlx.launch, which comes with mlx")
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
            f"error: a worker refused, as it says above, or was lost, so {output} was "
            "not written; what was answered is kept for the same command",
            file=sys.stderr,
        )
        raise SystemExit(1)


def _version(file: str) -> tuple | None:
    """What changes when a file is replaced."""
    path = Path(file)
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


class Workers:
    """This process among all. Alone when it was not started by `mlx.launch`."""

    def __init__(self):
        self._group = mx.distributed.init()
        self.rank, self.size = self._group.rank(), self._group.size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> list[int]:
        """The numbers below `total` that are this process's."""
        return list(range(self.rank, total, self.size))

    def gather(self, records: dict[int, dict]) -> dict[int, dict]:
        """Everybody's records, by number, in every process."""
        if self.size == 1:
            return records
        sent = np.frombuffer(json.dumps(sorted(records.items())).encode(), np.uint8)
        lengths = self._all_gather(np.array([len(sent)], np.int32))
        padded = np.zeros(int(lengths.max()), np.uint8)
        padded[: len(sent)] = sent
        parts = self._all_gather(padded).reshape(self.size, -1)
        found = {}
        for part, length in zip(parts, lengths.tolist(), strict=True):
            found |= {number: rows for number, rows in json.loads(bytes(part[:length]))}
        return dict(sorted(found.items()))

    def _all_gather(self, values: np.ndarray) -> np.ndarray:
        sent = mx.array(values)
        return np.array(
            mx.distributed.all_gather(sent, group=self._group, stream=mx.cpu)
        )
