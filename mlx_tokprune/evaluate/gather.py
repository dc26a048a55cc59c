"""Questions split over processes and hosts with `mx.distributed` (`mlx.launch`)."""

import json

import mlx.core as mx
import numpy as np


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
